"""Keep the code readable: sizes, names and a few habits, checked by `make lint`.

The limits cap the tail, not the average: a file of 400 lines and a function of 60 fit in a reader's head. Ruff checks
line length, arguments and complexity; this checks what ruff has no rule for.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
NAMES_REFUSED = re.compile(r"(^|_)(utils?|helpers?|manager|v2|misc)($|_)")
TEXT_REFUSED = {
    re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"): "unfinished work: do it or file it",
    re.compile(r"\b(NotImplementedError|MagicMock)\b"): "a stub: leave the feature out until it runs",
    re.compile(r"except\s*:|except (Base)?Exception\b"): "a blind except: name the errors that can happen",
}
CODE = ("nemo_cascade", "tests", "tools", "examples", "setup.py")


def python_files(root: Path) -> Iterator[Path]:
    """Every Python file that is ours."""
    for name in CODE:
        path = root / name
        if path.is_file():
            yield path
        else:
            yield from sorted(path.rglob("*.py"))


def file_faults(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Faults of the file as text: (line, what)."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES:
        yield 1, f"{len(lines)} lines, limit {FILE_LINES}: split it by concern"
    if NAMES_REFUSED.search(path.stem):
        yield 1, f"the name {path.stem!r} says nothing: name what is inside"
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            yield number, "not ASCII: write an escape"
        for pattern, why in TEXT_REFUSED.items():
            if pattern.search(line) and "noqa: BLE001" not in line:
                yield number, why


def function_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions that are too long (too many arguments is ruff's PLR0913)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield node.lineno, f"{node.name}: {length} lines, limit {FUNCTION_LINES}"


def docstring_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Modules, public classes and public functions say what they are for."""
    if tree.body and not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def faults(path: Path) -> list[tuple[int, str]]:
    """All faults of one file. This file names what it refuses, so its text is not searched."""
    text = path.read_text()
    tree = ast.parse(text, filename=str(path))
    found = list(function_faults(tree))
    if path.resolve() != Path(__file__).resolve():
        found += file_faults(path, text)
    if "tests" not in path.parts:
        found += docstring_faults(tree)
    return sorted(found)


def main(root: Path) -> int:
    """Print every fault as path:line: what, and return the exit code."""
    bad = [(path, line, what) for path in python_files(root) for line, what in faults(path)]
    for path, line, what in bad:
        print(f"{path.relative_to(root)}:{line}: {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
