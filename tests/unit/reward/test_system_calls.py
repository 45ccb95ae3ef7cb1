"""The filter of system calls, run by an interpreter of its five instructions: what is refused, and what must not be."""

from __future__ import annotations

import struct

import pytest

from nemo_cascade.reward import system_calls as calls
from nemo_cascade.reward.sandbox import Sandbox

REFUSED, MISSING = calls.ERRNO | calls.EPERM, calls.ERRNO | calls.ENOSYS
X86, ARM = 0xC000003E, 0xC00000B7
NEW_USER, SIGCHLD = 0x10000000, 17


def verdict(program: bytes, architecture: int, number: int, first: int = 0) -> int:
    """What the kernel would do with one call."""
    loaded = {calls.ARCHITECTURE: architecture, calls.NUMBER: number, calls.FIRST_ARGUMENT: first & 0xFFFFFFFF}
    at, value = 0, 0
    while True:
        code, jump_true, jump_false, operand = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == calls.LOAD:
            value = loaded[operand]
        elif code == calls.RETURN:
            return operand
        else:
            holds = {calls.EQUAL: value == operand, calls.AT_LEAST: value >= operand, calls.ANY_BIT: value & operand}
            at += jump_true if holds[code] else jump_false


@pytest.mark.parametrize(
    ("machine", "architecture", "clone", "refused", "allowed"),
    [
        ("x86_64", X86, 56, {"unshare": 272, "setns": 308, "mount": 165, "ptrace": 101, "bpf": 321, "chroot": 161},
         {"read": 0, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "setresuid": 117, "openat": 257}),
        ("aarch64", ARM, 220, {"unshare": 97, "setns": 268, "mount": 40, "ptrace": 117, "bpf": 280, "chroot": 51},
         {"read": 63, "execve": 221, "kill": 129, "setresuid": 147, "openat": 56}),
    ],
)  # fmt: skip
def test_calls(machine: str, architecture: int, clone: int, refused: dict[str, int], allowed: dict[str, int]) -> None:
    program = calls.filter_program(machine)
    for name, number in refused.items():
        assert verdict(program, architecture, number) == REFUSED, name
    for name, number in allowed.items():
        assert verdict(program, architecture, number) == calls.ALLOW, name
    assert verdict(program, architecture, clone, SIGCHLD) == calls.ALLOW
    assert verdict(program, architecture, clone, NEW_USER | SIGCHLD) == REFUSED
    assert verdict(program, architecture, clone, 0x003D0F00) == calls.ALLOW  # a thread
    assert verdict(program, architecture, calls.CLONE3) == MISSING
    assert verdict(program, architecture, 0x40000000) == REFUSED  # the second table
    assert verdict(program, 0x40000003, 1) == REFUSED  # 32-bit code


def test_machines_without_a_table_have_no_filter() -> None:
    assert calls.filter_program("riscv64") == b""
    assert len(calls.filter_program()) % 8 == 0


def test_programs_still_make_threads_and_processes() -> None:
    source = (
        "import subprocess, threading, multiprocessing\n"
        "out = []\nthread = threading.Thread(target=out.append, args=(1,)); thread.start(); thread.join()\n"
        "print(out, subprocess.run(['sh', '-c', 'echo 2'], capture_output=True, text=True).stdout.strip())\n"
        "pipe, end = multiprocessing.Pipe()\n"
        "worker = multiprocessing.Process(target=end.send, args=(3,)); worker.start()\n"
        "print(pipe.recv()); worker.join()\n"
    )
    with Sandbox(spare=0) as sandbox:
        (result,) = sandbox.run_programs(source, [""])
    assert (result.status, result.stdout) == ("ok", "[1] 2\n3\n"), result.stderr
