"""The chunked output layer holds a few chunks of logits, not the row's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 2**20  # logits; 4 MiB
SLACK = 24_000_000  # what Python and the allocator take on the way, as in test_convert_memory.py


def test_peak_memory_is_bounded_by_the_chunk() -> None:
    words = ["--tokens", "2048", "--vocabulary", "16384", "--chunk-logits", str(CHUNK), "--width", "8", "--json"]
    command = [sys.executable, "-m", "tools.bench.logprobs_memory", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    rows = json.loads(done.stdout)
    assert rows["naive"]["logits"] == 2048 * 16384 * 4 == 32 * 4 * CHUNK
    assert rows["naive"]["above"] > 2.5 * rows["naive"]["logits"]
    assert rows["chunked"]["above"] < 4 * 4 * CHUNK + rows["chunked"]["gradients"] + SLACK
    assert rows["naive_over_chunked"] > 5.0
