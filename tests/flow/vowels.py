"""A domain whose reward differs between any two random texts, so that GRPO moves random weights."""

from __future__ import annotations

import random
from collections.abc import Mapping

from nemo_cascade.data import rows, splits
from nemo_cascade.domains import SingleTurn, content_of, make_task
from nemo_cascade.types import Case, Json, Message, Outcome, Scored, Split, Task, Transcript


def make(rng: random.Random) -> Task:
    """Any three letters."""
    return make_task("vowels", "".join(rng.sample("abcdefghijklm", 3)), {}, thinking=False)


class Vowels(SingleTurn):
    """Reward: the share of vowels among the characters of the answer."""

    name = "vowels"

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return splits.draw(make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        return (Message("assistant", "aeiou"),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        return make_task(self.name, rows.input_messages(row, row_id), {}, thinking=False)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        text = transcript.final.content
        return Scored(sum(letter in "aeiou" for letter in text) / max(len(text), 1))

    def cases(self) -> list[Case]:
        task = make(random.Random(0))
        return [Case(task, Transcript((Message("assistant", "aeio"),)), 1.0, "only vowels")]
