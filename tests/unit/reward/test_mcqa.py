"""Multiple choice: letters, option texts, row regexes, and patterns made to hang."""

from __future__ import annotations

import json
import time

import pytest

from nemo_cascade.reward.mcqa import Mode, checked_regex, extract_letter, grade, option_texts, truth_options
from nemo_cascade.types import UserError
from tests.released import released_data

OPTIONS = {"A": "pink", "B": "light blue", "C": "blue", "D": "gold"}


@pytest.mark.parametrize(
    ("text", "mode", "letter"),
    [
        (r"\boxed{B}", "strict_single_letter_boxed", "B"),
        (r"\boxed{A} no, \boxed{(C).}", "strict_single_letter_boxed", "C"),
        (r"\boxed{\text{D}}", "strict_single_letter_boxed", "D"),
        (r"\boxed{b}", "strict_single_letter_boxed", None),
        (r"\boxed{E}", "strict_single_letter_boxed", None),
        (r"\boxed{A, B}", "strict_single_letter_boxed", None),
        (r"\boxed{gold}", "strict_single_letter_boxed", None),
        ("B", "strict_single_letter_boxed", None),
        (r"\boxed{\text{Gold }}", "lenient_boxed", "D"),
        (r"\boxed{light blue}", "lenient_boxed", None),
        (r"\boxed{D: gold}", "lenient_boxed", "D"),
        ("Answer: C", "lenient_answer_colon", "C"),
        ("answer: light  BLUE", "lenient_answer_colon", "B"),
        ("Answer: A\nAnswer: (b)", "lenient_answer_colon", "B"),
        ("It is C", "lenient_answer_colon", None),
    ],
)
def test_letters(text: str, mode: Mode, letter: str | None) -> None:
    assert extract_letter(text, OPTIONS, mode) == letter


def test_row_regex_decides_by_its_last_match() -> None:
    assert extract_letter("Final: a ... FINAL: c", OPTIONS, output_regex=r"final:\s*([a-z])") == "C"
    assert extract_letter(r"\boxed{B}", OPTIONS, output_regex=r"final:\s*([a-z])") is None
    assert extract_letter("final: z", OPTIONS, output_regex=r"final:\s*([a-z])") is None


def test_grade() -> None:
    assert grade("b", r"\boxed{B}", OPTIONS).reward == 1.0
    assert grade("A", r"\boxed{B}", OPTIONS).reward == 0.0
    assert grade("A", "A", OPTIONS).parts == {"answered": 0.0}


def test_bad_regexes_are_the_rows_fault() -> None:
    for pattern in (r"(a+)+$", r"(.*x){2,}", "(", "a" * 400):
        with pytest.raises(UserError, match="drop the row"):
            checked_regex(pattern)
    for pattern in (r"Answer:\s*([A-Z])", r"\\boxed\{([A-Z])\}", r"(?:Answer|Option)\s*[:=]\s*\(?([A-J])\)?"):
        checked_regex(pattern)


def test_long_answers_cost_little() -> None:
    started = time.thread_time()
    assert extract_letter("x" * 10**6 + " final: d", OPTIONS, output_regex=r".*final:\s*([a-z])") == "D"
    assert time.thread_time() - started < 2  # of processor time, whatever else the machine does


def test_options_as_rows_hold_them() -> None:
    assert option_texts([{"A": "x"}, {"B": "y"}]) == truth_options([{"A": "x"}, {"B": "y"}]) == {"A": "x", "B": "y"}
    assert truth_options({"a": "x"}) == {"A": "x"}
    with pytest.raises(UserError):
        option_texts([{"AB": "x"}])


def test_recorded_rewards() -> None:
    options = dict.fromkeys("ABCDEFGHIJ", "x")
    for line in (released_data() / "gym/mcqa.example_rollouts.jsonl").open():
        row = json.loads(line)
        text = row["response"]["output"][-1]["content"][0]["text"]
        assert extract_letter(text, options) == row["extracted_answer"]
        assert grade(row["expected_answer"], text, options).reward == row["reward"]
