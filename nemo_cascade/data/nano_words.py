"""The small shared vocabulary of the nano tasks, and the facts that a nano base model learns by heart.

The lists are short on purpose: each word is one token of the 512-entry tokenizer, and the same words in every domain
make the domains interfere, which is what the cascade has to manage.
"""

from __future__ import annotations

import random

NAMES = ("Ann", "Bob", "Dan", "Eva", "Fay", "Gus", "Ivy", "Jim", "Kim", "Lee", "Max", "Zoe")
COLORS = ("red", "blue", "green", "pink", "gold", "gray", "black", "white")
ANIMALS = ("fish", "cat", "dog", "bird", "frog", "cow", "fox", "bee")
THINGS = ("car", "hat", "road", "star", "door", "cup", "lamp", "ship", "box", "tree", "bell", "sock")
CITIES = ("Rome", "Lima", "Oslo", "Bern", "Cairo", "Paris")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def _facts() -> dict[str, str]:
    """Each animal and thing gets one color; every color is used at least twice."""
    rng = random.Random("facts")
    nouns = list(ANIMALS + THINGS)
    colors = [COLORS[i % len(COLORS)] for i in range(len(nouns))]
    rng.shuffle(colors)
    return dict(zip(nouns, colors, strict=True))


FACTS: dict[str, str] = _facts()
"""noun -> color, fixed for ever: changing it invalidates the shipped base model."""
