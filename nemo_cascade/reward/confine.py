"""What a process of the sandbox gives up before it runs anything it was sent: root, resources, files in memory.

Bound into the sandbox beside the fork server, so it imports only what starts in a millisecond (not ctypes, which takes
five, but the module below it).
"""

from __future__ import annotations

import _ctypes
import os
import resource
import struct

PR_SET_DUMPABLE, PR_SET_SECCOMP = 4, 22
SECCOMP_MODE_FILTER = 2
INSTRUCTION_BYTES = 8
FILTER: list[object] = []  # struct sock_fprog, and the instructions that it points to
KINDS = (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)
HARD: dict[int, int] = {}  # the limits that this sandbox was started under: children can only go below
_PRCTL = _ctypes.dlsym(_ctypes.dlopen(None, os.RTLD_NOW), "prctl")


def _prctl(option: int, value: int, more: bytes | int = 0) -> int:
    return _ctypes.call_function(_PRCTL, (option, value, more, 0, 0))


def become(uid: int) -> None:
    """Give up root for good, and shut the door on tracing by children of the same uid."""
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # the kernel clears "dumpable" here
    else:
        _prctl(PR_SET_DUMPABLE, 0)


def set_limits(limits: list[bytes]) -> None:
    """The limits of one process, in the order of `sandbox.Limits`; none above what this sandbox was started under."""
    cpu, _, memory, processes, _, file_bytes = (float(limit) for limit in limits)
    backstop = 2 - int(-cpu // 1)  # whole ticks, counted up to 5 % early: for the children that _watch does not see
    allowed = int(processes) + 3  # the server and, for a normal user, bubblewrap count too
    for kind, value in zip(KINDS, (backstop, int(memory), allowed, int(file_bytes)), strict=True):
        hard = HARD[kind]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


class _Byte(_ctypes._SimpleCData):
    _type_ = "B"


def keep_filter(program: bytes) -> None:
    """Keep the system calls that `refuse_calls` will refuse, in the form in which the kernel reads them."""
    if program:
        kind = type("Program", (_ctypes.Array,), {"_type_": _Byte, "_length_": len(program)})
        instructions = kind.from_buffer_copy(program)
        count = len(program) // INSTRUCTION_BYTES
        FILTER[:] = struct.pack("@HP", count, _ctypes.addressof(instructions)), instructions


def refuse_calls() -> None:
    """Install the kept filter in this process and all that come from it; OSError where the kernel does not take it."""
    if FILTER and _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, FILTER[0]) != 0:  # type: ignore[arg-type]
        raise OSError("the kernel does not take the second filter of system calls (seccomp)")
