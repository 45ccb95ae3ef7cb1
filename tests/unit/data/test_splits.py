"""Splits by content hash."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from nemo_cascade.data.splits import content_id, content_sha, draw, split_of, task_content
from nemo_cascade.types import Message, UserError


def test_shares_are_eight_one_one() -> None:
    counts = Counter(split_of(f"content {index}") for index in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.8) < 0.02
    assert abs(counts["select"] / 20_000 - 0.1) < 0.01
    assert abs(counts["report"] / 20_000 - 0.1) < 0.01


def test_the_hash_is_fixed_for_ever() -> None:
    assert content_sha("frog") == "74fa5327cc0f4e947789dd5e989a61a8242986a596f170640ac90337b1da1ee4"
    assert content_id("math", "frog") == "math-74fa5327cc0f"


def test_content_covers_prompt_and_truth() -> None:
    prompt = (Message("user", "2+2=?"),)
    assert task_content(prompt, {"a": 1, "b": 2}) == task_content(prompt, {"b": 2, "a": 1})
    assert task_content(prompt, {"a": 1}) != task_content(prompt, {"a": 2})
    assert task_content(prompt, {}) != task_content((Message("user", "2+3=?"),), {})


def test_draw_is_distinct_deterministic_and_a_prefix() -> None:
    def make(rng: random.Random) -> int:
        return rng.randrange(10_000)

    long = draw(make, str, "select", 200, seed=3)
    assert len(set(long)) == 200
    assert {split_of(str(item)) for item in long} == {"select"}
    assert draw(make, str, "select", 50, seed=3) == long[:50]
    assert draw(make, str, "select", 50, seed=4) != long[:50]


def test_a_space_too_small_is_a_users_error() -> None:
    with pytest.raises(UserError, match="split report: the generator has only about"):
        draw(lambda rng: rng.randrange(30), str, "report", 20, seed=0)
