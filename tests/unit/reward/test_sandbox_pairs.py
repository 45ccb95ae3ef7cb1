"""Tests and candidates in processes of their own; what a test leaves behind; files that cannot be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_cascade.reward.sandbox import Limits, Sandbox

FAST = Limits(cpu_seconds=1.0, wall_seconds=30.0, memory_mb=256, output_bytes=4096)
PAIR = """import os, struct
def reply(body): os.write({fd}, struct.pack('!I', len(body)) + body)
def take(): return os.read(0, struct.unpack('!I', os.read(0, 4))[0])
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(spare=1) as opened:
        yield opened



def test_a_candidate_beside_its_tests_never_has_them(sandbox: Sandbox) -> None:
    """The secret of the tests is in no object, frame or descriptor of the process that answers them."""
    spy = PAIR.format(fd=3) + (
        "import gc, sys\nquestion = take()\nseen, at = [question], sys._getframe()\nwhile at:\n"
        "    seen += map(str, at.f_locals.values()); at = at.f_back\n"
        "seen += [str(v) for v in gc.get_objects() if isinstance(v, (list, tuple, dict))]\n"
        "reply(b'found' if ''.join(('sword', 'fish')) in ' '.join(map(str, seen)) else question[::-1])\n"
    )
    tests = PAIR.format(fd=4) + "def go():\n    secret = 'swordfish'\n    reply(b'abc')\n    return take().decode()\n"
    result = sandbox.call_beside(tests, "go", spy, FAST)
    assert (result.status, result.value) == ("ok", "cba")
    gone = sandbox.call_beside(tests, "go", "import os; os._exit(0)", FAST)
    assert gone.status == "nonzero" and gone.value is None
    burnt = sandbox.call_beside(tests, "go", "while True: pass", Limits(cpu_seconds=0.5, wall_seconds=60))
    assert burnt.status == "cpu_time"
    killed = sandbox.call_beside(tests, "go", "import os; os.kill(-1, 9)", FAST)
    assert killed.value is None


def test_nothing_stays_for_the_next_test(sandbox: Sandbox) -> None:
    source = (
        "import os\nplaces = ('.', '/tmp', '/dev/shm')\nprint([os.path.exists(f'{d}/n') for d in places])\n"
        "for d in places:\n    try: open(f'{d}/n', 'w').close()\n    except PermissionError: pass\nos.chmod('.', 0)"
    )
    assert [result.stdout for result in sandbox.run_programs(source, ["", ""], FAST)] == ["[False, False, False]\n"] * 2


def test_files_that_cannot_be_written_are_refused(sandbox: Sandbox) -> None:
    for files in ({"x" * 300: ""}, {"a": "", "a/b": ""}, {"d/" * 2000 + "x": ""}, {"a": "\ud800"}, {"\ud800": ""}):
        with pytest.raises(ValueError):
            sandbox.run(["ls"], files)
    assert sandbox.run(["ls"], {"fine": ""}, limits=FAST).stdout == "fine\n"
