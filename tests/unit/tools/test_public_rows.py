"""Mutants are single changes that the tests notice; the check fails on verdicts that are not as they must be."""

from __future__ import annotations

import ast

import pytest

from nemo_cascade.types import Invalid, Scored
from tools.mutants import differs, mutants, noticed_mutant
from tools.public_rows import Checked, Prompts, check_ifeval, page, problems

SOURCE = '''def above(numbers, limit):
    """Numbers above a limit."""
    if limit == 0 and not numbers:
        return []
    return [number for number in numbers if number > limit + 0]
'''
TESTS = """
def check(candidate):
    assert candidate([1, 2, 3], 1) == [2, 3]
    assert candidate([5], 4) == [5]
"""
RIGHT, WRONG = Scored(1.0), Scored(0.0)


def test_every_mutant_is_one_change_and_the_order_is_the_seeds() -> None:
    found = list(mutants(SOURCE, "above"))
    whole = ast.unparse(ast.parse(SOURCE))
    assert [kind for kind, _ in found[-2:]] == ["returned value", "returned value"]
    counted = {kind: sum(one == kind for one, _ in found) for kind, _ in found}
    assert counted == {"comparison": 2, "operator": 1, "constant": 2, "condition": 1, "logic": 1, "returned value": 2}
    for _, source in found:
        changed = [(a, b) for a, b in zip(whole.split("\n"), source.split("\n"), strict=True) if a != b]
        assert len(changed) == 1, source
    assert list(mutants(SOURCE, "above")) == found
    assert list(mutants(SOURCE, "above", 1)) != found
    assert sorted(mutants(SOURCE, "above", 1)) == sorted(found)


def test_a_mutant_is_one_that_the_tests_notice() -> None:
    assert not differs(SOURCE, TESTS, "above")
    assert not differs(SOURCE.replace("limit == 0 and", "limit == 0 or"), TESTS, "above"), "no test has the limit 0"
    assert differs(SOURCE.replace("> limit", ">= limit"), TESTS, "above")
    assert differs("import sys\n" + SOURCE.replace("if limit", "sys.exit(0)\n    if limit"), TESTS, "above")
    kind, source, tried = noticed_mutant(SOURCE, TESTS, "above")
    assert differs(source, TESTS, "above")
    unnoticed = [changed for _, changed in list(mutants(SOURCE, "above"))[:tried]]
    assert not any(differs(changed, TESTS, "above") for changed in unnoticed)
    assert kind in ("comparison", "operator", "constant", "condition")
    with pytest.raises(ValueError, match="notice no single change"):
        noticed_mutant(SOURCE, "def check(candidate): pass", "above")


def test_what_is_not_as_it_must_be_fails_the_check() -> None:
    good = Checked("HumanEval/0", RIGHT, WRONG, "constant", 1)
    prompts = Prompts(541, 4, 4)
    assert problems([good], prompts) == []
    for right, wrong, words in (
        (WRONG, WRONG, "HumanEval/1: the reference solution got"),
        (Invalid("late"), WRONG, "HumanEval/1: the reference solution got"),
        (RIGHT, RIGHT, "HumanEval/1: a mutant (logic) got"),
        (RIGHT, Invalid("late"), "HumanEval/1: a mutant (logic) got"),
    ):
        bad = Checked("HumanEval/1", right, wrong, "logic", 0)
        (problem,) = problems([good, bad], prompts)
        assert problem.startswith(words)
        assert "1 of 2" in page([good, bad], prompts)
    assert problems([good], Prompts(541, 3, 4)) == ["IFEval: 1 answers got no verdict"]
    assert len(problems([good], Prompts(541, 4, 4, strict_above=2))) == 1


def test_prompts_are_read_strictly_and_loosely() -> None:
    row = {"prompt": "Say yes.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    comma = {"prompt": "Sure,\nyes", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    found = check_ifeval([row, comma])
    assert (found.loaded, found.verdicts, found.answers, found.strict_above) == (2, 8, 8, 0)
    assert found.followed == {"strict": 5, "loose": 6}, "three answers of four, two of four; loosely the prompt, too"
    assert found.ids == {"punctuation:no_comma"}
