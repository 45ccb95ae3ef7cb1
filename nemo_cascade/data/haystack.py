"""Long texts with something to find in them, of any length: what a model must retrieve, follow or count.

Four kinds, as in RULER, in words of the nano vocabulary: one needle; a needle among thousands like it; a chain of
variables; the commonest words of a list. Digits stand only in needles, so no filler can be taken for one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_cascade.data.nano_words import ANIMALS, CITIES, COLORS, DAYS, NAMES, THINGS

NOUNS = ANIMALS + THINGS
CHAIN = 4  # copies of a variable
CHAINS = 4
COMMONEST = 3
KEY_WORDS = 12  # of a line of `multi_key`
RARE = 150  # different words beside the commonest, at most


@dataclass(frozen=True)
class Haystack:
    """A text with its question. `answer` holds one text, or several between commas in any order (`many`); `near` are
    wrong answers that a reader who misses something would give; `clue` is what the right one rests on.
    """

    text: str
    question: str
    answer: str
    near: tuple[str, ...]
    clue: str
    many: bool = False


def filler(rng: random.Random) -> Iterator[str]:
    """Sentences without end and without digits."""
    while True:
        what = f"a {rng.choice(COLORS)} {rng.choice(NOUNS)} in {rng.choice(CITIES)}"
        yield f"On {rng.choice(DAYS)} {rng.choice(NAMES)} saw {what}."


def _hidden(rng: random.Random, needles: list[str], words: int) -> str:
    """The needles in their order, at random places between filler, about `words` words in all."""
    wanted = words - sum(len(needle.split()) for needle in needles)
    lines: list[str] = []
    for line in filler(rng):
        if wanted <= 0:
            break
        lines.append(line)
        wanted -= len(line.split())
    places = sorted(rng.randint(0, len(lines)) for _ in needles)
    woven: list[str] = []
    at = 0
    for place, line in zip(places, needles, strict=True):
        woven += [*lines[at:place], line]
        at = place
    return " ".join([*woven, *lines[at:]])


def _key(who: str, value: int) -> str:
    return f"The key of {who} is {value}."


def needle(rng: random.Random, words: int) -> Haystack:
    """Two keys between filler, one of them asked for."""
    first, second = rng.sample(NAMES, 2)
    right, wrong = rng.sample(range(10_000, 100_000), 2)
    needles = [_key(first, right), _key(second, wrong)]
    rng.shuffle(needles)
    question = f"What is the key of {first}? Answer with the number alone."
    return Haystack(_hidden(rng, needles, words), question, str(right), (str(wrong),), _key(first, right))


def multi_key(rng: random.Random, words: int) -> Haystack:
    """Keys and almost nothing else; their owners differ in one of four words."""
    owners = [
        f"{color} {noun} of {name} of {city}"
        for color, noun, name, city in itertools.product(COLORS, NOUNS, NAMES, CITIES)
    ]
    chosen = rng.sample(owners, min(max(2, words // KEY_WORDS), len(owners)))
    values = rng.sample(range(10_000, 100_000), len(chosen))
    asked = rng.randrange(len(chosen))
    lines = [_key(f"the {owner}", value) for owner, value in zip(chosen, values, strict=True)]
    question = f"What is the key of the {chosen[asked]}? Answer with the number alone."
    near = tuple(str(value) for index, value in enumerate(values[:8]) if index != asked)
    return Haystack(_hidden(rng, lines, words), question, str(values[asked]), near, lines[asked])


def variables(rng: random.Random, words: int) -> Haystack:
    """Chains of assignments, mixed: a value, and copies of copies of it. All variables of one chain are asked for."""
    names = [f"x{number}" for number in rng.sample(range(10, 1000), CHAINS * (CHAIN + 1))]
    chains = [names[at : at + CHAIN + 1] for at in range(0, len(names), CHAIN + 1)]
    values = rng.sample(range(10_000, 100_000), CHAINS)
    queues = [
        [f"Let {chain[0]} be {value}.", *(f"Let {new} be {old}." for old, new in itertools.pairwise(chain))]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = [index for index in range(CHAINS) for _ in range(CHAIN + 1)]
    rng.shuffle(order)
    clue = " ".join(queues[0])
    text = _hidden(rng, [queues[index].pop(0) for index in order], words)
    question = f"Which variables are {values[0]}? Answer with their names alone, with commas between them."
    near = (", ".join(chains[0][:-1]), chains[0][0], ", ".join(chains[1]))
    return Haystack(text, question, ", ".join(chains[0]), near, clue, many=True)


def common_words(rng: random.Random, words: int) -> Haystack:
    """A shuffled list of words; three of them come three times as often as each other one."""
    known = [f"{color}-{noun}" for color in COLORS for noun in NOUNS]
    rng.shuffle(known)
    often, rest = known[:COMMONEST], known[COMMONEST : COMMONEST + RARE]
    low = max(1, words // (RARE + 3 * COMMONEST))
    high = 3 * low + 1
    kinds = max(2, min(len(rest), (words - COMMONEST * high) // low))
    listed = [word for word in often for _ in range(high)] + [word for word in rest[:kinds] for _ in range(low)]
    rng.shuffle(listed)
    question = f"Which {COMMONEST} words are the commonest? Answer with these words alone, with commas between them."
    near = (", ".join([*often[:-1], rest[0]]), often[0])
    return Haystack(" ".join(listed), question, ", ".join(often), near, f"{', '.join(often)} {high} times", many=True)


KINDS: dict[str, Callable[[random.Random, int], Haystack]] = {
    "needle": needle,
    "multi_key": multi_key,
    "variables": variables,
    "common_words": common_words,
}
