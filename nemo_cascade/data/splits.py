"""Train, select and report tasks that cannot overlap, whatever seed drew them.

A task's content (prompt and truth, no seed) is hashed; its bucket out of ten fixes the split. Two runs, two seeds or
two versions of a generator can therefore never move a task from `report` into `train`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from nemo_cascade.types import Json, Message, Split, UserError

T = TypeVar("T")

BUCKETS = 10
FIRST_SELECT, FIRST_REPORT = 8, 9  # buckets 0-7 train, 8 select, 9 report


def content_sha(content: str) -> str:
    """The sha256 of a task's content, in hexadecimal."""
    return hashlib.sha256(content.encode()).hexdigest()


def content_id(domain: str, content: str) -> str:
    """`Task.id`: stable between runs, unique within a domain up to a 48-bit collision."""
    return f"{domain}-{content_sha(content)[:12]}"


def split_of(content: str) -> Split:
    """The one split a content belongs to: 80 % train, 10 % select, 10 % report."""
    bucket = int(content_sha(content), 16) % BUCKETS
    if bucket < FIRST_SELECT:
        return "train"
    return "select" if bucket < FIRST_REPORT else "report"


def task_content(messages: Sequence[Message], truth: Mapping[str, Json]) -> str:
    """The canonical text of a prompt and its truth: what `split_of` and `content_id` hash."""
    turns = [[message.role, message.content] for message in messages]
    return json.dumps([turns, dict(truth)], sort_keys=True)


def draw(
    make: Callable[[random.Random], T], content: Callable[[T], str], split: Split, count: int, seed: int
) -> list[T]:
    """`count` items of one split, with distinct contents, the same for the same seed.

    `make` draws one candidate from the given stream; candidates of other splits are thrown away. UserError when the
    generator's space holds fewer than `count` distinct contents of the split (found after 2,000 draws without a new
    one).
    """
    rng = random.Random(f"{split}/{seed}")
    items: list[T] = []
    seen: set[str] = set()
    misses = 0
    while len(items) < count:
        item = make(rng)
        text = content(item)
        if text in seen or split_of(text) != split:
            misses += 1
            if misses > 2_000:
                raise UserError(
                    f"split {split}: the generator has only about {len(items)} distinct tasks, {count} were asked for; "
                    "lower the count or widen the generator"
                )
            continue
        misses = 0
        seen.add(text)
        items.append(item)
    return items
