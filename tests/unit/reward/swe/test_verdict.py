"""The rules of section 5.8, row by row, and all endings there are."""

from __future__ import annotations

import itertools

import pytest

from nemo_cascade.reward.swe.verdict import Ending, verdict
from nemo_cascade.types import Invalid, Scored

MASKED = "Invalid"
FLAGS = ("cut_off", "agent_timed_out", "agent_out_of_memory", "grading_timed_out", "grading_out_of_memory")
TABLE = [
    # resolved, what else happened, what it is worth
    (True, (), 1.0),
    (False, (), 0.0),
    (True, ("cut_off",), MASKED),  # the limit on turns or the context window
    (False, ("cut_off",), 0.0),
    (True, ("grading_timed_out",), MASKED),
    (False, ("grading_timed_out",), MASKED),
    (True, ("agent_timed_out",), MASKED),
    (False, ("agent_timed_out",), MASKED),
    (True, ("agent_out_of_memory",), MASKED),
    (False, ("agent_out_of_memory",), MASKED),
    (True, ("grading_out_of_memory",), MASKED),
    (False, ("grading_out_of_memory",), MASKED),
]


@pytest.mark.parametrize(("resolved", "happened", "worth"), TABLE)
def test_every_row_of_the_table(resolved: bool, happened: tuple[str, ...], worth: float | str) -> None:
    outcome = verdict(Ending(resolved, **dict.fromkeys(happened, True), parts={"a": 0.5}, reason="why"))
    if worth == MASKED:
        assert isinstance(outcome, Invalid) and len(outcome.reason) > 20
    else:
        assert outcome == Scored(float(worth), {"a": 0.5}, "why")


def test_every_ending_there_is() -> None:
    """64 of them: 1 is only for resolved and nothing else, 0 only for not resolved with at most a cut."""
    worth = {1.0: set(), 0.0: set(), MASKED: set()}
    for resolved, *flags in itertools.product((False, True), repeat=1 + len(FLAGS)):
        outcome = verdict(Ending(resolved, **dict(zip(FLAGS, flags, strict=True))))
        worth[outcome.reward if isinstance(outcome, Scored) else MASKED].add((resolved, *flags))
    assert worth[1.0] == {(True, *[False] * 5)}
    assert worth[0.0] == {(False, False, *[False] * 4), (False, True, *[False] * 4)}
    assert len(worth[MASKED]) == 61


def test_reasons_tell_the_five_apart() -> None:
    reasons = {verdict(Ending(True, **{flag: True})).reason for flag in FLAGS}
    assert len(reasons) == 5
