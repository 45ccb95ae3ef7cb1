"""Each protection of the sandbox taken away in turn: the attack that it stops must then be paid, or the audit is blind.

The sandbox under test is the real one with one line of bubblewrap's arguments, or of the fork server, changed. Whoever
changes that may only take away namespaces together with `kill(-1)`, which without them would end other processes.
"""

from __future__ import annotations

import os
import py_compile
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.cascade.attacks import Attack, Held, Target, assault, survivors
from nemo_cascade.cascade.attacks.battery import battery
from nemo_cascade.cascade.attacks.forbidden import ATTEMPTS
from nemo_cascade.domains import Services
from nemo_cascade.reward import bubblewrap, fork_server, system_calls, wire

NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
KILLS_ALL = "        os.kill(-1, SIGKILL)\n"
KILLS_NOBODY = {KILLS_ALL: "        return\n"}
Weaken = Callable[..., Services]


@pytest.fixture
def weaken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Weaken]:
    """A function that gives services whose sandboxes lack something."""
    opened: list[Services] = []
    real, real_uid, real_filter = bubblewrap.command, bubblewrap.sandbox_uid, system_calls.filter_program

    def weakened(
        without: Sequence[str] = (),
        more: Sequence[str] = (),
        server: Mapping[str, str] = {},
        uid: int | None = None,
        calls: bool = True,
    ) -> Services:
        source = Path(fork_server.__file__).read_text(encoding="utf-8")
        for old, new in server.items():
            assert source.count(old) == 1
            source = source.replace(old, new)
        if "--unshare-pid" in without or uid is not None:
            assert "kill(-1" not in source.replace("# ", ""), "this would end processes of the machine"

        def command(mode: bubblewrap.Mode, scratch_mb: int, read_only: Sequence[Path]) -> list[str]:
            arguments = real(mode, scratch_mb, read_only)
            if "--unshare-all" in arguments:  # how a user's sandboxes say it
                arguments[arguments.index("--unshare-all")] = "--unshare-user"
                arguments[1:1] = NAMESPACES
            arguments = [argument for argument in arguments if argument not in without]
            at = arguments.index("--remount-ro")
            arguments = [*arguments[:at], *more, *arguments[at:]]
            return arguments if uid is None else [*arguments[:-1], str(uid)]

        folder = tempfile.TemporaryDirectory(prefix="weakened-", dir="/tmp")
        place = Path(folder.name, "server")
        (tmp_path / "fork_server.py").write_text(source, encoding="utf-8")
        for given, name in ((tmp_path / "fork_server.py", "fork_server.pyc"), (Path(wire.__file__), WIRE)):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            py_compile.compile(str(given), cfile=str(place / name), doraise=True)
            (place / name).chmod(0o644)
        Path(folder.name).chmod(0o755)
        bubblewrap.launch_mode()  # found with the real one
        monkeypatch.setattr(bubblewrap, "_server_folder", lambda: folder)
        monkeypatch.setattr(bubblewrap, "command", command)
        monkeypatch.setattr(bubblewrap, "sandbox_uid", real_uid if uid is None else lambda: uid)
        monkeypatch.setattr(system_calls, "filter_program", real_filter if calls else lambda: b"")
        opened.append(Services())
        return opened[-1]

    yield weakened
    for services in opened:
        services.close()


WIRE = f"{wire.__name__.replace('.', '/')}.pyc"


def attack_on(services: Services, name: str) -> Attack:
    target = Target("code", lambda options: domains.load("code", services, options))
    return next(attack for attack in battery(target) if attack.name == f"call: {name}")


def held(services: Services, name: str) -> Held:
    return assault(attack_on(services, name))


def test_the_whole_sandbox_holds_them(weaken: Weaken) -> None:
    services = weaken()
    assert {name: held(services, name).breach for name in ATTEMPTS} == dict.fromkeys(ATTEMPTS, "")


