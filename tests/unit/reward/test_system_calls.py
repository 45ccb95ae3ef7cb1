"""The filter of system calls, run by an interpreter of its five instructions: what is refused, and what must not be."""

from __future__ import annotations

import struct

import pytest

from nemo_cascade.reward import bubblewrap
from nemo_cascade.reward import system_calls as calls
from nemo_cascade.reward.sandbox import Limits, Sandbox
from nemo_cascade.types import UserError

REFUSED, MISSING, DONE = (calls.ERRNO | error for error in (calls.EPERM, calls.ENOSYS, calls.DONE))
NO_FAMILY = calls.ERRNO | 97
X86, ARM = 0xC000003E, 0xC00000B7
NEW_USER, SIGCHLD = 0x10000000, 17


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would do with one call."""
    loaded = {calls.ARCHITECTURE: architecture, calls.NUMBER: number}
    for at in range(3):
        loaded[16 + 8 * at] = arguments[at] & 0xFFFFFFFF if at < len(arguments) else 0
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


@pytest.mark.parametrize(
    ("machine", "architecture", "absent", "socket", "setsockopt"),
    [
        ("x86_64", X86, {"shmget": 29, "shmat": 30, "semget": 64, "msgget": 68, "mq_open": 240, "vmsplice": 278,
                         "memfd_create": 319}, 41, 54),
        ("aarch64", ARM, {"shmget": 194, "shmat": 196, "semget": 190, "msgget": 186, "mq_open": 180, "vmsplice": 75,
                          "memfd_create": 279}, 198, 208),
    ],
)  # fmt: skip
def test_memory_outside_processes(
    machine: str, architecture: int, absent: dict[str, int], socket: int, setsockopt: int
) -> None:
    program = calls.filter_program(machine)
    for name, number in {**absent, "memfd_secret": 447}.items():
        assert verdict(program, architecture, number) == MISSING, name
    families = {family: verdict(program, architecture, socket, family) for family in (1, 2, 10, 16, 17, 38, 40)}
    assert families == {**dict.fromkeys((1, 2, 10, 16), calls.ALLOW), **dict.fromkeys((17, 38, 40), NO_FAMILY)}
    for option, expected in ((7, DONE), (8, DONE), (32, DONE), (33, DONE), (60, DONE), (2, calls.ALLOW)):
        assert verdict(program, architecture, setsockopt, 3, 1, option) == expected, option
        assert verdict(program, architecture, setsockopt, 3, 6, option) == calls.ALLOW, option  # of TCP


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


HELD = """import ctypes, os, socket
c = ctypes.CDLL(None, use_errno=True)
c.shmat.restype = ctypes.c_void_p
held, files = 0, []
for n in range(6):
    segment = c.shmget(0, 1 << 24, 0o1600)
    at = c.shmat(segment, None, 0)
    if segment < 0 or at in (None, (1 << 64) - 1): break
    c.memset(ctypes.c_void_p(at), 1, 1 << 24); c.shmdt(ctypes.c_void_p(at)); held += 16
print('segments', held)
try:
    for n in range(6):
        files.append(os.memfd_create('m')); os.write(files[-1], bytes(15 << 20))
except OSError: pass
print('files', 15 * len(files))
print('found', c.shmget(5, 0, 0) >= 0, c.shmget(5, 4096, 0o1600) >= 0)
ends = socket.socketpair()
ends[0].setblocking(False); ends[0].setsockopt(1, 7, 1 << 30)
sent = 0
try:
    while True: sent += ends[0].send(bytes(65536))
except BlockingIOError: pass
print('socket', sent < 1 << 20)
written = 0
try:
    for n in range(8):
        with open(f'/dev/shm/{n}', 'wb') as file: written += file.write(bytes(15 << 20))
except OSError: pass
print('shared', written < 80 << 20)
try: open('/dev/x', 'w')
except OSError: print('devices are closed')
written = 0
try:
    for n in range(32):
        with open(f'/run/given/{n}', 'wb') as file: written += file.write(bytes(15 << 20))
