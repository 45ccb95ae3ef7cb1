"""Every runtime keeps the same promises; the container engines are stand-in processes that read their command lines.

No container engine runs here: what is proven is the command lines, the behaviour around them, and the clean-up.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentic import SweAgentic
from nemo_cascade.reward import runtimes
from nemo_cascade.reward.repository import git
from nemo_cascade.reward.runtimes import ContainerLost, Machine, Place, Runtime
from nemo_cascade.reward.runtimes.docker import DockerRuntime
from nemo_cascade.reward.sandbox import File
from nemo_cascade.types import Invalid, Scored, Transcript, UserError
from tests.unit.domains.swe_rows import DONE, FAULT, REPAIR, edit, play, repository, row, turn
from tests.unit.reward.swe import engine_standin

MACHINE = Machine(memory_mb=2048, cpus=2.0, processes=128, scratch_mb=64, start_seconds=30.0)
IMAGE = "sweb.eval.x86_64.acme_s_shop-7"
FILES = {"a.txt": File(b"one\n"), "bin/go.sh": File(b"#!/bin/sh\necho went\n", 0o755)}


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of all three engines on the path, and one image with a repository."""
    place, home = tmp_path / "bin", tmp_path / "standin"
    place.mkdir()
    for name in runtimes.ENGINES:
        text = Path(engine_standin.__file__).read_text()
        (place / name).write_text(text.replace("/usr/bin/env python3", f"{sys.executable} -S"))
        (place / name).chmod(0o755)
    image = home / IMAGE / "testbed"
    image.mkdir(parents=True)
    repository(image)
    git(image, "reset", "--quiet", "--hard", "HEAD~1")  # the later commit stays reachable in the reflog, as in images
    packages = Path(pytest.__file__).parents[1]
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(home))
    monkeypatch.setenv("STANDIN_PACKAGES", f"{packages}:{Path(sys.base_prefix).resolve()}")
    path = f"PATH={Path(sys.base_prefix).resolve() / 'bin'}:/usr/bin:/bin"
    monkeypatch.setenv("STANDIN_ENV", json.dumps([path, f"PYTHONPATH={packages}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"]))
    return home


@pytest.fixture(params=runtimes.NAMES)
def runtime(request: pytest.FixtureRequest, engines: Path) -> Iterator[Runtime]:
    made = runtimes.load(request.param, MACHINE)
    yield made
    made.close()


def calls(home: Path) -> list[list[str]]:
    return [json.loads(line)[2:] for line in (home / "log").read_text().splitlines()]


def left_behind(home: Path) -> list[str]:
    return [path.name for path in home.glob("containers/*")]


def place_for(runtime: Runtime) -> Place:
    return Place("" if runtime.name == "bubblewrap" else IMAGE, FILES)


def test_a_container_keeps_the_promises_of_the_interface(runtime: Runtime, engines: Path) -> None:
    container = runtime.start(place_for(runtime))
    try:
        assert container.read("a.txt") == b"one\n"
        assert container.run(["bin/go.sh"], 20).stdout == b"went\n"
        every = bytes(range(256)) * 40
        container.write("deep/er/b.bin", every)
        assert container.read("deep/er/b.bin") == every
        ran = container.run(["sh", "-c", "cat; echo wrong >&2; exit 7"], 20, b"given")
        assert (ran.code, ran.stdout, ran.stderr, ran.out_of_memory) == (7, b"given", b"wrong\n", False)
        assert container.run(["python", "-c", "print(6 * 7)"], 20).stdout == b"42\n"
        began = time.monotonic()
        assert container.run(["sleep", "30"], 0.5).code is None
        assert time.monotonic() - began < 10
        assert not container.out_of_memory()
        with pytest.raises(ValueError, match="No such file"):
            container.read("c.txt")
        with pytest.raises(ValueError, match="more than 100 bytes"):
            container.read("deep/er/b.bin", 100)
        with pytest.raises(ValueError, match=r"Not a directory|File exists"):
            container.write("a.txt/x", b"")
        script = "import socket; socket.create_connection(('1.1.1.1', 80))"
        assert b"unreachable" in container.run(["python", "-c", script], 20).stderr
    finally:
        container.stop()
    container.stop()
    with pytest.raises(ContainerLost):
        container.run(["true"], 5)
    assert left_behind(engines) == []


def test_the_command_line_of_a_container(engines: Path) -> None:
    """The options that isolate it, word for word."""
    docker = DockerRuntime(MACHINE)
    docker.start(Place(IMAGE)).stop()
    version, run, probe, remove = calls(engines)
    assert version == ["version", "--format", "{{.Server.Version}}"]
    assert run[:5] == ["run", "--interactive", "--rm", "--init", "--name"]
    assert " ".join(run[6:]) == (
        "--label nemo-cascade=swe --network none --memory 2048m --memory-swap 2048m --cpus 2 --pids-limit 128 "
        f"--cap-drop ALL --security-opt no-new-privileges --workdir /testbed --entrypoint sh {IMAGE} -c "
        "echo ready; exec cat >/dev/null"
    )
    assert probe[:6] == ["exec", "--interactive", "--user", "65534:65534", "--workdir", "/testbed"]
    assert remove == ["rm", "--force", run[5]]
    engine = runtimes.load("apptainer", MACHINE)
    container = engine.start(Place(IMAGE))
    container.run(["true"], 5)
    container.stop()
    command = " ".join(calls(engines)[-1])
    assert command.startswith(
        "exec --containall --cleanenv --no-home --writable-tmpfs --net --network none --memory 2048M --cpus 2 "
        "--pids-limit 128 --env PATH="
    )
    assert command.endswith(f":/testbed --pwd /testbed docker://{IMAGE} timeout -k 1 5 true")


