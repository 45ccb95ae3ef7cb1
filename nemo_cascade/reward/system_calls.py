"""System calls that no sandboxed program needs, refused by the kernel: a seccomp filter that bubblewrap installs.

Namespaces first: a program that makes a user namespace is root in it, and may mount a tmpfs without a size, which fills
the machine's memory past every limit of the sandbox. Then what traces or reads other processes, loads code into the
kernel, or has been a way into it more often than it was of use (io_uring, userfaultfd, keys, BPF).
"""

from __future__ import annotations

import functools
import os
import struct

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; little-endian
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = 1, 38
CLONE3 = 435  # its flags lie in memory, where a filter cannot look: "no such call" makes libc fall back on clone
NAMESPACES = 0x7E020080  # CLONE_NEW*
X32 = 0x40000000  # the second table of x86_64
MACHINES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E, 56,
        (101, 155, 161, 165, 166, 175, 246, 248, 249, 250, 272, 298, 308, 310, 311, 313, 320, 321, 323, 425,
         428, 429, 430, 432, 442),
    ),
    "aarch64": (
        0xC00000B7, 220,
        (39, 40, 41, 51, 97, 104, 105, 117, 217, 218, 219, 241, 268, 270, 271, 273, 280, 282, 294, 425,
         428, 429, 430, 432, 442),
    ),
}  # fmt: skip
"""machine -> (AUDIT_ARCH, the number of clone, numbers of: ptrace, pivot_root, chroot, mount, umount2, init_module,
kexec_load, add_key, request_key, keyctl, unshare, perf_event_open, setns, process_vm_readv, process_vm_writev,
finit_module, kexec_file_load, bpf, userfaultfd, io_uring_setup, open_tree, move_mount, fsopen, fsmount,
mount_setattr)."""


def _instruction(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)


@functools.cache
def filter_program(machine: str = "") -> bytes:
    """The filter as bubblewrap's --seccomp reads it; empty for a machine whose numbers are not known here."""
    known = MACHINES.get(machine or os.uname().machine)
    if known is None:
        return b""
    architecture, clone, refused = known
    refuse, none, allow = (_instruction(RETURN, value) for value in (ERRNO | EPERM, ERRNO | ENOSYS, ALLOW))
    lines = [_instruction(LOAD, ARCHITECTURE), _instruction(EQUAL, architecture, 1), refuse, _instruction(LOAD, NUMBER)]
    lines += [_instruction(AT_LEAST, X32, 0, 1), refuse, _instruction(EQUAL, CLONE3, 0, 1), none]
    for number in refused:
        lines += [_instruction(EQUAL, number, 0, 1), refuse]
    lines += [_instruction(EQUAL, clone, 1), allow, _instruction(LOAD, FIRST_ARGUMENT)]
    lines += [_instruction(ANY_BIT, NAMESPACES, 0, 1), refuse, allow]
    return b"".join(lines)
