"""The documents of the nano base say true things."""

from __future__ import annotations

import random
import re

from nemo_cascade.data.nano_corpus import KINDS, document
from nemo_cascade.data.nano_words import COLORS, FACTS


def texts(kind: int, count: int = 40) -> list[str]:
    return [KINDS[kind](random.Random(seed)) for seed in range(count)]


def test_facts_are_the_known_ones() -> None:
    stated = {pair for text in texts(0, 200) for pair in re.findall(r"The (\w+) is (\w+)\.", text)}
    assert stated == set(FACTS.items())
    for color, nouns in (re.fullmatch(r"(\w+): ([\w ]+)\.", text).groups() for text in texts(2)):
        assert {FACTS[noun] for noun in nouns.split()} == {color}


def test_every_color_has_two_things_at_least() -> None:
    assert all(sum(value == color for value in FACTS.values()) >= 2 for color in COLORS)


def test_columns_add_up() -> None:
    for text in texts(3):
        for sum_ in text.split():
            terms, result = sum_.split("=")
            assert sum(int(term) for term in terms.split("+")) == int(result)


def test_keys_are_said_twice() -> None:
    for text in texts(5):
        *lines, again = re.findall(r"\w+'s key is \d\d\.", text)
        assert again in lines


def test_code_computes_what_it_shows() -> None:
    for text in texts(8):
        code, shown = text.split("\n")
        names: dict[str, object] = {}
        exec(code, names)  # noqa: S102 - the package's own line of Python
        for x, y in re.findall(r"f\((\d+)\)=(-?\d+)", shown):
            assert names["f"](int(x)) == int(y)


def test_documents_are_repeatable_and_varied() -> None:
    first = [document(random.Random(seed)) for seed in range(300)]
    assert first == [document(random.Random(seed)) for seed in range(300)]
    assert len(set(first)) > 230
