"""A domain in one file, outside the package: say the words backwards. `02_add_a_domain.py` trains it."""

import random
from collections.abc import Mapping

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import THINGS
from nemo_cascade.domains import SingleTurn, content_of, make_task, unanswered
from nemo_cascade.types import Case, Json, Message, Outcome, Scored, Split, Task, Transcript


def make(rng: random.Random) -> Task:
    """Two or three words and their reverse."""
    words = rng.sample(THINGS, rng.randint(2, 3))
    return make_task("reverse_words", f"Backwards: {' '.join(words)}", {"expected_answer": " ".join(reversed(words))})


class ReverseWords(SingleTurn):
    """Reward: the share of words that stand at the right place; 1 only for the exact answer."""

    name = "reverse_words"

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `Backwards: cup road`."""
        return splits.draw(make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The right answer; a faulty one keeps the given order."""
        words = str(task.truth["expected_answer"]).split()
        faulty = random.Random(f"{task.id}/{seed}").random() < flaw_rate
        return (Message("assistant", " ".join(reversed(words) if faulty else words)),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """Rows with `expected_answer`."""
        expected = rows.field(row, "expected_answer", str, row_id)
        return make_task(self.name, rows.input_messages(row, row_id), {"expected_answer": expected})

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """A pure function of task and transcript."""
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        expected = str(task.truth["expected_answer"]).split()
        given = transcript.final.content.split()
        if len(given) != len(expected):
            return Scored(0.0, reason=f"{len(given)} words instead of {len(expected)}")
        share = sum(a == b for a, b in zip(given, expected, strict=True)) / len(expected)
        return Scored(share, reason="all in place" if share == 1.0 else f"{share:.0%} in place")

    def cases(self) -> list[Case]:
        """Gold and anti-gold: `nemo-cascade audit` and the contract test run them."""
        task = make_task(self.name, "Backwards: cup road", {"expected_answer": "road cup"})

        def case(content: str, reward: float, because: str) -> Case:
            return Case(task, Transcript((Message("assistant", content),)), reward, because)

        return [
            case("road cup", 1.0, "reversed"),
            case("cup road", 0.0, "as given"),
            case("road", 0.0, "a word is missing"),
        ]
