"""Small broken repositories: one or two Python files, one wrong operator, and the tests that show it.

Both software domains draw from here. Tests and repair follow from what the request shows, so no request can be in two
splits with different hidden tests. The request shows one value that the repaired function must return; hidden tests ask
for two more, so that returning the shown value passes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_cascade.data.nano_words import ANIMALS, THINGS
from nemo_cascade.types import Json

OPERATORS = "+-*"
HIDDEN_INPUTS = (11, 20)


@dataclass(frozen=True)
class Function:
    """`def name(x): return x<operator><constant>`, and the operator it should have."""

    name: str
    operator: str
    constant: int
    right: str

    @property
    def line(self) -> str:
        """As it stands in the repository."""
        return f"def {self.name}(x): return x{self.operator}{self.constant}"

    @property
    def repaired(self) -> str:
        """As it should be."""
        return f"def {self.name}(x): return x{self.right}{self.constant}"

    def value(self, x: int) -> int:
        """What the repaired function returns."""
        return {"+": x + self.constant, "-": x - self.constant, "*": x * self.constant}[self.right]


@dataclass(frozen=True)
class NanoRepository:
    """Functions by file; exactly one is broken. `shown` is the input whose value the request states."""

    modules: tuple[tuple[str, tuple[Function, ...]], ...]
    shown: int

    @property
    def broken(self) -> tuple[str, Function]:
        """The file and the function with the wrong operator."""
        return next((path, f) for path, functions in self.modules for f in functions if f.operator != f.right)

    @property
    def issue(self) -> str:
        """What should hold and does not: `cat(5)==3`."""
        _, function = self.broken
        return f"{function.name}({self.shown})=={function.value(self.shown)}"

    @property
    def files(self) -> dict[str, str]:
        """The source files, with the bug."""
        return {path: "".join(f"{f.line}\n" for f in functions) for path, functions in self.modules}

    @property
    def tests(self) -> dict[str, str]:
        """One test file per source file, one test per function."""
        texts: dict[str, str] = {}
        for path, functions in self.modules:
            text = f"from {path[:-3]} import {', '.join(f.name for f in functions)}\n"
            for function in functions:
                text += f"\n\ndef test_{function.name}():\n"
                inputs = (self.shown, *HIDDEN_INPUTS) if function == self.broken[1] else HIDDEN_INPUTS
                text += "".join(f"    assert {function.name}({x}) == {function.value(x)}\n" for x in inputs)
            texts[f"test_{path}"] = text
        return texts

    def truth(self) -> dict[str, Json]:
        """The verifier's fields, named as in released rows where they have the same meaning."""
        path, broken = self.broken
        names = [(f"test_{p}::test_{f.name}", f == broken) for p, functions in self.modules for f in functions]
        return {
            "files": dict(self.files),
            "tests": dict(self.tests),
            "FAIL_TO_PASS": [name for name, is_broken in names if is_broken],
            "PASS_TO_PASS": [name for name, is_broken in names if not is_broken],
            "path": path,
            "before": broken.line,
            "after": broken.repaired,
            "check": f"{self.shown}{broken.right}{broken.constant}={broken.value(self.shown)}",
        }


def make_repository(
    rng: random.Random, shapes: tuple[tuple[int, ...], ...], issue: tuple[str, int, int] | None = None
) -> NanoRepository:
    """Draw a repository; `shapes` lists how many functions the files may hold, such as (3,) or (1, 2).

    `issue` is (name, shown input, its value) where the request came first. Constants differ, so that an expression
    names one place; inputs above 2 tell the three operators apart.
    """
    shape = rng.choice(shapes)
    if issue is None:
        right, constant = rng.choice(OPERATORS), rng.randint(2, 9)
        good, shown = Function(rng.choice(ANIMALS + THINGS), "", constant, right), rng.randint(3, 12)
    else:
        name, shown, value = issue
        every = [Function(name, "", constant, right) for right in OPERATORS for constant in range(2, 10)]
        good = rng.choice([function for function in every if function.value(shown) == value])
    wrong = rng.choice([operator for operator in OPERATORS if operator != good.right])
    names = rng.sample([word for word in ANIMALS + THINGS if word != good.name], sum(shape) - 1)
    constants = rng.sample([constant for constant in range(2, 10) if constant != good.constant], sum(shape) - 1)
    functions = [
        Function(name, operator, constant, operator)
        for name, constant in zip(names, constants, strict=True)
        for operator in rng.choice(OPERATORS)
    ]
    functions.insert(rng.randint(0, len(functions)), Function(good.name, wrong, good.constant, good.right))
    modules = []
    for path, size in zip(("a.py", "b.py", "c.py"), shape, strict=False):
        modules.append((path, tuple(functions[:size])))
        functions = functions[size:]
    return NanoRepository(tuple(modules), shown)


def wrong_lines(truth: Mapping[str, Json]) -> list[tuple[str, str]]:
    """(path, line) of every function that is fine: the places a careless repair would touch."""
    return [
        (path, line)
        for path, text in truth["files"].items()
        for line in str(text).splitlines()
        if line != truth["before"]
    ]
