"""Inputs for a parser: its valid examples damaged, the words of its grammar in any order, raw bytes, and floods.

A few microseconds each, so that 100,000 a parser are affordable; hypothesis takes a hundred times as long.
Everything follows from the seed and the parser's name: what broke a parser once breaks it again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

ERRORS = ("surrogateescape", "replace")
"""How bytes that are no UTF-8 become text: as the sandbox keeps them, and as the clients of judges and servers do."""
SIGNS = (
    *"\0\x01\x1b\x7f\x85\xa0\xad\ud800\udfff\udc80\ufeff\ufffd\ufffe\u200b\u200d\u202e\u2028\u2029\v\f\r\t\n",
    *(
        "\u0130\u0131\xdf\ufb01\u017f\u01c5\u03a3\u03c2\xb5\xb2\xbd\u0663\u096a\u0301"
        "\u0e33\U0001d7dc\U0001f98a\u6f22\uff71\U000e0001\U0010ffff"
    ),
    *"\\\"'`<>{}[]()^$#@!%&*|~;:,./?=+-_ 0",
)
"""Characters that lower to two, that are digits but no numbers, that split lines, that are no characters."""
NUMBERS = (
    *("0", "-1", "1e999", "-0.0", "NaN", "Infinity", "1_000", "0x10", "\xb2", "\u0663", "1" + "0" * 400),
    *("9" * 4400, "1e-400", "2147483648", "18446744073709551616", "007", "+5", "1.", ".5", "null", "true"),
)
VALUES: tuple[object, ...] = (
    *(None, True, False, 0, -1, 41, 10**30, 10**400, 0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "\ud800", "\0", "\xb2"),
    *([], {}, [[]], [{}], {"": None}, ["x", 1], {"a": {"a": {}}}, "\u0130", "-1", "1e5", "2023-11-30T00:00:00+01:00"),
)
"""What is put in the place of a value in a JSON text."""
DEEP = "nested deeply"
FLOOD_SHARE = 0.005
MAX_FLOOD = 1 << 17  # characters


class Inputs:
    """An endless stream of texts for one parser. `words` are the marks its grammar knows, `examples` valid inputs."""

    def __init__(self, name: str, seed: int, examples: Sequence[str], words: Sequence[str]) -> None:
        self.rng = random.Random(f"{name}/{seed}")
        self.examples, self.words = tuple(examples), (*words, *NUMBERS)
        self.values = [text for text in self.examples if text[:1] in ("{", "[") and _is_json(text)]

    def __iter__(self) -> Iterator[str]:
        while True:
            yield self.draw()

    def draw(self) -> str:
        """The next text."""
        kind = self.rng.random()
        if kind < FLOOD_SHARE:
            return self._flood()
        if kind < 0.4 and self.values:
            return self._value()
        if kind < 0.6:
            return self._damaged()
        if kind < 0.8:
            return "".join(self.rng.choices(self.words, k=self.rng.randrange(1, 24)))
        if kind < 0.95:
            return self._bytes()
        return "".join(self.rng.choices(SIGNS, k=self.rng.randrange(0, 60)))

    def _piece(self) -> str:
        """A word, a sign, a number or a stretch of an example."""
        choice = self.rng.randrange(4)
        if choice == 0:
            return self.rng.choice(SIGNS)
        if choice == 1:
            return self.rng.choice(NUMBERS)
        if choice == 2:
            return self.rng.choice(self.words)
        text = self.rng.choice(self.examples)
        start = self.rng.randrange(len(text) + 1)
        return text[start : start + self.rng.randrange(1, 40)]

    def _damaged(self) -> str:
        """A valid example after one to five changes."""
        rng = self.rng
        text = rng.choice(self.examples)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text) + 1)
            end = at + rng.randrange(1, 12)
            change = rng.randrange(6)
            if change == 0:
                text = text[:at] + text[end:]
            elif change == 1:
                text = text[:at] + text[at:end] * rng.randrange(2, 5) + text[end:]
            elif change == 2:
                text = text[:at] + self._piece() + text[at:]
            elif change == 3:
                text = text[:at] + self._piece() + text[end:]
            elif change == 4:
                other = rng.choice(self.examples)
                text = text[:at] + other[rng.randrange(len(other) + 1) :]
            else:
                text = text[:at]
        return text

    def _value(self) -> str:
        """An example's JSON value with one to five parts replaced, dropped, renamed, repeated or wrapped."""
        rng = self.rng
        root = [json.loads(rng.choice(self.values))]
        places = list(_places(root))
        for _ in range(rng.randrange(1, 6)):
            holder, key = rng.choice(places)
            try:
                value = holder[key]
                change = rng.randrange(7)
                if change < 3:
                    holder[key] = rng.choice(VALUES)
                elif change == 3:
                    other, place = rng.choice(places)
                    holder[key] = json.loads(json.dumps(other[place]))
                elif change == 4 and isinstance(holder, dict):
                    holder[rng.choice(self.words).strip('"') if rng.random() < 0.5 else self._piece()] = holder.pop(key)
                elif change == 5 and holder is not root:
                    holder.pop(key)
                else:
                    holder[key] = [value] if rng.random() < 0.7 else DEEP
            except (KeyError, IndexError):  # a place that an earlier change took away
                continue
        depth = rng.choice((5, 50, 200, 900, 980))
        return json.dumps(root[0]).replace(f'"{DEEP}"', "[" * depth + "1" + "]" * depth)

    def _bytes(self) -> str:
        """Random bytes, or an example's with some changed, read as text."""
        rng = self.rng
        if rng.random() < 0.5:
            data = bytearray(rng.randbytes(rng.randrange(0, 200)))
        else:
            data = bytearray(rng.choice(self.examples).encode("utf-8", "surrogatepass"))
            for _ in range(rng.randrange(1, 6)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
        return data.decode("utf-8", rng.choice(ERRORS))

    def _flood(self) -> str:
        """Up to `MAX_FLOOD` characters: one or two pieces over and over, inside or beside an example, or numbered."""
        rng = self.rng
        size = 1 << rng.randrange(10, 18)
        unit = self._piece() + (self._piece() if rng.random() < 0.5 else "") or "x"
        if rng.random() < 0.2:  # pieces that all differ, for whatever compares each with each
            count = min(size // (len(unit) + 5), 20_000)
            middle = "".join(f"{index}{unit}" for index in range(count))
        else:
            middle = unit * (size // len(unit))
        text = rng.choice(self.examples)
        at = rng.choice((0, len(text), rng.randrange(len(text) + 1)))
        return (text[:at] + middle + (text[at:] if rng.random() < 0.7 else ""))[:MAX_FLOOD]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _places(value: object) -> Iterator[tuple]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])  # type: ignore[index]


def from_bytes(data: bytes) -> str:
    """Text from a fuzzer's bytes: the first byte says how the rest is decoded."""
    return data[1:].decode("utf-8", ERRORS[data[0] & 1]) if data else ""