def test_podman_is_told_the_registry() -> None:
    podman, docker = DockerRuntime(MACHINE, "podman"), DockerRuntime(MACHINE)
    names = ["xingyaoww/a", "ghcr.io/x/a", "localhost/a", "host:5000/a", "a"]
    assert [podman.full_name(name) for name in names] == [f"docker.io/{names[0]}", *names[1:]]
    assert [docker.full_name(name) for name in names] == names


def test_commands_run_without_rights_where_the_image_allows(engines: Path) -> None:
    docker = runtimes.load("docker", MACHINE)
    container = docker.start(Place(IMAGE))
    container.run(["true"], 5)
    assert "--user" in calls(engines)[-1]
    container.stop()
    (engines / "owned_by_root").touch()
    container = docker.start(Place(IMAGE))
    container.run(["true"], 5)
    assert "--user" not in calls(engines)[-1]
    container.stop()


def test_apptainer_without_control_groups_limits_each_process(engines: Path) -> None:
    (engines / "no_cgroups").touch()
    container = runtimes.load("apptainer", MACHINE).start(Place(IMAGE))
    assert container.run(["sh", "-c", "ulimit -v"], 5).stdout == b"2097152\n"
    container.stop()


def test_memory_is_the_engines_to_judge(engines: Path) -> None:
    container = runtimes.load("podman", MACHINE).start(Place(IMAGE))
    killed = ["sh", "-c", "kill -9 $$"]
    assert not container.run(killed, 5).out_of_memory
    (engines / "oom").touch()
    assert container.run(killed, 5).out_of_memory and container.out_of_memory()
    container.stop()


