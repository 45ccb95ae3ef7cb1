"""Tests that cannot pass, to find code that passes tests without doing what they ask.

Repository tests share their process with the code they test, which can therefore forge their report, return an object
equal to everything, or read the expected value and return it. Whatever it does, it does to any test: so code that
passed is run once more, in another sandbox, against tests of which one expectation is wrong. Honest code fails each of
them; a cheat passes again, unless it knows which values are right, which is what the tests ask for.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping, Sequence

from nemo_cascade.types import Json

FIXTURES = ("setUp", "tearDown", "setup_method", "teardown_method")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def controls(tests: Mapping[str, str], wanted: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the test files changed so that every wanted test must fail, the ids of the tests that were changed).

    Of a test's expectations `value == literal` the last one is changed, because the first is often known from the
    request; a test without one fails at its start. Files that do not parse, or that Python cannot write again (sums of
    a thousand terms, integers of thousands of digits), are left out.
    """
    changed: dict[str, str] = {}
    ids: list[str] = []
    for path, text in tests.items():
        names = {test.partition("::")[2]: test for test in wanted if test.partition("::")[0] == path}
        if not names:
            continue
        try:
            changed[path], broken = _changed(text, names)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        ids += [names[name] for name in broken]
    return changed, ids


def _changed(text: str, names: Container[str]) -> tuple[str, list[str]]:
    """(a test file in which the tests of these names fail, those of the names that it has)."""
    tree = ast.parse(text)
    found = [(name, function) for name, function in _functions(tree) if name in names]
    for _, function in found:
        _break(function)
    return ast.unparse(tree) + "\n", [name for name, _ in found]


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """`name` or `Class::name` of every plain test function."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function) and inner.name not in FIXTURES:
                    yield f"{node.name}::{inner.name}", inner


def _break(function: Function) -> None:
    """Change the last expectation that every honest run reaches, or let the test fail at once."""
    ways_out = (ast.Return, ast.Yield, ast.YieldFrom, ast.Global)
    straight = not any(isinstance(node, ways_out) for node in ast.walk(function))
    for statement in reversed(function.body if straight else []):
        place = _expected(statement)
        if place is not None:
            holder, index = place
            holder[index] = _another(ast.literal_eval(holder[index]))
            ast.fix_missing_locations(function)
            return
    function.body.insert(0, ast.parse("raise AssertionError('control')").body[0])


def _expected(statement: ast.stmt) -> tuple[list[ast.expr], int] | None:
    """Where the literal of `assert value == literal` or `self.assertEqual(value, literal)` stands; None for others."""
    if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
        compare = statement.test
        if len(compare.ops) == 1 and isinstance(compare.ops[0], ast.Eq) and _is_literal(compare.comparators[0]):
            return compare.comparators, 0
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        named = isinstance(call.func, ast.Attribute) and call.func.attr == "assertEqual"
        if named and len(call.args) == 2 and _is_literal(call.args[1]):
            return call.args, 1
    return None


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _another(value: Json) -> ast.expr:
    """A literal that is not equal to `value`, of the same type where that is simple."""
    if isinstance(value, bool) or value is None:
        other: object = not value
    elif isinstance(value, int | float):
        other = value + 1 if abs(value) < 1 << 50 else 0
    elif isinstance(value, str | bytes):
        other = value + (b"~" if isinstance(value, bytes) else "~")
    else:
        other = [value, "~"]
    return ast.parse(repr(other), mode="eval").body
