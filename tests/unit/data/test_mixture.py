"""Shares of a step."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from nemo_cascade.data.mixture import check_weights, slots
from nemo_cascade.types import UserError


def test_each_step_holds_its_share_within_one() -> None:
    shares = check_weights("w", {"a": 5.0, "b": 2.0, "c": 1.0, "d": 0.0})
    assert shares == {"a": 0.625, "b": 0.25, "c": 0.125}
    total: Counter[str] = Counter()
    for seed in range(400):
        counts = Counter(slots(shares, 10, random.Random(seed)))
        assert all(abs(counts[name] - 10 * share) < 1 for name, share in shares.items())
        total += counts
    assert abs(total["c"] / 4000 - 0.125) < 0.01


def test_the_order_is_shuffled() -> None:
    first = Counter(slots({"a": 0.5, "b": 0.5}, 4, random.Random(seed))[0] for seed in range(200))
    assert 60 < first["a"] < 140


def test_bad_weights() -> None:
    with pytest.raises(UserError, match="data.domains.a: the weight -1 is negative"):
        check_weights("data.domains", {"a": -1})
    with pytest.raises(UserError, match="no source has a positive weight"):
        check_weights("data.domains", {})
