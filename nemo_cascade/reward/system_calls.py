"""System calls that no sandboxed program needs, refused by the kernel: a seccomp filter that bubblewrap installs.

Namespaces first: a program that makes a user namespace is root in it, and may mount a tmpfs without a size, which fills
the machine's memory past every limit of the sandbox. Then memory that is in no process's address space, where no limit
of a process sees it, and that outlives what made it: segments and queues of System V, message queues, files in memory,
pages given to a pipe, large buffers of sockets. Then what traces or reads other processes, loads code into the kernel,
or has been a way into it more often than it was of use (io_uring, userfaultfd, keys, BPF, rare kinds of sockets).
"""

from __future__ import annotations

import functools
import os
import struct
from typing import NamedTuple

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, (16, 24, 32)  # offsets in struct seccomp_data; little-endian
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
DONE, EPERM, ENOSYS, EAFNOSUPPORT = 0, 1, 38, 97
CLONE3 = 435  # its flags lie in memory, where a filter cannot look: "no such call" makes libc fall back on clone
NAMESPACES = 0x7E020080  # CLONE_NEW*
X32 = 0x40000000  # the second table of x86_64
FAMILIES = (1, 2, 10, 16)  # local, IPv4, IPv6, netlink; others (vsock) need not stop at a network namespace
SOL_SOCKET = 1
BUFFERS = (7, 8, 32, 33, 60)  # SO_SNDBUF, SO_RCVBUF, both by FORCE, SO_ZEROCOPY, which pins pages that are unmapped


class Machine(NamedTuple):
    """Numbers of one kind of machine: AUDIT_ARCH, then system calls."""

    architecture: int
    clone: int
    socket: int
    setsockopt: int
    absent: tuple[int, ...]
    refused: tuple[int, ...]


MACHINES = {
    "x86_64": Machine(
        0xC000003E, 56, 41, 54,
        (29, 30, 64, 68, 240, 278, 319, 447),
        (101, 155, 161, 165, 166, 175, 246, 248, 249, 250, 272, 298, 308, 310, 311, 313, 320, 321, 323, 425,
         428, 429, 430, 432, 442),
    ),
    "aarch64": Machine(
        0xC00000B7, 220, 198, 208,
        (194, 196, 190, 186, 180, 75, 279, 447),
        (39, 40, 41, 51, 97, 104, 105, 117, 217, 218, 219, 241, 268, 270, 271, 273, 280, 282, 294, 425,
         428, 429, 430, 432, 442),
    ),
}  # fmt: skip
"""Absent ("no such call", for which callers have a fallback): shmget, shmat, semget, msgget, mq_open, vmsplice,
memfd_create, memfd_secret. Refused: ptrace, pivot_root, chroot, mount, umount2, init_module, kexec_load, add_key,
request_key, keyctl, unshare, perf_event_open, setns, process_vm_readv, process_vm_writev, finit_module,
kexec_file_load, bpf, userfaultfd, io_uring_setup, open_tree, move_mount, fsopen, fsmount, mount_setattr."""


def _instruction(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)


def _error(number: int) -> bytes:
    """End the call with an error; with DONE, as if it had been done."""
    return _instruction(RETURN, ERRNO | number)


PASS = _instruction(RETURN, ALLOW)


def _if(code: int, value: int, *then: bytes) -> list[bytes]:
    """Run these instructions, of which the last must return, if the loaded value compares so."""
    return [_instruction(code, value, 0, len(then)), *then]


def _argument(at: int) -> bytes:
    return _instruction(LOAD, ARGUMENTS[at])


def _start(architecture: int) -> list[bytes]:
    """Refuse another machine's calls (32-bit code), then load the number."""
    lines = [_instruction(LOAD, ARCHITECTURE), _instruction(EQUAL, architecture, 1), _error(EPERM)]
    return [*lines, _instruction(LOAD, NUMBER)]


@functools.cache
def filter_program(machine: str = "") -> bytes:
    """The filter as bubblewrap's --seccomp reads it; empty for a machine whose numbers are not known here."""
    known = MACHINES.get(machine or os.uname().machine)
    if known is None:
        return b""
    lines = _start(known.architecture)
    lines += [*_if(AT_LEAST, X32, _error(EPERM)), *_if(EQUAL, CLONE3, _error(ENOSYS))]
    for error, numbers in ((EPERM, known.refused), (ENOSYS, known.absent)):
        for number in numbers:
            lines += _if(EQUAL, number, _error(error))
    lines += _if(EQUAL, known.clone, _argument(0), *_if(ANY_BIT, NAMESPACES, _error(EPERM)), PASS)
    families = [line for family in FAMILIES for line in _if(EQUAL, family, PASS)]
    lines += _if(EQUAL, known.socket, _argument(0), *families, _error(EAFNOSUPPORT))
    buffers = [line for option in BUFFERS for line in _if(EQUAL, option, _error(DONE))]
    general = _if(EQUAL, SOL_SOCKET, _argument(2), *buffers, PASS)
    lines += _if(EQUAL, known.setsockopt, _argument(1), *general, PASS)
    return b"".join([*lines, PASS])
