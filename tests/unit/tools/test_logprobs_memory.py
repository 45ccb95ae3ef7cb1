"""The chunked output layer holds a few chunks of logits, not the row's."""

from __future__ import annotations

from tests.unit.tools.peak_memory import SLACK, least_above, rows_of

CHUNK = 2**20  # logits; 4 MiB
BENCH = "tools.bench.logprobs_memory"


def test_peak_memory_is_bounded_by_the_chunk() -> None:
    words = ["--tokens", "2048", "--vocabulary", "16384", "--chunk-logits", str(CHUNK), "--width", "8", "--json"]
    rows = rows_of(BENCH, *words)
    assert rows["naive"]["logits"] == 2048 * 16384 * 4 == 32 * 4 * CHUNK
    assert rows["naive"]["above"] > 2.5 * rows["naive"]["logits"]
    bound = 4 * 4 * CHUNK + rows["chunked"]["gradients"] + SLACK
    assert bound < rows["naive"]["above"] / 5.0
    above = least_above(rows, {"chunked": bound}, BENCH, *words)
    assert above["chunked"] < bound