except OSError: pass
print('given', written < 270 << 20, os.fstat(0).st_size)
"""
BOUNDED = (
    "segments 0\nfiles 0\nfound False False\nsocket True\nshared True\ndevices are closed\ngiven True 2\n"
)


def test_no_memory_is_held_outside_the_limit_and_none_waits_for_the_next_test() -> None:
    with Sandbox(spare=0) as sandbox:
        results = sandbox.run_programs(HELD, ["ab", "ab"], Limits(cpu_seconds=10, memory_mb=256))
    for result in results:
        assert (result.status, result.stdout) == ("ok", BOUNDED), result.stderr


HONEST = """import ctypes, mmap, multiprocessing, os, socket, sys, tempfile
from multiprocessing import shared_memory
def work(lock, counter, queue, done):
    for _ in range(50):
        with lock: counter.value += 1
    queue.put(os.getpid()); done.wait(10)
given = os.read(0, os.fstat(0).st_size); os.lseek(0, 1, 0)
print(given, sys.stdin.read())
lock, counter, queue = multiprocessing.Lock(), multiprocessing.Value('i', 0, lock=False), multiprocessing.Queue()
done = multiprocessing.Event()
workers = [multiprocessing.Process(target=work, args=(lock, counter, queue, done)) for _ in range(3)]
for worker in workers: worker.start()
print(len({queue.get() for _ in workers}), counter.value); done.set()
for worker in workers: worker.join()
with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, -2]))
block = shared_memory.SharedMemory(create=True, size=1 << 20); block.buf[:3] = b'abc'
again = shared_memory.SharedMemory(block.name); print(bytes(again.buf[:3]))
again.close(); block.close(); block.unlink()
print(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x + 1)(4))
with tempfile.TemporaryFile() as file: file.write(b'x' * 9000); file.flush(); print(len(mmap.mmap(file.fileno(), 0)))
server = socket.create_server(('127.0.0.1', 0)); server.setsockopt(1, 8, 1 << 16)
caller = socket.create_connection(server.getsockname()); accepted, _ = server.accept()
caller.sendall(b'hello'); print(accepted.recv(5))
"""


def test_honest_programs_still_share_memory_and_locks() -> None:
    with Sandbox(spare=0) as sandbox:
        results = sandbox.run_programs(HONEST, ["xyz", "xyz"], Limits(cpu_seconds=10))
    expected = "b'xyz' yz\n3 150\n[1, 2]\nb'abc'\n5\n9000\nb'hello'\n"
    for result in results:
        assert (result.status, result.stdout) == ("ok", expected), result.stderr


def test_what_fills_the_folder_of_standard_input_makes_room() -> None:
    fill = (
        "import os\nos.makedirs('/run/given/a/b'); n = 0\ntry:\n    while n < 32:\n"
        "        open(f'/run/given/a/b/{n}', 'wb').write(bytes(15 << 20)); n += 1\n"
        "except OSError: print('full')\nos.chmod('/run/given/a', 0)\n"
    )
    with Sandbox(spare=0, scratch_mb=64) as sandbox, sandbox.session() as session:
        assert session.run(["python", "-c", fill], limits=Limits(cpu_seconds=10)).stdout == "full\n"
        given = "x" * (1 << 20)
        assert session.run(["wc", "-c"], stdin=given).stdout == "1048576\n"
        beyond = session.run(["wc", "-c"], stdin="x" * ((64 << 20) + 1))
        assert (beyond.status, beyond.stderr) == ("wall_time", "standard input of 67108865 bytes is too large")
        assert session.alive


def fresh_start(monkeypatch: pytest.MonkeyPatch, program: bytes) -> str:
    """The first use of sandboxes in a process, with this filter."""
    monkeypatch.setattr(calls, "filter_program", lambda: program)
    bubblewrap.launch_mode.cache_clear()
    try:
        return bubblewrap.launch_mode()
    finally:
        bubblewrap.launch_mode.cache_clear()


def test_a_kernel_that_refuses_the_filter_is_not_called_one_without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = struct.pack("=HBBI", 0xFFFF, 0, 0, 0)  # no such instruction: the kernel answers EINVAL
    with pytest.raises(UserError, match="refuses the sandbox's filter of system calls.*CONFIG_SECCOMP") as raised:
        fresh_start(monkeypatch, broken)
    assert "userns" not in str(raised.value)


def test_a_machine_without_a_filter_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_start(monkeypatch, calls.filter_program())
    assert caplog.messages == []
    fresh_start(monkeypatch, b"")
    (warned,) = caplog.messages
    assert warned.startswith("no filter of system calls is known for ")
