"""How full packing makes micro-batches of heavy-tailed lengths: `python -m tools.bench.packing_fill`.

Lengths are those of the released rollouts under NEMO_CASCADE_DATA, drawn with replacement; without them, of a lognormal
distribution with the same mean and deviation of the logarithm, cut at the longest rollout. `fill` is tokens over
micro-batches x `micro_batch_tokens`, the last micro-batch of a step included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from nemo_cascade.data.packing import first_fit_decreasing

CHARACTERS_PER_TOKEN = 4.0
LOG_MEAN, LOG_DEVIATION, LONGEST = 6.60, 1.20, 6892  # of the 40 released rollouts
SEQUENCES = 512  # of a step on one rank: 128 prompts x 16 over 4 ranks
CAPACITIES = (8192, 16384, 32768)  # 1.2, 2.4 and 4.8 times the longest sequence
STEPS = 20


def main() -> None:
    """Print fill and balance for every capacity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {str(capacity): measured(capacity) for capacity in CAPACITIES}
    found = {"packing_fill": fill(), "rows": len(released_lengths()), "capacities": rows}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"lengths of {found['rows'] or 'no'} released rollouts; {SEQUENCES} sequences a step and rank, {STEPS} steps")
    print(f"{'micro_batch_tokens':>18}{'fill':>8}{'worst step':>12}{'most / mean micro-batches of 4 ranks':>38}")
    for capacity, row in rows.items():
        print(f"{capacity:>18}{row['fill']:>8.1%}{row['worst']:>12.1%}{row['imbalance']:>38.3f}")


def fill() -> float:
    """The mean fill over steps at the middle capacity."""
    return measured(CAPACITIES[1])["fill"]


def measured(capacity: int) -> dict[str, float]:
    """Fill of the mean and the worst step, and how many more micro-batches than the mean the busiest of 4 ranks has."""
    fills, imbalance = [], []
    for step in range(STEPS):
        counts = []
        for rank in range(4):
            lengths = drawn(SEQUENCES, random.Random(4 * step + rank))
            bins = first_fit_decreasing(lengths, capacity)
            counts.append(len(bins))
            fills.append(sum(lengths) / (len(bins) * capacity))
        imbalance.append(max(counts) / statistics.mean(counts))
    return {"fill": statistics.mean(fills), "worst": min(fills), "imbalance": statistics.mean(imbalance)}


def drawn(count: int, draw: random.Random) -> list[int]:
    """Lengths in tokens."""
    released = released_lengths()
    if released:
        return draw.choices(released, k=count)
    return [max(1, min(LONGEST, round(math.exp(draw.gauss(LOG_MEAN, LOG_DEVIATION))))) for _ in range(count)]


def released_lengths() -> Sequence[int]:
    """Tokens of prompt and answer of each released rollout; none without NEMO_CASCADE_DATA."""
    place = os.environ.get("NEMO_CASCADE_DATA")
    if not place:
        return ()
    lengths = []
    for file in sorted(Path(place).rglob("*_rollouts.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if isinstance(row.get("response"), dict):
                texts = (row["responses_create_params"]["input"], row["response"]["output"])
                characters = sum(len(json.dumps(text)) for text in texts)
                lengths.append(round(characters / CHARACTERS_PER_TOKEN))
    return tuple(lengths)


if __name__ == "__main__":
    main()
