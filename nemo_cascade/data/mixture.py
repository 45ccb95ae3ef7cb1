"""Which source fills which slot of a step, from weights and a seed alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

from nemo_cascade.types import UserError


def check_weights(key: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as shares that sum to 1; UserError when one is negative or all are zero."""
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"{key}.{name}: the weight {weight} is negative")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{key}: no source has a positive weight; name at least one domain")
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def slots(shares: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """`count` source names in random order, each within one of its share times `count` (systematic sampling).

    Drawing each slot on its own would let a domain of share 1/8 be absent from one step of 16 in eight.
    """
    names = list(shares)
    edges = list(itertools.accumulate(shares[name] * count for name in names))
    start = rng.random()
    chosen, at = [], 0
    for slot in range(count):
        while at < len(names) - 1 and slot + start >= edges[at]:
            at += 1
        chosen.append(names[at])
    rng.shuffle(chosen)
    return chosen