def test_nothing_survives_this_process(engines: Path) -> None:
    """A process that starts a container and is killed: the closed pipe ends the container."""
    program = (
        "import os, signal, sys\nfrom nemo_cascade.reward import runtimes\n"
        f"c = runtimes.load('docker', runtimes.Machine()).start(runtimes.Place({IMAGE!r}))\n"
        "print(c.name, flush=True)\nsys.stdin.read()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == -9 and done.stdout.startswith("nemo-cascade-"), done.stderr
    deadline = time.monotonic() + 10
    while left_behind(engines) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(engines) == []


def test_closing_a_runtime_stops_what_still_runs(engines: Path) -> None:
    docker, apptainer = runtimes.load("docker", MACHINE), runtimes.load("apptainer", MACHINE)
    containers = [engine.start(Place(IMAGE)) for engine in (docker, docker, apptainer)]
    assert len(left_behind(engines)) == 2
    docker.close()
    apptainer.close()
    assert left_behind(engines) == []
    assert not containers[2].folder.exists()


def test_a_container_that_vanishes_is_lost_and_not_a_failure_of_the_answer(engines: Path) -> None:
    container = runtimes.load("docker", MACHINE).start(Place(IMAGE))
    container._client.kill()
    container._client.wait()
    with pytest.raises(ContainerLost, match="has ended"):
        container.run(["true"], 5)
    container.stop()
    for name, image in (("docker", "-v/:/x"), ("docker", "a\0b"), ("apptainer", "--bind=/"), ("apptainer", "a\0b")):
        with pytest.raises(ContainerLost, match="is no image"):
            runtimes.load(name, MACHINE).start(Place(image))
    with pytest.raises(ContainerLost, match="image other did not start: Unable to find image"):
        runtimes.load("docker", MACHINE).start(Place("other"))
    with pytest.raises(ContainerLost, match=r"docker://other did not start: FATAL: could not open image"):
        runtimes.load("apptainer", MACHINE).start(Place("other"))
    assert left_behind(engines) == []


def test_an_engine_that_is_missing_or_down_is_named_with_its_remedy(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtimes.first_engine(MACHINE) == "docker"
    (engines / "down").touch()
    with pytest.raises(UserError, match=r"docker is installed and does not work \(Cannot connect.*start its daemon"):
        runtimes.load("docker", MACHINE).start(Place(IMAGE))
    assert runtimes.first_engine(MACHINE) == "apptainer"
    monkeypatch.setenv("PATH", str(Path(shutil.which("bwrap")).parent))
    for name in runtimes.ENGINES:
        with pytest.raises(UserError, match=f"^{name} is not installed; "):
            runtimes.load(name, MACHINE).check()
    with pytest.raises(UserError, match=r"no container engine works here.*docker.*podman.*apptainer"):
        runtimes.first_engine(MACHINE)
    for name in runtimes.NAMES:  # several domains have these options: no message names one of them
        (engines / "down").unlink(missing_ok=True)
        made = runtimes.load(name, MACHINE)
        made._checked = True
        with pytest.raises(UserError, match=rf"^option runtime: {name} starts from ") as caught:
            made.start(Place("x") if name == "bubblewrap" else Place())
        assert "swe_agent" not in str(caught.value)


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("podman", "apptainer")]


@pytest.mark.parametrize("name", ["docker", *SLOWLY])
def test_a_rollout_in_an_image(name: str, engines: Path) -> None:
    """Right and wrong repairs; the agent finds neither the later commit nor a way to keep its container."""
    services = Services()
    options = {"runtime": name, "memory_mb": 2048, "tests_timeout_s": 60.0, "start_timeout_s": 30.0}
    domain = SweAgentic(services, options | {"image": IMAGE.replace("acme_s_shop-7", "{instance_id}")})
    base = git(engines / IMAGE / "testbed", "rev-parse", "HEAD").strip()
    task = domain.parse_row(row(base, instance_id="acme_s_shop-7"), "rows:1")
    try:
        log = turn("run", command="git log --oneline --all --reflog | cat")
        outcome, answers = play(domain, task, [log, edit(FAULT, REPAIR), DONE])
        assert outcome == Scored(1.0, {"fail_to_pass": 1.0, "pass_to_pass": 1.0}, "all tests pass")
        assert answers[0].endswith(" base") and "secret" not in answers[0]
        outcome, _ = play(domain, task, [edit(FAULT, "RATE // 50"), DONE])
        assert isinstance(outcome, Scored) and outcome.reward == 0.0
    finally:
        services.close()
    assert left_behind(engines) == []


def test_memory_that_ran_out_is_no_verdict(engines: Path) -> None:
    """In the agent's container or in that of the tests; the rollout was resolved in both cases."""
    domain = SweAgentic(Services(), {"runtime": "docker", "image": IMAGE, "memory_mb": 2048})
    task = domain.parse_row(row("HEAD"), "rows:1")
    repair = edit(FAULT, REPAIR)
    episode = domain.begin(task)
    said = (repair, *(episode.reply(repair) or ()), DONE)
    assert episode.reply(DONE) is None
    episode.close()
    (engines / "oom").touch()
    assert domain.score(task, Transcript(said)) == Invalid("the tests ran out of memory")
    outcome, _ = play(domain, task, [repair, DONE])
    assert outcome == Invalid("the rollout's container ran out of memory")
    assert left_behind(engines) == []


def test_a_row_without_an_image_or_with_one_that_is_not_there(engines: Path) -> None:
    domain = SweAgentic(Services(), {"runtime": "docker", "start_timeout_s": 30.0})
    for fields, reason in (
        ({"dataset_name": "R2E-Gym/R2E-Gym-Subset"}, "the row names no image"),
        ({"docker_image": "namanjain12/x_final:abc"}, "docker: image namanjain12/x_final:abc did not start"),
    ):
        task = domain.parse_row(row("0" * 40, **fields), "rows:1")
        outcome, answers = play(domain, task, [turn("run", command="ls"), DONE])
        assert isinstance(outcome, Invalid) and reason in outcome.reason
        assert answers == []


@pytest.mark.parametrize("name", ["docker", "apptainer"])
def test_r2e_tests_of_an_image_are_hidden_from_the_agent_and_grade_it(name: str, engines: Path) -> None:
    hidden = engines / IMAGE / "r2e_tests"
    hidden.mkdir()
    (hidden / "test_1.py").write_text(
        "from shop.prices import with_tax\n\n\ndef test_a():\n    assert with_tax(100) == 120\n"
    )
    (engines / IMAGE / "run_tests.sh").write_text("pytest -rA r2e_tests\n")
    services = Services()
    domain = SweAgentic(services, {"runtime": name, "memory_mb": 2048, "start_timeout_s": 30.0})
    fields = {"instance_id": "shop", "repo": "shop", "base_commit": "HEAD", "problem_statement": "?"}
    expected = {"docker_image": IMAGE, "expected_output_json": '{"test_a": "PASSED"}'}
    task = domain.parse_row({**fields, **expected}, "rows:1")
    try:
        look = turn(
            "run", command="find / -path /proc -prune -o -path '*r2e_tests*' -type f -print 2>&1 | grep -v denied"
        )
        outcome, answers = play(domain, task, [look, edit(FAULT, REPAIR), DONE])
        assert outcome == Scored(1.0, {"as_recorded": 1.0}, "all tests as recorded")
        assert answers[0] == "[exit status 1]"  # nothing found
        outcome, _ = play(domain, task, [edit(FAULT, "RATE // 50"), DONE])
        assert outcome == Scored(0.0, {"as_recorded": 0.0}, "test_a: FAILED, not PASSED")
    finally:
        services.close()
    shutil.rmtree(hidden)
    other = dataclasses.replace(task, id="other")
    outcome, _ = play(domain, other, [edit(FAULT, REPAIR), DONE])
    assert isinstance(outcome, Invalid) and "neither in the row nor in its image" in outcome.reason
    services.close()
    assert left_behind(engines) == []
