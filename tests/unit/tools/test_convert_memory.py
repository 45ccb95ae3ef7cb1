"""Conversions hold one tensor, never a shard, and never the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLACK = 24_000_000  # what Python and the allocator take on the way: buffers, headers, modules


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    words = ["--model", "nemotron_h_50m", "--shard-bytes", "60000000", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.convert_memory", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=400,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert list(rows) == ["write", "copy", "unpack", "widen", "import", "export"]
    for phase, row in rows.items():
        assert row["total"] > 100_000_000
        assert row["largest_shard"] > 40_000_000
        # a converted tensor is held in both dtypes
        assert row["above"] < 2 * row["largest_tensor"] + SLACK, phase
        assert row["above"] < row["largest_shard"] + SLACK, phase
