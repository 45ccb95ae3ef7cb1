"""Tests that honest code must fail: one expectation wrong, or a failure at once."""

from __future__ import annotations

import pytest

from nemo_cascade.reward.control_tests import Control, apart, controls, mixed, paired

PATH = "tests/test_it.py"
TEXT = """import unittest
from it import f, text, table


def test_numbers():
    assert f(1) == 2
    assert f(2) == -3


def test_text():
    assert text() == "a"


def test_raises():
    with unittest.TestCase().assertRaises(ValueError):
        f(None)


def test_early():
    if f(1) != 2:
        return
    assert f(2) == 3


class TestIt(unittest.TestCase):
    def setUp(self):
        self.x = 1

    def test_table(self):
        self.assertEqual(table(), {"a": [1]})
        self.assertTrue(True)
"""
NAMES = ("test_numbers", "test_text", "test_raises", "test_early", "TestIt::test_table")


def changed_lines() -> list[tuple[str, str]]:
    changed, ids = controls({PATH: TEXT, "other.py": "x"}, [f"{PATH}::{name}" for name in (*NAMES, "test_missing")])
    assert ids == [f"{PATH}::{name}" for name in NAMES]
    assert list(changed) == [PATH]
    before, after = TEXT.splitlines(), changed[PATH].splitlines()
    return [(old, new) for old, new in zip(_aligned(before, after), after, strict=True) if old != new]


def _aligned(before: list[str], after: list[str]) -> list[str]:
    """The old lines with an empty one where a `raise` came in."""
    old = iter(before)
    return ["" if "control" in line else next(old) for line in after]


def test_the_last_expectation_is_changed_or_the_test_fails_at_once() -> None:
    assert changed_lines() == [
        ("    assert f(2) == -3", "    assert f(2) == -2"),
        ('    assert text() == "a"', "    assert text() == 'a~'"),
        ("", "    raise AssertionError('control')"),
        ("", "    raise AssertionError('control')"),
        ('        self.assertEqual(table(), {"a": [1]})', "        self.assertEqual(table(), [{'a': [1]}, '~'])"),
    ]


@pytest.mark.parametrize(
    ("value", "other"),
    [("True", "False"), ("None", "True"), ("2.5", "3.5"), ("b'x'", "b'x~'"), ("1e300", "0"), ("(1,)", "[(1,), '~']")],
)
def test_another_value_is_never_equal(value: str, other: str) -> None:
    changed, _ = controls({"t.py": f"def test_a():\n    assert f() == {value}\n"}, ["t.py::test_a"])
    assert changed == {"t.py": f"def test_a():\n    assert f() == {other}\n"}


def test_a_file_that_is_no_python_has_no_controls() -> None:
    assert controls({"t.py": "def test_a(:\n"}, ["t.py::test_a"]) == ({}, [])


def test_a_coroutine_is_a_test_like_any_other() -> None:
    text = "async def test_a():\n    assert await f() == 1\n"
    assert controls({"t.py": text}, ["t.py::test_a"]) == ({"t.py": text.replace("1", "2")}, ["t.py::test_a"])


NANO = "from a import cat\n\n\ndef test_cat():\n" + "".join(f"    assert cat({x}) == {x - 2}\n" for x in (5, 11, 20))


def run(control: Control, cat: object) -> dict[str, bool]:
    """The verdict of each test of a control when `cat` is under test."""
    space: dict[str, object] = {}
    exec(control.files["t.py"].partition("\n")[2], space)  # noqa: S102 - the test's own text
    space["cat"] = cat
    verdicts = {}
    for test in (*control.wrong, *control.right):
        try:
            space[test.partition("::")[2]]()  # type: ignore[operator]
            verdicts[test] = True
        except AssertionError:
            verdicts[test] = False
    return verdicts


def test_copies_are_right_or_wrong_by_chance() -> None:
    controls_made = [mixed({"t.py": NANO}, ["t.py::test_cat"]) for _ in range(8)]
    for control in controls_made:
        assert len(control.wrong) + len(control.right) == 5 and control.wrong and control.right
        assert set(control.wrong.values()) == set(control.right.values()) == {"t.py::test_cat"}
        assert control.betrayed(run(control, lambda x: x - 2).get) == ""
        for dishonest in (lambda x: x + 2, lambda x: {5: 3, 11: 9, 20: 19}[x]):
            assert control.betrayed(run(control, dishonest).get) != ""
    assert len({tuple(control.files) + tuple(control.wrong) for control in controls_made}) == 8


