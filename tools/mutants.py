"""Wrong programs that look right: one seeded change to a correct one, as a slip of the pen makes it.

A comparison, an operator, a condition, a constant or a returned value is changed; nothing is wrapped or renamed.
`differs` asks a process of its own, apart from our sandbox and verdicts, whether the tests notice: a change that they
do not notice says nothing about a verifier.
"""

from __future__ import annotations

import ast
import copy
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
"""
KINDS = ("comparison", "operator", "constant", "condition", "logic", "returned value")


def mutants(source: str, entry: str, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(kind, source) of every single change to the function `entry` and to those beside it, in a seeded order; changes
    of a returned value to None, the crudest, come last.
    """
    tree = ast.parse(source)
    places = [(kind, index) for index, node in enumerate(ast.walk(tree)) for kind in _kinds(node)]
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = list(ast.walk(tree))
    places = [(kind, index) for kind, index in places if id(nodes[index]) not in docstrings]
    random.Random(f"{entry}/{seed}").shuffle(places)
    places.sort(key=lambda place: place[0] == "returned value")
    for kind, index in places:
        changed = copy.deepcopy(tree)
        CHANGES[kind](list(ast.walk(changed))[index])
        yield kind, ast.unparse(ast.fix_missing_locations(changed))


def _kinds(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Compare):
        return ["comparison"] if type(node.ops[0]) in COMPARISONS else []
    if isinstance(node, ast.BinOp):
        return ["operator"] if type(node.op) in OPERATORS else []
    if isinstance(node, ast.Constant):
        return ["constant"] if isinstance(node.value, (bool, int, float, str)) else []
    if isinstance(node, ast.BoolOp):
        return ["logic"]
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return ["condition"]
    return ["returned value"] if isinstance(node, ast.Return) and node.value is not None else []


def _constant(node: ast.AST) -> None:
    assert isinstance(node, ast.Constant)
    value = node.value
    node.value = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else value + 1


def _compared(node: ast.AST) -> None:
    assert isinstance(node, ast.Compare)
    node.ops[0] = COMPARISONS[type(node.ops[0])]()


def _operated(node: ast.AST) -> None:
    assert isinstance(node, ast.BinOp)
    node.op = OPERATORS[type(node.op)]()


def _negated(node: ast.AST) -> None:
    assert isinstance(node, (ast.If, ast.While, ast.IfExp))
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _joined(node: ast.AST) -> None:
    assert isinstance(node, ast.BoolOp)
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()


def _returned(node: ast.AST) -> None:
    assert isinstance(node, ast.Return)
    node.value = ast.Constant(None)


CHANGES: dict[str, Callable[[ast.AST], None]] = dict(
    zip(KINDS, (_compared, _operated, _constant, _negated, _joined, _returned), strict=True)
)


def differs(source: str, tests: str, entry: str) -> bool:
    """Whether HumanEval's own test program fails on this source, run directly in a bare interpreter: it raises, or does
    not end. Only for sources that we made: nothing isolates them.
    """
    program = f"{LIMITS}\n{source}\n{tests}\ncheck({entry})\nprint('noticed nothing')\n"
    command = [sys.executable, "-I", "-S", "-"]
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False, timeout=300)
    return not (done.returncode == 0 and done.stdout.endswith("noticed nothing\n"))


def noticed_mutant(source: str, tests: str, entry: str, seed: int = 0) -> tuple[str, str, int]:
    """(kind, source, how many changes were tried before that the tests do not notice) of the first that they notice."""
    for tried, (kind, changed) in enumerate(mutants(source, entry, seed)):
        if differs(changed, tests, entry):
            return kind, changed, tried
    raise ValueError(f"{entry}: its tests notice no single change")
