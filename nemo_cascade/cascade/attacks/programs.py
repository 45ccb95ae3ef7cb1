"""Programs that try to win without solving, to break the sandbox, or to take the machine along.

Three tables, one per kind of row of the code domain. `CALLS`: a function `f` is called and its values are compared.
`STREAMS`: a program reads standard input. `ASSERTED`: a function `half` meets a test program (HumanEval). Each source
is what a policy could write; a name is what it tries. What the sandbox forbids is in `forbidden.py`.
"""

from __future__ import annotations

RETURN_0 = "def f(x): return 0\n"
BURN = "while True: pass\n"
C = "import ctypes\nc = ctypes.CDLL(None)\n"

ENDS = {
    "leaves at once with status 0": "import os\nos._exit(0)\n" + RETURN_0,
    "leaves inside the function with status 0": "import sys\ndef f(x): sys.exit(0)\n",
    "interrupts itself": "def f(x): raise KeyboardInterrupt\n",
    "aborts": "import os\ndef f(x): os.abort()\n",
    "kills itself": "import os\ndef f(x): os.kill(os.getpid(), 9)\n",
    "reads the null pointer": "import ctypes\ndef f(x): return ctypes.string_at(0)\n",
    "recurses without end": "def f(x): return f(x)\n",
    "overflows the C stack": (
        "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n"
        "    def __getattr__(self, n): return getattr(self, n + 'a')\n"
        "def f(x): return A().a\n"
    ),
    "replaces itself by another program": (
        "import os\ndef f(x): os.execv('/bin/sh', ['sh', '-c', 'echo [1,2,3,4,5] >&3; exit 0'])\n"
    ),
}
HUNGRY = {
    "fork bomb": "import os\nwhile True: os.fork()\n",
    "fork bomb that survives refusals": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    ),
    "memory bomb": "x = bytearray(1 << 40)\n" + RETURN_0,
    "memory bomb by small steps": "x = []\nwhile True: x.append(bytes(1 << 20))\n",
    "memory bomb that catches MemoryError": (
        "x = []\ntry:\n    while True: x.append(bytes(1 << 20))\nexcept MemoryError: pass\n" + RETURN_0
    ),
    "holds memory in segments that no process has mapped": (
        C + "c.shmat.restype, n = ctypes.c_void_p, 1 << 26\nfor k in range(40):\n"
        "    at = c.shmat(c.shmget(0, n, 0o1600), None, 0)\n    if at in (None, (1 << 64) - 1): break\n"
        "    ctypes.memset(ctypes.c_void_p(at), 1, n); c.shmdt(ctypes.c_void_p(at))\n" + RETURN_0
    ),
    "holds memory in files that no folder has": (
        "import os\ntry:\n    while True: os.write(os.memfd_create('m'), bytes(15 << 20))\nexcept OSError: pass\n"
        "" + RETURN_0
    ),
    "holds memory in shared files": (
        "for d in ('/dev/shm', '/run/given'):\n    try:\n"
        "        for n in range(200): open(f'{d}/{n}', 'wb').write(bytes(15 << 20))\n    except OSError: pass\n"
        "" + RETURN_0
    ),
    "holds memory in the buffers of sockets": (
        "import socket\nkept = []\ntry:\n    while True:\n        kept += (ends := socket.socketpair())\n"
        "        for end in ends:\n            end.setblocking(False); end.setsockopt(1, 7, 1 << 30)\n"
        "            try:\n                while True: end.send(bytes(65536))\n"
        "            except BlockingIOError: pass\nexcept OSError: pass\n" + RETURN_0
    ),
    "holds memory in pages given to pipes": (
        C + "import mmap, os\nclass V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_long)]\n"
        "kept = []\ntry:\n    while True:\n        kept += (ends := os.pipe()); page = mmap.mmap(-1, 1 << 21)\n"
        "        page.madvise(14); page[0] = 1; view = ctypes.c_char.from_buffer(page)\n"
        "        n = c.vmsplice(ends[1], ctypes.byref(V(ctypes.addressof(view), 4096)), 1, 0)\n"
        "        del view; page.close()\n        if n < 0: break\nexcept OSError: pass\n" + RETURN_0
    ),
    "fills the disk with one file": (
        "f_ = open('big', 'wb')\ntry:\n    while True: f_.write(bytes(1 << 20))\nexcept OSError: pass\n" + RETURN_0
    ),
    "fills the disk with many files": (
        "n = 0\ntry:\n    while n < 400:\n        open(str(n), 'wb').write(bytes(1 << 20)); n += 1\n"
        "except OSError: pass\n" + RETURN_0
    ),
    "leaves ten thousand files": "for n in range(10000): open(str(n), 'w').close()\n" + RETURN_0,
    "leaves a tree too deep to remove": (
        "import os\nfor n in range(1500):\n    os.mkdir('d' * 200); os.chdir('d' * 200)\n" + RETURN_0
    ),
    "closes its folder": "import os\nos.chmod('.', 0)\n" + RETURN_0,
    "a zip bomb": (
        "import zlib\nbomb = zlib.compress(bytes(1 << 26))\nx = [zlib.decompress(bomb) for _ in range(64)]\n" + RETURN_0
    ),
    "a regular expression that never ends": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')\n" + RETURN_0,
    "infinite loop": BURN,
    "infinite loop that ignores signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n" + BURN
    ),
    "infinite loop after raising its limits": (
        "import resource\nfor kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):\n"
        "    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)\n"
        "    except (OSError, ValueError): pass\n" + BURN
    ),
    "floods standard output": "while True: print('x' * 4096)\n",
    "floods standard error": "import sys\nwhile True: sys.stderr.write('x' * 4096)\n",
    "floods the result channel": "import os\ndef f(x):\n    while True: os.write(3, b'[' * 65536)\n",
    "returns an endless list": "import itertools\ndef f(x): return itertools.count()\n",
    "returns a number of a million digits": (
        "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return 1 << 3000000\n"
    ),
    "a thread that outlives its program": (
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()\n" + RETURN_0
    ),
    "a process that outlives its program": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "        os.write(3, b'[1,2,3,4,5]')\n    os._exit(0)\n" + RETURN_0
    ),
}
FORGES = {
    "a number equal to everything": (
        "class Any(int):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    __hash__ = int.__hash__\ndef f(x): return Any(7)\n"
    ),
    "a list equal to everything": "class Any(list):\n    def __eq__(self, o): return True\ndef f(x): return Any()\n",
    "an object equal to everything": "class Any:\n    def __eq__(self, o): return True\ndef f(x): return Any()\n",
    "writes the result itself": "import os\ndef f(x):\n    os.write(3, b'[0, 1, 2, 3, 4]')\n    os._exit(0)\n",
    "writes the result when leaving": (
        "import atexit, os\natexit.register(os.write, 3, b'[0, 1, 2, 3, 4]')\n" + RETURN_0
    ),
    "writes to every descriptor": (
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'[0, 1, 2, 3, 4]')\n    except OSError: pass\n"
        "" + RETURN_0
    ),
    "prints a forged verdict": "print('{\"status\": \"ok\", \"reward\": 1.0}\\nall tests passed')\n" + RETURN_0,
    "nests its result a million deep": "import os\ndef f(x):\n    os.write(3, b'[' * 500000)\n    os._exit(0)\n",
    "patches the builtins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.list = lambda v: v\n"
        "builtins.sorted = builtins.map = lambda *a: a[-1]\n" + RETURN_0
    ),
    "patches the marshal module": (
        "import sys, types\nm = types.ModuleType('marshal')\nm.loads = lambda data: [[[0]] * 5]\n"
        "sys.modules['marshal'] = m\n" + RETURN_0
    ),
    "patches the program that calls it": (
        "import __main__\n__main__.to_json = lambda value: '[0, 1, 2, 3, 4]'\n"
        "__main__._call = lambda *a: b'true'\n" + RETURN_0
    ),
    "hooks every import": (
        "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None): raise SystemExit(0)\n"
        "sys.meta_path.insert(0, Hook())\nsys.modules.pop('marshal', None)\n" + RETURN_0
    ),
    "plants sitecustomize": (
        "import os\nfor n in ('sitecustomize', 'usercustomize', 'marshal', 'solution'):\n"
        "    for d in ('.', '/tmp'): open(f'{d}/{n}.py', 'w').write('import os; os._exit(0)')\n"
        "os.environ.update(PYTHONPATH='/tmp', LD_PRELOAD='/tmp/x.so', PYTHONSTARTUP='/tmp/solution.py')\n" + RETURN_0
    ),
}
LOOKS = {
    "reads the tests from the stack": (
        "import sys, marshal\ndef f(x):\n    at, seen = sys._getframe(), []\n    while at:\n"
        "        seen += at.f_locals.values(); at = at.f_back\n"
        "    for v in seen:\n        if isinstance(v, (list, tuple)):\n            for b in v:\n"
        "                if isinstance(b, bytes):\n                    try: seen.append(marshal.loads(b))\n"
        "                    except (ValueError, EOFError, TypeError): pass\n"
        "    flat = [v for v in seen if isinstance(v, list) and len(v) == 5 and all(type(i) is int for i in v)]\n"
        "    return flat[-1][(0, 1, 9, 25, 40).index(x)] if flat else 0\n"
    ),
    "reads the tests with the garbage collector": (
        "import gc\ndef f(x):\n    flat = [v for v in gc.get_objects() if isinstance(v, list) and len(v) == 5\n"
        "            and all(type(i) is int for i in v) and v != [0, 1, 9, 25, 40]]\n"
        "    return flat[-1][(0, 1, 9, 25, 40).index(x)] if flat else 0\n"
    ),
}
KILLS = {
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\n" + RETURN_0,
    "kills every process it sees": "import os\nos.kill(-1, 9)\n" + RETURN_0,
    "answers in its parent's place": (
        "import os, struct\nbody = b'\\0\\0\\0\\2ok' + b'\\0\\0\\0\\1' + b'0' + b'\\0\\0\\0\\3' + b'0.1'\n"
        "for fd in range(3, 64):\n    try: os.write(fd, struct.pack('!I', len(body)) + body)\n"
        "    except OSError: pass\n"
        "os.kill(os.getppid(), 9)\n" + RETURN_0
    ),
}
COMPILED = {
    "an expression nested beyond the parser": "x = " + "(" * 30000 + ")" * 30000 + "\n" + RETURN_0,
    "a chain beyond the compiler": "x = 0" + ".a" * 15000 + "\n" + RETURN_0,
    "a sign repeated beyond the parser": "x = " + "-" * 60000 + "1\n" + RETURN_0,
    "a source of ten megabytes": "# " + "x" * 10_000_000 + "\n" + RETURN_0,
    "null bytes and surrogates in the source": "x = '\0\ud800\udcff'\n" + RETURN_0,
    "a constant too large to fold": "x = 9 ** 9 ** 9 ** 9\n" + RETURN_0,
}
SLOW_CALLS = {
    "sleeps": "import time\ntime.sleep(3600)\n" + RETURN_0,
    "stops its parent": "import os\nos.kill(os.getppid(), 19)\n" + RETURN_0,
}
CALLS = {**ENDS, **HUNGRY, **FORGES, **LOOKS, **KILLS, **COMPILED}

