"""Packing wastes less than a twentieth of the tokens on a heavy tail, on every rank."""

from __future__ import annotations

import random
import statistics

import pytest

from tools.bench import packing_fill


def test_a_heavy_tail_is_packed_to_95_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_CASCADE_DATA", raising=False)
    lengths = packing_fill.drawn(4000, random.Random(0))
    assert statistics.mean(lengths) > 1.5 * statistics.median(lengths)
    assert max(lengths) == packing_fill.LONGEST
    assert packing_fill.fill() >= 0.95
    rows = [packing_fill.measured(capacity) for capacity in packing_fill.CAPACITIES]
    assert min(row["fill"] for row in rows) >= 0.95
    assert max(row["imbalance"] for row in rows) < 1.1


def test_the_released_rollouts_are_packed_to_95_percent() -> None:
    if not packing_fill.released_lengths():
        pytest.skip("NEMO_CASCADE_DATA is not set: no released rows")
    assert packing_fill.fill() >= 0.95
