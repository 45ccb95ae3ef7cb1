"""Preference: the rubric that evaluation shows, and the pairs that teach the judge."""

import random

import pytest

from nemo_cascade.data.nano_words import COLORS, FACTS
from nemo_cascade.domains.preference import Preference, rubric, write_answer
from nemo_cascade.types import Invalid, Message, Transcript


@pytest.fixture(scope="module")
def domain():
    return Preference()


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_flawless_and_flawed_demonstrations(domain):
    tasks = domain.tasks("train", 150, seed=1)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 0))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 0, 1.0))).reward for t in tasks)


def test_the_rubric_sees_each_flaw_alone():
    wishes = {"greeting": "greeting", "closing": "closing", "fact": "fact", "long": "short", "name": "greeting"}
    for style, wish in wishes.items():
        for noun in FACTS:
            parts = rubric("Ivy", noun, write_answer("Ivy", noun, style, random.Random(noun)))
            assert [key for key, value in parts.items() if not value] == [wish], (style, noun)


def test_naming_every_color_is_not_the_fact():
    assert rubric("Ivy", "fish", f"Hello Ivy. The fish is {FACTS['fish']}. {' '.join(COLORS)} Bye.")["fact"] == 0.0


def test_a_released_row_is_scored_in_groups_only(domain):
    row = {"responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}, "principle": "Be kind."}
    task = domain.parse_row(row, "rows:1")
    assert task.truth == {"principle": "Be kind."}
    assert isinstance(domain.score(task, Transcript((Message("assistant", "Hi"),))), Invalid)