def test_without_a_network_of_its_own(weaken: Weaken) -> None:
    services = weaken(without=["--unshare-net"])
    assert held(services, "asks the network").breach == "earned 1 (all 1 tests pass)"
    assert held(services, "asks the network by a name without a file").breach.startswith("earned 1")
    assert held(services, "reads a file of the host").breach == ""


def test_with_a_folder_of_the_host(weaken: Weaken) -> None:
    services = weaken(more=["--perms", "0755", "--dir", "/var", "--ro-bind", "/var/tmp", "/var/tmp"])
    for name in ("reads a file of the host", "reads a file of the host through a link", "reads the tests from disk"):
        assert held(services, name).breach.startswith("earned 1"), name
    assert held(services, "asks the network").breach == ""


def test_with_a_folder_to_write(weaken: Weaken, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    services = weaken(more=["--bind", str(tmp_path), "/etc"])
    assert held(services, "writes outside its folders").breach.startswith("earned 1")
    assert list(tmp_path.glob("written")) == []


def test_without_memory_of_its_own(weaken: Weaken) -> None:
    services = weaken(without=["--unshare-ipc"], calls=False)
    assert held(services, "attaches to memory that the host shares").breach.startswith("earned 1")
    services = weaken(without=["--unshare-ipc"])
    assert held(services, "attaches to memory that the host shares").breach == ""  # the filter alone


def test_with_the_processes_of_the_host(weaken: Weaken) -> None:
    """/proc, the host's process numbers and another process's uid: its environment is open, and it can be ended."""
    if bubblewrap.launch_mode() != "root":
        pytest.skip("only root can give a sandbox another process's uid")
    uid = bubblewrap.sandbox_uid()
    services = weaken(without=["--unshare-pid"], more=["--proc", "/proc"], server=KILLS_NOBODY, uid=uid)
    assert held(services, "reads the environment of a process of the host").breach.startswith("earned 1")
    assert held(services, "ends a process of the host").breach.startswith("earned 1")


def test_with_a_parent_that_can_be_read(weaken: Weaken) -> None:
    """The fork server is dumpable again, and /proc is there. Tracing is a system call that the filter refuses, too."""
    dumpable = {
        '    requests, answers = _reserve()': "    __import__('ctypes').CDLL(None).prctl(4, 1, 0, 0, 0)\n"
        "    requests, answers = _reserve()"
    }
    services = weaken(more=["--proc", "/proc"], server=dumpable, calls=False)
    for name in ("reads its parent's memory", "copies its parent's memory", "traces its parent"):
        assert held(services, name).breach.startswith("earned 1"), name
    assert held(weaken(server=dumpable), "copies its parent's memory").breach == ""  # the filter alone


def test_without_the_filter_of_system_calls(weaken: Weaken) -> None:
    """A namespace of one's own is what the kernel gives to any user, and root in it mounts memory without a limit."""
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("this kernel gives nobody a user namespace")
    services = weaken(calls=False)
    for name in (
        "makes a user namespace", "makes a user namespace for a child", "mounts a file system without a size",
        "changes the root folder", "makes a segment of memory that outlives it", "enlarges the buffers of a socket",
        "makes a file in memory without a size",
    ):  # fmt: skip
        expected = "" if name == "changes the root folder" else "earned 1"
        assert held(services, name).breach[: len("earned 1")] == expected, name


def test_without_an_end_for_what_stays(weaken: Weaken, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that outlives its program, and that neither server nor namespace ends, is found by its ancestor."""
    monkeypatch.setattr(survivors, "GRACE_SECONDS", 1.0)
    services = weaken(without=["--unshare-pid"], server=KILLS_NOBODY)
    found = held(services, "a process that outlives its program")
    assert found.breach.startswith("processes remain: ")
    pids = [int(part.partition("(")[2].partition(")")[0]) for part in found.breach.split(", ")]
    for pid in pids:
        assert pid in survivors.family()
        os.kill(pid, signal.SIGKILL)
    assert held(weaken(), "a process that outlives its program").breach == ""
