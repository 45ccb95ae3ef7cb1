"""One process per stage folder, and locks of the dead are taken over."""

import dataclasses
import os
import socket
import subprocess
import sys
import time

import pytest

from nemo_cascade.cascade.artifacts import read_json, write_json
from nemo_cascade.cascade.lock import Holder, born, hand_over, holder, locked
from nemo_cascade.types import UserError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def lock_of(pid: int, born_at: int, runner: tuple[int, int], host: str | None = None) -> dict[str, object]:
    return dataclasses.asdict(Holder(pid, born_at, host or socket.gethostname(), *runner))


def test_taken_while_held_and_gone_after(tmp_path):
    path = tmp_path / "lock.json"
    with locked(path):
        found = holder(path)
        assert found is not None
        assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
    assert not path.exists()
    assert holder(path) is None


def test_a_living_process_is_respected(tmp_path):
    path = tmp_path / "lock.json"
    other = subprocess.Popen(SLEEP)
    try:
        write_json(path, lock_of(other.pid, born(other.pid), (os.getppid(), born(os.getppid()))))
        with pytest.raises(UserError, match=f"already running as process {other.pid}"), locked(path):
            pass
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_dead_process_loses_its_lock(tmp_path):
    path = tmp_path / "lock.json"
    other = subprocess.Popen(SLEEP)
    content = lock_of(other.pid, born(other.pid), (other.pid, born(other.pid)))
    other.kill()
    other.wait()
    write_json(path, content)
    with locked(path):
        found = holder(path)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_process_id_that_was_used_again_is_not_the_holder(tmp_path):
    path = tmp_path / "lock.json"
    write_json(path, lock_of(1, born(1) + 5, (1, born(1) + 5)))
    assert holder(path) is None


def test_an_orphan_of_a_dead_runner_is_ended(tmp_path):
    path = tmp_path / "lock.json"
    runner = subprocess.Popen(SLEEP)
    runner_born = born(runner.pid)
    runner.kill()
    runner.wait()
    orphan = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        write_json(path, lock_of(orphan.pid, born(orphan.pid), (runner.pid, runner_born)))
        started = time.monotonic()
        with locked(path):
            assert time.monotonic() - started < 9
            assert orphan.wait(5) == -15
    finally:
        orphan.kill()
        orphan.wait()


def test_a_lock_of_another_machine_is_respected(tmp_path):
    path = tmp_path / "lock.json"
    write_json(path, lock_of(1, 1, (1, 1), host="elsewhere"))
    with pytest.raises(UserError, match="on elsewhere; wait for it, or stop it and delete"), locked(path):
        pass


def test_the_stages_process_may_use_the_lock_it_was_handed(tmp_path):
    path = tmp_path / "lock.json"
    code = (
        "import sys, pathlib, time\n"
        "from nemo_cascade.cascade.lock import locked\n"
        "time.sleep(0.3)\n"
        "with locked(pathlib.Path(sys.argv[1])): pass\n"
    )
    with locked(path):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        hand_over(path, child.pid)
        assert read_json(path)["pid"] == child.pid
        assert child.wait(30) == 0
        assert path.exists()
    assert not path.exists()


def test_an_empty_lock_left_by_a_crash_is_taken_over(tmp_path):
    path = tmp_path / "lock.json"
    path.touch()
    with locked(path):
        assert read_json(path)["pid"] == os.getpid()
