"""Escape attempts against the sandbox, and the verdicts programs get from it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.reward import bubblewrap
from nemo_cascade.reward.sandbox import File, Limits, Sandbox
from nemo_cascade.reward.wire import to_json
from nemo_cascade.types import UserError

FAST = Limits(cpu_seconds=1.0, wall_seconds=10.0, memory_mb=256, output_bytes=4096)


FORK_BOMB = """import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except OSError:
    print(made)
"""
ORPHAN = """import os, time
if input() == 'first':
    if os.fork() == 0:
        time.sleep(0.5)
        open('/tmp/late', 'w')
        os._exit(0)
else:
    time.sleep(1)
    print(os.path.exists('/tmp/late'))
"""
BACK_TO_ROOT = """import os
for change in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.setgroups([0])):
    try:
        change()
        print('escaped')
    except PermissionError:
        print('refused')
"""
FORGE_EVERYWHERE = """import os
written = []
for fd in range(4, 256):
    try:
        os.write(fd, b'forged')
        written.append(fd)
    except OSError:
        pass
print(written)
"""
TRACE = """import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno(), os.path.exists('/proc'))
"""
METHOD = """class Solution:
    def total(self, xs):
        print('noise')
        return {'sum': sum(xs), 'set': {3, 1, 2}}
"""
ALWAYS_EQUAL = """class Always(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(): return Always(7)
"""
AS_A_USER = f"""from nemo_cascade.reward import bubblewrap
from nemo_cascade.reward.sandbox import Limits, Sandbox
with Sandbox(spare=0) as sandbox:
    print(bubblewrap.launch_mode())
    print(sandbox.run_programs('print(int(input()) + 1)', ['4'])[0].stdout.strip())
    print(sandbox.run_programs({FORK_BOMB!r}, [''], Limits(processes=12))[0].stdout.strip())
    print(sandbox.run_programs({TRACE!r}, [''])[0].stdout.strip())
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(spare=1) as opened:
        yield opened


def run(sandbox: Sandbox, source: str, limits: Limits = FAST, stdin: str = "") -> tuple[str, str, str]:
    (result,) = sandbox.run_programs(source, [stdin], limits)
    return result.status, result.stdout, result.stderr


def test_each_test_gets_its_own_process_and_folder(sandbox: Sandbox) -> None:
    source = "import os\nn = int(input())\nprint(n * n, os.listdir('.'))\nopen(f'left{n}', 'w').write('x')"
    results = sandbox.run_programs(source, ["3", "12"], FAST)
    assert [result.stdout for result in results] == ["9 []\n", "144 []\n"]
    assert [result.status for result in results] == ["ok", "ok"]
    assert 0 < results[0].cpu_seconds < 0.5


def test_a_failing_test_can_end_the_submission(sandbox: Sandbox) -> None:
    results = sandbox.run_programs(
        "print(input())", list("abcd"), FAST, stop=lambda index, result: result.stdout == "b\n"
    )
    assert [result.stdout for result in results] == ["a\n", "b\n"]


def test_exit_status_is_reported_but_output_decides(sandbox: Sandbox) -> None:
    assert run(sandbox, "import sys; sys.exit(3)")[0] == "nonzero"
    assert run(sandbox, "import os; os._exit(0)") == ("ok", "", "")
    assert run(sandbox, "import sys; sys.exit(0)") == ("ok", "", "")
    status, _, stderr = run(sandbox, "1/0")
    assert status == "nonzero"
    assert stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert run(sandbox, "def f(:")[0] == "nonzero"


def test_network_is_unreachable(sandbox: Sandbox) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\nprint('connected')"
    status, stdout, stderr = run(sandbox, source)
    listener.close()
    assert (status, stdout) == ("nonzero", "")
    assert "refused" in stderr or "unreachable" in stderr
    assert "unreachable" in run(sandbox, "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=2)")[2]


@pytest.mark.parametrize("path", ["/usr/x", "/x", "/run/x", "/dev/x", sys.base_prefix + "/x"])
def test_writing_outside_the_scratch_space_fails(sandbox: Sandbox, path: str) -> None:
    status, _, stderr = run(sandbox, f"open({path!r}, 'w')")
    assert status == "nonzero"
    assert "Read-only file system" in stderr or "Permission denied" in stderr


def test_host_files_are_invisible(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("42")
    for path in ("/etc/passwd", "/etc/shadow", str(secret), __file__, "/proc/1/environ", "/sys/kernel"):
        status, stdout, stderr = run(sandbox, f"print(open({path!r}).read())")
        assert (status, stdout) == ("nonzero", ""), path
        assert "No such file" in stderr or "Permission denied" in stderr


def test_environment_does_not_leak(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with Sandbox(spare=0) as fresh:
        status, stdout, _ = run(fresh, "import os; print(sorted(os.environ))")
    assert status == "ok"
    assert "SECRET_TOKEN" not in stdout
    assert "PATH" in stdout


def test_submissions_do_not_meet(sandbox: Sandbox) -> None:
    hidden = "open('/tmp/mine', 'w').write('loot')"
    assert run(sandbox, hidden)[0] == "ok"
    assert run(sandbox, "print(open('/tmp/mine').read())")[0] == "nonzero"


def test_fork_bomb_is_bounded(sandbox: Sandbox) -> None:
    status, stdout, _ = run(sandbox, FORK_BOMB, Limits(processes=12, wall_seconds=10.0))
    assert status == "ok"
    assert 9 <= int(stdout) <= 14


def test_orphans_end_with_their_test(sandbox: Sandbox) -> None:
    assert sandbox.run_programs(ORPHAN, ["first", "second"], FAST)[1].stdout == "False\n"


def test_memory_bomb(sandbox: Sandbox) -> None:
    assert run(sandbox, "x = bytearray(1 << 31)")[0] == "memory"
    assert run(sandbox, "x = []\nwhile True: x.append(bytes(1 << 20))")[0] == "memory"


def test_infinite_loop_hits_the_cpu_limit(sandbox: Sandbox) -> None:
    (result,) = sandbox.run_programs("while True: pass", [""], FAST)
    assert result.status == "cpu_time"
    assert 1.0 <= result.cpu_seconds < 1.3


def test_ignoring_the_cpu_signal_does_not_help(sandbox: Sandbox) -> None:
    source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(sandbox, source)[0] == "cpu_time"


def test_sleeping_is_no_verdict(sandbox: Sandbox) -> None:
    started = time.monotonic()
    results = sandbox.run_programs("import time; time.sleep(60)", ["", ""], Limits(wall_seconds=0.5))
    assert [result.status for result in results] == ["wall_time"]
    assert time.monotonic() - started < 8


def test_output_flood_is_cut(sandbox: Sandbox) -> None:
    (result,) = sandbox.run_programs("while True: print('x' * 1000)", [""], FAST)
    assert result.status == "output"
    assert len(result.stdout) == 4096
    status, stdout, stderr = run(sandbox, "import sys\nsys.stderr.write('e' * 10**6)\nprint('fine')")
    assert (status, stdout, len(stderr)) == ("ok", "fine\n", 16384)


def test_file_size_is_bounded(sandbox: Sandbox) -> None:
    source = "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nf.flush()\nprint('wrote')"
    status, stdout, _ = run(sandbox, source, Limits(file_mb=4))
    assert status != "ok"
    assert stdout == ""


@pytest.mark.parametrize("attack", ["os.kill(-1, 9)", "os.kill(os.getppid(), 9)", "os.kill(os.getppid(), 19)"])
def test_killing_the_server_fails_that_test_only(sandbox: Sandbox, attack: str) -> None:
    source = f"import os\nif input() == 'attack':\n    {attack}\n    print('done')\nelse:\n    print('good')"
    if attack.endswith("19)"):  # a stopped server never answers: no verdict, within the deadline
        with Sandbox(spare=0) as own:
            session = own.open()
            server = session._server
            ask = server.ask
            server.ask = lambda fields, seconds: ask(fields, 1.0)  # type: ignore[method-assign]
            result, _ = session.request(b"fresh", b"source", [source.encode()], "attack", FAST)
        assert result.status == "wall_time"
        return
    results = sandbox.run_programs(source, ["good", "attack", "good"], FAST)
    assert results[0].stdout == results[2].stdout == "good\n"
    assert results[1].status in ("crashed", "ok")
    if attack.startswith("os.kill(os.getppid()"):
        assert results[1].status == "crashed"


def test_the_server_cannot_be_traced_or_written_to(sandbox: Sandbox) -> None:
    assert run(sandbox, TRACE)[1] == "-1 1 False\n"


def test_no_capabilities_and_no_way_back_to_root(sandbox: Sandbox) -> None:
    assert run(sandbox, BACK_TO_ROOT)[1] == "refused\nrefused\nrefused\n"


def test_descriptors_of_the_server_are_closed(sandbox: Sandbox) -> None:
    assert run(sandbox, FORGE_EVERYWHERE)[1] == "[]\n"


def test_functions_return_values(sandbox: Sandbox) -> None:
    (result,) = sandbox.call_function(METHOD, "Solution.total", [[[1, 2, 3]]], FAST)
    assert (result.status, result.value) == ("ok", {"sum": 6, "set": [1, 2, 3]})
    errors = sandbox.call_function("def f(x): return 10 // x", "f", [[0], [5]], FAST)
    assert (errors[0].status, errors[0].error) == ("nonzero", "ZeroDivisionError: integer division or modulo by zero")
    assert (errors[1].status, errors[1].value) == ("ok", 2)
    assert sandbox.call_function("def g(): pass", "f", [[]], FAST)[0].error == "KeyError: 'f'"


def test_values_come_back_as_json_says() -> None:
    values = [None, True, -3, 1.5, 1e300, 'a"\\\n\u00e9\U0001f600\ud800', [1, [2, {}]], {"k": [None], "": ""}, 10**40]
    for value in values:
        assert json.loads(to_json(value)) == value
    assert to_json({1: (2,), None: {3, 1}, 2.5: range(2)}) == '{"1": [2], "null": [1, 3], "2.5": [0, 1]}'
    assert json.loads(to_json([float("inf"), -float("inf")])) == [float("inf"), -float("inf")]
    for value in (object(), {(1, 2): 3}, {1, "a"}):
        with pytest.raises(TypeError):
            to_json(value)


@pytest.mark.parametrize(
    "body",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print(42)",
        "import os; os.write(3, b'not json'); os._exit(0)",
    ],
)
def test_a_function_that_does_not_return_has_no_value(sandbox: Sandbox, body: str) -> None:
    (result,) = sandbox.call_function(f"def f():\n    {body}", "f", [[]], FAST)
    assert result.value is None
    if not body.startswith("print"):
        assert result.status == "crashed"


def test_equality_tricks_do_not_leave_the_sandbox(sandbox: Sandbox) -> None:
    (result,) = sandbox.call_function(ALWAYS_EQUAL, "f", [[]], FAST)
    assert result.value == 7
    assert type(result.value) is int


def test_set_order_is_the_same_in_every_sandbox() -> None:
    outputs = set()
    for _ in range(3):
        with Sandbox(spare=0) as fresh:
            outputs.add(run(fresh, "print({'apple', 'pear', 'plum', 'fig', 'kiwi'})")[1])
    assert len(outputs) == 1


def test_session_keeps_files_and_ends_processes(sandbox: Sandbox) -> None:
    with sandbox.session({"a/b.txt": "one\n", "go.sh": File(b"#!/bin/sh\ncat a/b.txt\n", 0o755)}) as session:
        assert session.run(["./go.sh"], limits=FAST).stdout == "one\n"
        assert session.run(["sed", "-i", "s/one/two/", "a/b.txt"], limits=FAST).status == "ok"
        assert session.run(["python", "-c", "print(open('a/b.txt').read(), end='')"], limits=FAST).stdout == "two\n"
        assert session.run(["nothing-like-this"], limits=FAST).exit_code == 127
        assert session.run(["chmod", "0", "a/b.txt"], limits=FAST).status == "ok"
        assert session.run(["cat"], stdin="typed", limits=FAST).stdout == "typed"
        assert session.read() == {"a/b.txt": File(b"two\n", 0), "go.sh": File(b"#!/bin/sh\ncat a/b.txt\n", 0o755)}


def test_files_cannot_be_placed_outside(sandbox: Sandbox) -> None:
    for path in ("/etc/x", "../x", "a/../../x", ""):
        with pytest.raises(ValueError, match="leaves the work folder"):
            sandbox.run(["ls"], {path: "x"})


def test_a_repository_is_copied_in(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "test_it.py").write_text(
        "import unittest\nclass T(unittest.TestCase):\n    def test_ok(self): self.assertEqual(1 + 1, 2)\n"
    )
    (tmp_path / "link").symlink_to("pkg")
    commands = [["python", "-m", "unittest", "pkg/test_it.py"], ["rm", "-r", "pkg"], ["ls"]]
    results = sandbox.run_in_repo(tmp_path, commands, Limits())
    assert results[0].status == "ok"
    assert "Ran 1 test" in results[0].stderr
    assert results[2].stdout == "link\n"
    assert (tmp_path / "pkg" / "test_it.py").exists()


def test_threads_share_one_sandbox_and_may_end(sandbox: Sandbox) -> None:
    answers: dict[int, str] = {}

    def work(index: int) -> None:
        answers[index] = run(sandbox, "print(int(input()) ** 2)", FAST, str(index))[1]

    for start in (0, 4):  # the second batch uses sandboxes ordered by threads that no longer exist
        threads = [threading.Thread(target=work, args=(index,)) for index in range(start, start + 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {index: f"{index * index}\n" for index in range(8)}


def test_sandboxes_that_do_not_start_are_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    Sandbox.check()
    with Sandbox(spare=0) as broken:
        monkeypatch.setattr(bubblewrap, "_python", lambda: Path("/nowhere/python"))
        bubblewrap._system_binds.cache_clear()
        result = broken.run(["ls"])
        (call,) = broken.call_function("def f(): return 1", "f", [[]])
    bubblewrap._system_binds.cache_clear()
    assert (result.status, call.status) == ("wall_time", "wall_time")
    assert "did not start: bwrap: execvp /nowhere/python" in result.stderr


def test_missing_bubblewrap_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    bubblewrap.launch_mode.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install -y bubblewrap"):
        Sandbox.check()
    bubblewrap.launch_mode.cache_clear()


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv to become a normal user"
)
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a system Python that a normal user can read")
def test_a_normal_user_gets_the_same_protection() -> None:
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-B", "-c"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    reads = subprocess.run([*user, "import nemo_cascade"], capture_output=True, env=environment, cwd="/", timeout=60)
    if reads.returncode != 0:
        pytest.skip("a normal user cannot read this checkout")
    done = subprocess.run([*user, AS_A_USER], capture_output=True, text=True, env=environment, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    mode, answer, forks, *trace = done.stdout.split()
    assert (mode, answer, trace) == ("user", "5", ["-1", "1", "False"])
    assert 9 <= int(forks) <= 14
