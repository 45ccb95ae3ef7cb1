"""Every domain keeps the promises that the loops rely on. New domains are found by themselves."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.splits import split_of
from nemo_cascade.domains import Services, SingleTurn, content_of
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Invalid, Message, Scored, Task, Transcript

NANO = Path(domains.__file__).parents[1] / "models" / "nano" / "tokenizer"
PROMPT_TOKENS, ANSWER_TOKENS = 110, 40
SLOW = {"code": 12, "swe_agentless": 12, "swe_agentic": 8}  # tasks demonstrated where each runs a program
GARBAGE = (
    "",
    " \n\t",
    "\x00\ufffd\u202e",
    "a " * 25_000,
    "{" * 2_000,
    "\\boxed{" * 500,
    "```python\nwhile True: pass",
    "<tool_call>\n<function=",
    '{"a": ' * 900,
    "<<<<<<< SEARCH\n=======\n",
)


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    shared = Services(math=MathGrader(wall_seconds=300))  # a busy machine must not turn a verdict into Invalid
    yield shared
    shared.close()


@pytest.fixture(params=domains.known())
def domain(request: pytest.FixtureRequest, services: Services) -> Domain:
    return domains.load(request.param, services)


def demonstrated(domain: Domain, task: Task, seed: int, flaw_rate: float) -> float:
    outcome = domain.score(task, Transcript(domain.demonstrate(task, seed, flaw_rate)))
    assert isinstance(outcome, Scored), f"{task.id}: {outcome.reason}"
    return outcome.reward


def test_gold_and_antigold_cases(domain: Domain) -> None:
    cases = domain.cases()
    assert any(case.reward > 0 for case in cases)
    assert any(case.hack and case.reward <= 0 for case in cases)
    for case in cases:
        outcome = domain.score(case.task, case.transcript)
        assert isinstance(outcome, Scored), f"{case.because}: {outcome.reason}"
        assert outcome.reward == pytest.approx(case.reward), f"{case.because}: {outcome.reason}"


def test_tasks_are_deterministic_named_and_distinct(domain: Domain) -> None:
    tasks = domain.tasks("train", 24, seed=5)
    assert tasks == domain.tasks("train", 24, seed=5)
    assert tasks != domain.tasks("train", 24, seed=6)
    assert len({task.id for task in tasks}) == 24
    assert {task.domain for task in tasks} == {domain.name}
    assert all(task.id.startswith(f"{domain.name}-") for task in tasks)


def test_splits_are_disjoint_for_every_seed(domain: Domain) -> None:
    drawn: dict[str, set[str]] = {"train": set(), "select": set(), "report": set()}
    for split, seen in drawn.items():
        for seed in (1, 2):
            tasks = domain.tasks(split, 60, seed)
            assert all(split_of(content_of(task)) == split for task in tasks)
            seen.update(task.id for task in tasks)
    assert not drawn["train"] & drawn["select"]
    assert not drawn["train"] & drawn["report"]
    assert not drawn["select"] & drawn["report"]


def test_report_set_holds_256_tasks(domain: Domain) -> None:
    assert len({task.id for task in domain.tasks("report", 256, seed=0)}) == 256


def test_flawless_demonstrations_score_one_and_flawed_ones_do_not(domain: Domain) -> None:
    tasks = domain.tasks("train", SLOW.get(domain.name, 100), seed=3)
    right = [demonstrated(domain, task, index, 0.0) == 1.0 for index, task in enumerate(tasks)]
    wrong = [demonstrated(domain, task, index, 1.0) < 0.5 for index, task in enumerate(tasks)]
    assert sum(right) >= 0.99 * len(tasks)
    assert sum(wrong) >= 0.8 * len(tasks)


def test_demonstrations_honour_the_mode(domain: Domain) -> None:
    for task in domain.tasks("train", 6, seed=4):
        for thinking in (True, False):
            messages = domain.demonstrate(dataclasses.replace(task, thinking=thinking), 0)
            turns = [message for message in messages if message.role == "assistant"]
            assert all(bool(turn.reasoning) == thinking for turn in turns)
            assert messages == domain.demonstrate(dataclasses.replace(task, thinking=thinking), 0)


def test_token_budget(domain: Domain) -> None:
    tokenizer = ChatTokenizer(NANO)
    for index, task in enumerate(domain.tasks("train", 40, seed=8)):
        assert len(tokenizer.prompt_ids(task)) <= PROMPT_TOKENS
        for message in domain.demonstrate(task, index):
            if message.role == "assistant":
                assert len(tokenizer.completion_ids(message, task.thinking)) <= ANSWER_TOKENS


def test_odd_replies_never_raise_and_earn_nothing(domain: Domain) -> None:
    task = domain.tasks("train", 1, seed=9)[0]
    for text in GARBAGE:
        for message in (Message("assistant", text), Message("assistant", "", text)):
            outcome = domain.score(task, Transcript((message,)))
            assert isinstance(outcome, Invalid) or outcome.reward <= 0.0, text[:20]
    for transcript in (Transcript(()), Transcript((Message("assistant", "x"),), truncated=True)):
        outcome = domain.score(task, transcript)
        assert isinstance(outcome, Scored) and math.isfinite(outcome.reward) and outcome.reward <= 0.0


def test_score_is_a_pure_function_and_group_scores_are_aligned(domain: Domain) -> None:
    task = domain.tasks("train", 1, seed=10)[0]
    transcripts = [Transcript(domain.demonstrate(task, 0)), Transcript((Message("assistant", "no"),))]
    first = [domain.score(task, transcript) for transcript in transcripts]
    assert first == [domain.score(task, transcript) for transcript in transcripts]
    if type(domain).score_group is SingleTurn.score_group:
        assert domain.score_group(task, transcripts) == first
    else:  # a judge compares the group; none is configured here
        for outcome in domain.score_group(task, transcripts):
            assert isinstance(outcome, Invalid) and "judge" in outcome.reason
    assert domain.score_group(task, transcripts[:1]) == first[:1]


def test_domain_tasks_and_outcomes_can_be_pickled(domain: Domain) -> None:
    fresh = domains.load(domain.name)
    task = fresh.tasks("train", 1, seed=11)[0]
    assert pickle.loads(pickle.dumps(task)) == task
    copy = pickle.loads(pickle.dumps(fresh))
    assert copy.tasks("train", 1, seed=11) == [task]
    outcome = domain.score(task, Transcript(domain.demonstrate(task, 0)))
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_an_episode_ends(domain: Domain) -> None:
    task = domain.tasks("train", 1, seed=12)[0]
    episode = domain.begin(task)
    assert episode.reply(Message("assistant", "I am done.")) is None
    episode.close()
    assert domain.max_turns >= 1