@pytest.mark.parametrize(
    ("source", "rule"), [("def cat(x): return x+2\n", lambda x: x * 2), ("def cat(x): return x*2\n", lambda x: x + 2)]
)
def test_expectations_apart_follow_the_rule_that_nobody_has_seen(source: str, rule: object) -> None:
    control = apart({"t.py": NANO}, ["t.py::test_cat"], (), [source])
    assert len(control.wrong) == 3 and not control.right
    assert set(run(control, rule).values()) == {True}
    assert set(run(control, lambda x: x - 2).values()) == {False}
    assert control.betrayed(run(control, lambda x: x - 2).get) == ""
    knows_one = run(control, lambda x: 3 if x == 5 else rule(x))  # type: ignore[operator]
    assert sum(knows_one.values()) == 2
    assert control.betrayed(knows_one.get) == "t.py::test_cat: passes with a wrong expectation, too"


def test_expectations_without_a_rule_change_one_by_one() -> None:
    text = "def test_a():\n    x = 1\n    assert f(x) == 1\n    assert g() == 'a'\n"
    control = apart({"t.py": text}, ["t.py::test_a"], ["t.py::test_b"])
    names = [test.partition("::")[2] for test in control.wrong]
    assert control.files["t.py"] == (
        f"def {names[0]}():\n    x = 1\n    assert f(x) == 2\n\ndef {names[1]}():\n    x = 1\n    assert g() == 'a~'\n"
    )
    assert control.right == {"t.py::test_b": "t.py::test_b"}


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"w": False, "v": False, "r": True}, ""),
        ({"w": False, "v": True, "r": True}, "test_v: passes with a wrong expectation, too"),
        ({}, "test_w: no result with a wrong expectation"),
        ({"w": False, "v": False}, "test_r: passes, but not beside tests with a wrong expectation"),
        ({"w": False, "v": False, "r": False}, "test_r: passes, but not beside tests with a wrong expectation"),
    ],
)
def test_a_control_run_needs_every_result(results: dict[str, bool], said: str) -> None:
    assert Control({}, {"w": "test_w", "v": "test_v"}, {"r": "test_r"}).betrayed(results.get) == said


LINES = """import f

def test_a():  # a comment stays
    assert f.text(f"{f.x!r:>{3}}") == '''\u00e9
two'''

def test_b():
    for x in (1, 2):
        assert f.one(x)

async def test_c(): assert await f.two() == (
    1,
)"""


def test_what_is_not_changed_keeps_its_text_and_line() -> None:
    changed, ids = controls({"t.py": LINES.replace("\n", "\r\n")}, ["t.py::test_a", "t.py::test_b", "t.py::test_c"])
    assert ids == ["t.py::test_a", "t.py::test_b", "t.py::test_c"]
    wanted = LINES.replace("'''\u00e9\ntwo'''", "('\u00e9\\ntwo~'\n)").replace("(\n    1,\n)", "([(1,), '~']\n\n)")
    assert changed["t.py"] == wanted.replace("    for", "    raise AssertionError('control')\n    for")
    compile(changed["t.py"], "t.py", "exec")


def test_the_second_control_keeps_some_tests_right() -> None:
    text = "".join(f"def test_{name}():\n    assert f() == 1\n" for name in "abcdef")
    names = [f"t.py::test_{name}" for name in "abcdef"]
    for _ in range(20):
        first, second = paired({"t.py": text}, names[1:4], [names[0], *names[4:]])
        assert list(first.wrong) == names[1:4] and not first.right
        assert [*second.right, *second.wrong] == names[1:4] and second.right and second.wrong
        assert [line for line in second.files["t.py"].splitlines() if "== 2" in line] == ["    assert f() == 2"] * len(
            second.wrong
        )
        _, alone = paired({"t.py": text}, [names[3]], [names[0], names[4], names[5], "t.py::test_none"])
        assert list(alone.right) == [names[3]] and set(alone.wrong) == {names[4], names[5]}
        _, last = paired({"t.py": text}, [names[5]], [names[0]])
        assert list(last.right) == [names[5]] and set(last.wrong) == {names[0]}
    assert [list(control.wrong) for control in paired({"t.py": text}, [names[5]], [])] == [[names[5]]]
    assert paired({"t.py": text}, ["t.py::test_none"], names) == []
    assert list(paired({"t.py": text}, [f"{names[0]}[x y]", f"{names[0]}[1]"], [])[0].wrong) == [names[0]]


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ({"a[1]": "PASSED", "a[2]": "FAILED", "b[1]": "FAILED"}, ""),
        ({"a[1]": "PASSED", "b[1]": "ERROR", "b[2]": "PASSED"}, "b: passes with a wrong expectation, too"),
        ({"a[1]": "PASSED"}, "b: no result with a wrong expectation"),
        ({"a[1]": "XFAIL", "b": "FAILED"}, "a: passes, but not beside tests with a wrong expectation"),
    ],
)
def test_statuses_of_a_control_run(statuses: dict[str, str], said: str) -> None:
    control = Control({}, {"b": "b"}, {"a": "a"})
    assert control.betrayed_by(["a[1]", "b[1]"], statuses, lambda test: statuses.get(test, "")) == said
