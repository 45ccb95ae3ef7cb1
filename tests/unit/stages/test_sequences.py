"""From rollouts to sequences: who is left out, and what is refused."""

from __future__ import annotations

import math

import pytest

from nemo_cascade.stages.sequences import as_sequences, domains
from nemo_cascade.types import Group, Invalid, Outcome, Rollout, Scored, Task, Transcript, UserError


def group(domain: str, *outcomes: Outcome, logprob: float = -0.5, sampled: int = 1) -> Group:
    task = Task(f"{domain}-1", domain, ())
    mask = (0, *[1] * sampled)
    rollouts = tuple(
        Rollout(task, index, (7,) * len(mask), mask, tuple(logprob * m if m else 0.0 for m in mask),
                tuple(m - 1 for m in mask), Transcript(()), outcome)
        for index, outcome in enumerate(outcomes)
    )  # fmt: skip
    return Group(task, rollouts, tuple(isinstance(outcome, Scored) for outcome in outcomes))


def test_a_batch_of_invalid_rollouts_leaves_nothing_to_train() -> None:
    assert as_sequences([group("math", Invalid("down"), Invalid("down"))], [[None, None]]) == []


def test_an_answer_of_no_token_is_left_out() -> None:
    sequences = as_sequences([group("math", Scored(1.0), sampled=0), group("code", Scored(0.0))], [[1.0], [-1.0]])
    assert [(sequence.group, sequence.advantages) for sequence in sequences] == [(1, (0.0, -1.0))]


def test_log_probabilities_that_are_no_numbers_name_the_rollout() -> None:
    with pytest.raises(UserError, match=r"task math-1, rollout 1: the sampler's log-probabilities are no numbers"):
        as_sequences([group("math", Invalid("down"), Scored(1.0), logprob=math.nan)], [[None, 1.0]])
    infinite = as_sequences([group("math", Scored(1.0), logprob=-math.inf)], [[1.0]])
    assert infinite[0].sampler_logprobs == (0.0, -math.inf)  # a ratio that the importance weight has to judge


def test_domains_count_in_alphabetical_order() -> None:
    teachers = {"math": "runs/sft", "code": "runs/code_rl"}
    sequences = as_sequences([group("math", Scored(1.0)), group("code", Scored(1.0))], teachers=teachers)
    assert domains(teachers) == ["code", "math"]
    assert [(sequence.domain, sequence.teacher) for sequence in sequences] == [(1, "runs/sft"), (0, "runs/code_rl")]
