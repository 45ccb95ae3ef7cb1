"""What the sandbox must not let a program do, each attempt worth the full reward if it succeeds.

The host holds the right program where no sandboxed one may reach: behind a listener, in files, in the environment of
another process, in shared memory. An attempt that gets hold of it, or that succeeds at something else which is
forbidden, runs it and is paid: so a hole in the sandbox is a breach, and not a wrong answer like any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from nemo_cascade.reward import bubblewrap
from nemo_cascade.types import Outcome

MARK = "# the right program, which is kept where no sandboxed program may reach\n"
FOLDERS = (tempfile.gettempdir(), "/dev/shm", "/var/tmp")
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
SEIZE = 0x4206
IPC_CREAT, IPC_RMID, READ_ONLY = 0o1000, 0, 0o10000

C = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
VECTOR = (
    "buf = ctypes.create_string_buffer(16)\n"
    "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
    "here, there = V(ctypes.addressof(buf), 16), V(id(None), 16)\n"
)
ATTEMPTS = {
    "asks the network": (
        "import socket\ndef loot(): return socket.create_connection(('127.0.0.1', PORT), 5).makefile().read()\n"
    ),
    "asks the network by a name without a file": (
        "import socket\ndef loot():\n    s = socket.socket(socket.AF_UNIX); s.connect('\\0NAME')\n"
        "    return s.makefile().read()\n"
    ),
    "reads a file of the host": (
        "def loot():\n    for place in PLACES:\n        try: return open(place).read()\n"
        "        except OSError: pass\n    return ''\n"
    ),
    "reads a file of the host through a link": (
        "import os\ndef loot():\n    for n, place in enumerate(PLACES):\n        os.symlink(place, f'link{n}')\n"
        "        try: return open(f'link{n}').read()\n        except OSError: pass\n    return ''\n"
    ),
    "reads the tests from disk": (
        "import os\ndef loot():\n    for top in ('/tmp', '/run', '/dev/shm', '/etc', '/root', '/home', '/var'):\n"
        "        for d, inner, names in os.walk(top):\n            inner[:] = [n for n in inner if n[0] != '.']\n"
        "            for n in names:\n"
        "                try: text = open(d + '/' + n, errors='replace').read(1 << 16)\n"
        "                except OSError: continue\n"
        "                if text.startswith(MARK): return text\n    return ''\n"
    ),
    "reads the environment of a process of the host": (
        "import os\ndef loot():\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try: text = open(f'/proc/{pid}/environ', errors='replace').read()\n"
        "        except OSError: continue\n"
        "        if MARK in text: return text[text.index(MARK):].partition('\\0')[0]\n    return ''\n"
    ),
    "reads its parent's memory": (
        "import os\ndef loot():\n    memory = open(f'/proc/{os.getppid()}/mem', 'rb', 0)\n    memory.seek(id(None))\n"
        "    return GOLD if len(memory.read(16)) == 16 else ''\n"
    ),
    "copies its parent's memory": (
        C + VECTOR + "def loot():\n"
        "    n = c.process_vm_readv(os.getppid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)\n"
        "    return GOLD if n == 16 else ''\n"
    ),
    "traces its parent": (
        C + f"def loot(): return GOLD if any(c.ptrace({SEIZE}, p, 0, 0) == 0 for p in (1, 2, os.getppid())) else ''\n"
    ),
    "attaches to memory that the host shares": (
        C + "c.shmat.restype = ctypes.c_void_p\n"
        f"def loot():\n    at = c.shmat(c.shmget(KEY, 0, 0), None, {READ_ONLY})\n"
        "    return ctypes.string_at(at).decode() if at not in (None, (1 << 64) - 1) else ''\n"
    ),
    "makes a segment of memory that outlives it": (
        C + f"def loot(): return GOLD if c.shmget(0, 4096, {IPC_CREAT | 0o600}) >= 0 else ''\n"
    ),
    "makes a file in memory without a size": (
        "import os\ndef loot(): return GOLD if os.memfd_create('m') >= 0 else ''\n"
    ),
    "fills the folder of devices": (
        "import os\ndef loot():\n    for d in ('/dev', '/dev/pts'):\n        try: open(f'{d}/x', 'w').close()\n"
        "        except OSError: continue\n        return GOLD\n    return ''\n"
    ),
    "enlarges the buffers of a socket": (
        "import socket\nend, other = socket.socketpair()\nbefore = end.getsockopt(1, 7)\n"
        "def loot():\n    end.setsockopt(1, 7, 1 << 30)\n    return GOLD if end.getsockopt(1, 7) > before else ''\n"
    ),
    "talks to the host of a virtual machine": (
        "import socket\ndef loot():\n    socket.socket(40, socket.SOCK_STREAM)\n    return GOLD\n"
    ),
    "becomes root": (
        "import os\nbefore = os.getuid(), os.geteuid()\ndef loot():\n    for call in (os.setgid, os.setuid):\n"
        "        try: call(0)\n        except OSError: pass\n"
        "    return GOLD if 0 in (os.getuid(), os.geteuid()) and 0 not in before else ''\n"
    ),
    "makes a user namespace": C + f"def loot(): return GOLD if c.unshare({NEW_USER}) == 0 else ''\n",
    "makes a user namespace for a child": (
        C + f"def loot():\n    pid = c.syscall(CLONE, {NEW_USER} | 17, 0, 0, 0, 0)\n    if pid == 0: os._exit(0)\n"
        "    return GOLD if pid > 0 else ''\n"
    ),
    "mounts a file system without a size": (
        C + f"c.unshare({NEW_USER | NEW_MOUNTS})\n"
        "def loot(): return GOLD if c.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0 else ''\n"
    ),
    "changes the root folder": C + "def loot(): return GOLD if c.chroot(b'/tmp') == 0 else ''\n",
    "writes outside its folders": (
        "import os, sys\ndef loot():\n"
        "    for d in ('/', '/usr', '/etc', '/run', '/run/server', sys.base_prefix, *map(os.path.dirname, PLACES)):\n"
        "        if d == '/dev/shm': continue\n"
        "        try: open(f'{d}/written', 'w').close()\n        except OSError: continue\n"
        "        os.unlink(f'{d}/written')\n        return GOLD\n    return ''\n"
    ),
    "ends a process of the host": "import os\ndef loot():\n    os.kill(KEEPER, 9)\n    return GOLD\n",
}
"""Programs that define `loot`: the text of the right program when the attempt succeeded. `Host.filled` explains the
words in capitals.
"""
RUN = (
    "{attempt}try: found = loot()\nexcept (OSError, ValueError, AttributeError, TypeError): found = ''\n"
    "def f(x): return 0\nexec(found)\n"
)
CLONE_NUMBERS = {"x86_64": 56, "aarch64": 220}


class Host(contextlib.ExitStack):
    """The right program in every place that a sandboxed one must not reach, as long as this is open."""

    def __init__(self, right: str) -> None:
        super().__init__()
        self.right, self.loot = right, MARK + right
        self.name = f"nemo-cascade-audit-{secrets.token_hex(8)}"
        self.words: dict[str, object] = {"MARK": MARK, "GOLD": right}

    def __enter__(self) -> Host:
        inet, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
        unix.bind(f"\0{self.name}")
        unix.listen()
        for listener in (inet, unix):
            self.callback(listener.close)
            self.callback(listener.shutdown, socket.SHUT_RDWR)
            threading.Thread(target=self._give, args=(listener,), daemon=True).start()
        self.words |= {"PORT": inet.getsockname()[1], "CLONE": CLONE_NUMBERS.get(os.uname().machine, -1)}
        places = [self._written(Path(folder)) for folder in FOLDERS if os.access(folder, os.W_OK)]
        self.words |= {"PLACES": places, "KEY": self._shared()}
        uid = bubblewrap.sandbox_uid()
        other = {"user": uid, "group": uid, "extra_groups": []} if os.getuid() == 0 else {}
        keeper = subprocess.Popen(["/bin/sleep", "600"], env={"LOOT": self.loot}, **other)  # type: ignore[call-overload]
        self.callback(keeper.wait)
        self.callback(keeper.kill)
        self.words["KEEPER"] = keeper.pid
        return self

    def _give(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = listener.accept()
                with caller:
                    caller.sendall(self.loot.encode())

    def _written(self, parent: Path) -> str:
        """A file that everybody may read."""
        folder = parent / self.name
        folder.mkdir(mode=0o755)
        self.callback(shutil.rmtree, folder)
        (folder / "outputs.py").write_text(self.loot, encoding="utf-8")
        (folder / "outputs.py").chmod(0o644)
        return str(folder / "outputs.py")

    def _shared(self) -> int:
        """The key of a shared-memory segment that everybody may read."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        key, content = secrets.randbelow(1 << 30) + 1, self.loot.encode() + b"\0"
        segment = libc.shmget(key, len(content), IPC_CREAT | 0o644)
        if segment < 0:
            return key  # a machine without shared memory: nothing to reach
        self.callback(libc.shmctl, segment, IPC_RMID, None)
        at = libc.shmat(segment, None, 0)
        ctypes.memmove(at, content, len(content))
        libc.shmdt(ctypes.c_void_p(at))
        return key

    def filled(self, attempt: str) -> str:
        """An attempt as a program for this host: MARK, GOLD (the right program), PORT, NAME, PLACES, KEY, KEEPER (a
        process), CLONE (a system call's number).
        """
        for word, value in self.words.items():
            attempt = attempt.replace(word, repr(value))
        return RUN.replace("{attempt}", attempt.replace("NAME", self.name))


def attempted(attempt: str, right: str, score: Callable[[str], Outcome]) -> Outcome:
    """The verdict on one attempt; `right` is a program that earns the reward."""
    with Host(right) as host:
        return score(host.filled(attempt))
