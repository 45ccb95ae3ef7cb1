"""The repository's own checks find what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.check_budget import faults, python_files
from tools.image_requirements import missing

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('"""Says."""\n' + "x = 1\n" * 400, "401 lines"),
        ('"""Says."""\ndef f():\n    """Says."""\n' + "    x = 1\n" * 60, "62 lines, limit 60"),
        ('"""Says."""\n# TO' + "DO: later\n", "unfinished work"),
        ('"""Says."""\ntry:\n    x = 1\nexc' + "ept Exception:\n    pass\n", "blind except"),
        ('"""Says."""\ndef f():\n    return 1\n', "f has no docstring"),
        ("x = 1\n", "the module has no docstring"),
        ('"""Says \u00e9."""\n', "not ASCII"),
    ],
)
def test_budget_finds_each_fault(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "sampling.py"
    path.write_text(text)
    assert any(told in what for _, what in faults(path)), faults(path)


def test_budget_likes_good_code_and_refuses_names_that_say_nothing(tmp_path: Path) -> None:
    text = '"""Says."""\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n    return 2 * x\n'
    for name, count in (("sampling.py", 0), ("reward_utils.py", 1), ("utils.py", 1), ("utility_theory.py", 0)):
        path = tmp_path / name
        path.write_text(text)
        assert len(faults(path)) == count, name


def test_budget_sees_the_package() -> None:
    found = {path.name for path in python_files(ROOT)}
    assert {"types.py", "check_budget.py", "setup.py", "test_checks.py"} <= found


def test_image_keeps_what_it_has() -> None:
    wanted, notes = missing(["# a comment", "pytest==0.0.1", "surely-not-installed==1.2"])
    assert wanted == ["surely-not-installed==1.2"] and notes[0].startswith("pytest: the image has")


def test_every_requirement_is_pinned_once() -> None:
    names: list[str] = []
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            if line.startswith(("#", "-r")) or not line:
                continue
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+( ; .+)?", line), f"{path.name}: {line}"
            names.append(re.sub(r"[-_.]+", "-", line.split("==")[0]).lower())
    assert len(names) == len(set(names)) and "torch" not in names
