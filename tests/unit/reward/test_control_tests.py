"""Tests that honest code must fail: one expectation wrong, or a failure at once."""

from __future__ import annotations

import ast

import pytest

from nemo_cascade.reward.control_tests import controls

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
    before, after = ast.unparse(ast.parse(TEXT)).splitlines(), changed[PATH].splitlines()
    return [(old, new) for old, new in zip(_aligned(before, after), after, strict=True) if old != new]


def _aligned(before: list[str], after: list[str]) -> list[str]:
    """The old lines with an empty one where a `raise` came in."""
    old = iter(before)
    return ["" if "control" in line else next(old) for line in after]


def test_the_last_expectation_is_changed_or_the_test_fails_at_once() -> None:
    assert changed_lines() == [
        ("    assert f(2) == -3", "    assert f(2) == -2"),
        ("    assert text() == 'a'", "    assert text() == 'a~'"),
        ("", "    raise AssertionError('control')"),
        ("", "    raise AssertionError('control')"),
        ("        self.assertEqual(table(), {'a': [1]})", "        self.assertEqual(table(), [{'a': [1]}, '~'])"),
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
