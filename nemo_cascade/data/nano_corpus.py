"""Plain text for pre-training the nano base: the knowledge and the small skills that the tasks build on.

Documents hold no generated task: facts are meant to be known by heart, sums are single columns, records and keys are
drawn anew each time, so nothing of `select` or `report` is seen here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from nemo_cascade.data.nano_words import CITIES, COLORS, DAYS, FACTS, NAMES, THINGS

LINES = 4  # sentences per document


def _facts(rng: random.Random) -> str:
    nouns = rng.sample(sorted(FACTS), LINES)
    return " ".join(f"The {noun} is {FACTS[noun]}." for noun in nouns)


def _alike(rng: random.Random) -> str:
    color = rng.choice(COLORS)
    nouns = [noun for noun in sorted(FACTS) if FACTS[noun] == color]
    rng.shuffle(nouns)
    return f"{color}: {' '.join(nouns)}."


def _columns(rng: random.Random) -> str:
    """Single columns of a sum, with and without a carry."""
    parts = []
    for _ in range(LINES):
        first, second, carry = rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 1)
        parts.append(f"{first}+{second}{'+1' if carry else ''}={first + second + carry}")
    return " ".join(parts)


def _record(rng: random.Random) -> str:
    name, age, city, color = rng.choice(NAMES), rng.randint(11, 89), rng.choice(CITIES), rng.choice(COLORS)
    key, value = rng.choice((("name", name), ("age", age), ("city", city), ("color", color)))
    return f"{name} is {age}, from {city}, likes {color}. {json.dumps({key: value})}"


def _keys(rng: random.Random) -> str:
    """Keys said twice: what retrieval is made of."""
    names = rng.sample(NAMES, 3)
    lines = [f"{name}'s key is {rng.randint(11, 99)}." for name in names]
    return " ".join([*lines, rng.choice(lines)])


def _counting(rng: random.Random) -> str:
    words = rng.sample(THINGS, rng.randint(2, 5))
    text = " ".join(words)
    return f"{len(words)} words: {text}. {text.upper()}!"


def _days(rng: random.Random) -> str:
    start = rng.randrange(len(DAYS))
    return " ".join(DAYS[(start + step) % len(DAYS)] for step in range(LINES))


def _code(rng: random.Random) -> str:
    sign, k = rng.choice("+-*"), rng.randint(1, 9)
    values = rng.sample(range(1, 10), 3)
    results = [{"+": x + k, "-": x - k, "*": x * k}[sign] for x in values]
    shown = " ".join(f"f({x})={y}" for x, y in zip(values, results, strict=True))
    return f"def f(x): return x{sign}{k}\n{shown}"


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _facts,
    _facts,
    _alike,
    _columns,
    _record,
    _keys,
    _counting,
    _days,
    _code,
)


def document(rng: random.Random) -> str:
    """One short document of a random kind; facts come twice as often as the others."""
    return rng.choice(KINDS)(rng)
