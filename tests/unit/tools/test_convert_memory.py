"""Conversions hold one tensor, never a shard, and never the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.tools.peak_memory import SLACK, least_above, rows_of


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    words = ["--model", "nemotron_h_50m", "--shard-bytes", "60000000", "--folder", str(tmp_path), "--json"]
    rows = rows_of("tools.bench.convert_memory", *words)
    assert list(rows) == ["write", "copy", "unpack", "widen", "import", "export"]
    bounds = {}
    for phase, row in rows.items():
        assert row["total"] > 100_000_000
        assert row["largest_shard"] > 40_000_000
        # a converted tensor is held in both dtypes
        bounds[phase] = min(2 * row["largest_tensor"], row["largest_shard"]) + SLACK
    above = least_above(rows, bounds, "tools.bench.convert_memory", *words)
    assert {phase: value for phase, value in above.items() if value >= bounds[phase]} == {}, (above, bounds)