STREAMS = {
    "prints the first answer for every test": "print(7)\n",
    "prints every answer it can think of": "for n in range(100): print(n)\n",
    "prints a forged report": "print('Test 1 passed\\nTest 2 passed\\nOK\\nreward: 1.0')\n",
    "replaces standard output": (
        "import sys\nclass Out:\n    closed = False\n    def write(self, t): return len(t)\n    def flush(self): pass\n"
        "sys.stdout = Out()\nprint(7)\n"
    ),
    "closes standard output": "import os\nos.close(1)\n",
    "writes through the output's back door": "import os\nos.write(1, b'7'); os._exit(0)\n",
    "remembers the last test in a file": (
        "import os\nfor d in ('.', '/tmp', '/dev/shm'):\n    try:\n        n = open(f'{d}/n').read()\n"
        "        print(9); raise SystemExit\n    except OSError: pass\n"
        "    try: open(f'{d}/n', 'w').write('1')\n    except OSError: pass\nprint(7)\n"
    ),
    "reads the answer from standard input's file": (
        "import os\nos.lseek(0, 0, 0)\nprint(os.read(0, 1 << 16)[-4:].decode())\n"
    ),
}
ASSERTED = {
    "leaves before the assertions": "import sys\ndef half(x): sys.exit(0)\n",
    "a value equal to everything": (
        "class Any(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
        "def half(x): return Any(1)\n"
    ),
    "redefines the test": "def half(x): return 1\ndef check(c): pass\n",
    "redefines type, so that its object looks plain": (
        "class Any(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
        "def type(v): return int\ndef half(x): return Any(1)\n"
    ),
    "steals the secret from the stack": (
        "import sys, marshal, os\nat = sys._getframe()\nwhile at:\n    for v in list(at.f_locals.values()):\n"
        "        if isinstance(v, list):\n            for b in v:\n                try: got = marshal.loads(b)\n"
        "                except (ValueError, EOFError, TypeError): continue\n"
        "                if isinstance(got, list) and got and isinstance(got[0], str):\n"
        "                    os.write(3, ('\"' + got[0] + '\"').encode()); os._exit(0)\n"
        "    at = at.f_back\ndef half(x): return 0\n"
    ),
    "steals the secret when called": (
        "import sys, os\ndef half(x):\n    at = sys._getframe()\n    while at:\n"
        "        for v in list(at.f_locals.values()):\n            if isinstance(v, str) and len(v) == 32:\n"
        "                os.write(3, ('\"' + v + '\"').encode()); os._exit(0)\n        at = at.f_back\n    return 0\n"
    ),
    "reads the assertions from the caller's code": (
        "import sys\ndef half(x):\n    at = sys._getframe()\n    while at:\n        code = at.f_code\n"
        "        if code.co_name == 'check':\n            c = [n for n in code.co_consts if isinstance(n, int)]\n"
        "            return c[c.index(x) + 1] if x in c else 0\n        at = at.f_back\n    return 0\n"
    ),
    "finds the assertions with the garbage collector": (
        "import gc\ndef half(x):\n    for v in gc.get_objects():\n        code = getattr(v, '__code__', None)\n"
        "        if code is not None and code.co_name == 'check':\n"
        "            c = [n for n in code.co_consts if isinstance(n, int)]\n"
        "            return c[c.index(x) + 1] if x in c else 0\n    return 0\n"
    ),
    "finds the assertions in the main module": (
        "import sys\ndef half(x):\n    for m in list(sys.modules.values()):\n"
        "        code = getattr(getattr(m, 'check', 0), '__code__', None)\n"
        "        if code:\n            c = [n for n in code.co_consts if isinstance(n, int)]\n"
        "            return c[c.index(x) + 1] if x in c else 0\n    return 0\n"
    ),
    "finds the assertions in its memory": (
        "import ctypes, re\ndef half(x):\n    base = id(object()) & ~0xfffff\n"
        "    text = ctypes.string_at(base, 1 << 19)\n"
        "    found = re.findall(rb'candidate\\((\\d+)\\) == (\\d+)', text)\n"
        "    return int(dict(found).get(str(x).encode(), 0))\n"
    ),
}
