"""From a stage's `judge` block to rewards: strategy, swap, bonus and length terms of section 5.4, by hand."""

from __future__ import annotations

import json

import pytest

from nemo_cascade.config.schema import JudgeConfig
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.preference_judge import PreferenceJudge
from nemo_cascade.types import Message, Scored
from tests.unit.reward.judging import JudgeServer

ASKED = (Message("user", "hello"),)
# Reasoning of 10, 20, 30 characters; answers of 4, 2, 4 characters.
FINALS = [Message("assistant", text, "r" * length) for text, length in (("AAAA", 10), ("BB", 20), ("CCCC", 30))]
QUALITY = {"A": 4, "B": 3, "C": 3}


def biased(messages: list[dict[str, str]]) -> str:
    """Scores by letter, a point more for what stands first; of equal scores the first is preferred (ranking 2)."""
    first, second = (QUALITY[message["content"][0]] for message in messages[-2:])
    return json.dumps({"score_1": first + 1, "score_2": second, "ranking": 2})


# Matches of the circle (first-second: scores; equal ones are parted by 3.5 - 2 = 1.5):
#   AB: 5, 3.  BC: 4, 3.  CA: 4, 4 -> 5.5, 2.5.  swapped: BA: 4, 4 -> 5.5, 2.5.  CB: 4, 3.  AC: 5, 3.
# All pairs AB, AC, BC:  A (5 + 5)/2, B (3 + 4)/2, C (3 + 3)/2.
BASE = {
    ("circular", False): [3.75, 3.5, 4.25],
    ("circular", True): [3.75, 3.875, 3.875],
    ("all_pairs", False): [5.0, 3.5, 3.0],
    ("all_pairs", True): [3.75, 3.875, 3.875],
}


def grade(config: JudgeConfig) -> tuple[list[float], list[float], int]:
    """Rewards, their R_base, and how often the judge was asked."""
    with JudgeServer(biased) as server, Judge(server.url, "judge", timeout_s=10) as judge:
        outcomes = PreferenceJudge(judge, config).grade(ASKED, FINALS)
        calls = server.calls
    scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
    assert len(scored) == 3
    return [outcome.reward for outcome in scored], [outcome.parts["base"] for outcome in scored], calls


@pytest.mark.parametrize(("strategy", "swap"), BASE)
def test_who_meets_whom(strategy: str, swap: bool) -> None:
    rewards, base, calls = grade(
        JudgeConfig(url="http://x", strategy=strategy, swap=swap, length_weight=0.0, conciseness_bonus=0.0)
    )
    assert rewards == base == BASE[strategy, swap]
    assert calls == (6 if swap else 3)


def test_bonus_and_length_terms_on_top() -> None:
    # Circular and swapped. Length weights, centred: reasoning (1, .5, 0) -> (.5, 0, -.5); answers (0, 1, 0) ->
    # (-1/3, 2/3, -1/3); half of each: (.25 - 1/6, 1/3, -.25 - 1/6). The bonus asks for the best R_base, 3.875, of
    # three: the shortest answer B has it and gains 0.5; the shortest reasoning A (3.75) has not.
    rewards, _, _ = grade(JudgeConfig(url="http://x", strategy="circular", swap=True))
    assert rewards == pytest.approx([3.8333333333333335, 4.708333333333333, 3.4583333333333335], abs=1e-12)
