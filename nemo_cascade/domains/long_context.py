"""Long context: find one fact among many and answer with it alone (section 5.5; reward 1 or 0).

Nano: people and their keys between filler sentences; `keys` and `filler` set the length. Their answers must be exact.
Option `task` draws others of any length (`words`): `needle`, `multi_key`, `variables`, `common_words`; of the last two
the answer is a set of names, all of them and no other.
Released rows carry a `question` and an `expected_answer`; option `grading` says who compares: `judge` (section 4.6, a
model named by `equivalence_judge`) or `exact` (the last box or the whole answer, without case and final dot).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from nemo_cascade.data import haystack, rows, splits
from nemo_cascade.data.nano_words import FACTS, NAMES
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward.judge import grade_equivalence
from nemo_cascade.reward.math_equal import extract_boxed
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

MOST_WORDS = 1_000_000
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")


PHRASES = {
    "key": ("{name}'s key is {value}.", "What is {name}'s key?"),
    "has": ("{name} has {value}.", "What has {name}?"),
}
"""phrase -> (the fact, the question). In `has` name and value are close, which a nano model retrieves much sooner."""


def _make(rng: random.Random, keys: int, filler: int, phrase: str) -> Task:
    """`keys` people with two-digit keys, `filler` sentences of known facts between them, one question."""
    fact, question = PHRASES[phrase]
    names = rng.sample(NAMES, keys)
    values = rng.sample(range(11, 100), keys)
    lines = [fact.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    for noun in rng.sample(sorted(FACTS), filler):
        lines.insert(rng.randint(0, len(lines)), f"The {noun} is {FACTS[noun]}.")
    asked = rng.randrange(keys)
    return _task(lines, question.format(name=names[asked]), str(values[asked]), [str(value) for value in values])


def _task(lines: list[str], question: str, answer: str, values: list[str]) -> Task:
    truth: dict[str, Json] = {
        "question": question,
        "expected_answer": answer,
        "grading": "exact",
        "values": list(values),
    }
    return make_task(LongContext.name, " ".join([*lines, question]), truth)


class LongContext(SingleTurn):
    """Questions over long inputs, and their nano form."""

    name = "long_context"
    DEFAULTS: Mapping[str, Json] = {
        "keys": 4,
        "filler": 2,
        "phrase": "key",
        "grading": "judge",
        "task": "keys",
        "words": 1000,  # of the text, for tasks but `keys`
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        for key, low, high in (("keys", 2, len(NAMES)), ("filler", 0, len(FACTS))):
            value = self.options[key]
            if not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"data.options.long_context.{key}: {value!r} is no whole number from {low} to {high}")
        if self.options["phrase"] not in PHRASES:
            known = ", ".join(PHRASES)
            raise UserError(f"data.options.long_context.phrase: {self.options['phrase']!r} is not one of {known}")
        if self.options["task"] not in ("keys", *haystack.KINDS):
            known = ", ".join(("keys", *haystack.KINDS))
            raise UserError(f"data.options.long_context.task: {self.options['task']!r} is not one of {known}")
        if not 1 <= int(self.options["words"]) <= MOST_WORDS:
            raise UserError(f"data.options.long_context.words: {self.options['words']!r}; choose 1 to {MOST_WORDS}")
        if self.options["grading"] not in ("judge", "exact"):
            raise UserError(f"data.options.long_context.grading: {self.options['grading']!r}; choose judge or exact")

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `Fay's key is 54. The star is red. Ann's key is 37. What is Ann's key?`."""
        if self.options["task"] != "keys":
            kind, words = haystack.KINDS[str(self.options["task"])], int(self.options["words"])
            return splits.draw(lambda rng: _found_in(kind(rng, words)), content_of, split, count, seed)
        keys, filler = int(self.options["keys"]), int(self.options["filler"])
        phrase = str(self.options["phrase"])
        return splits.draw(lambda rng: _make(rng, keys, filler, phrase), content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The sentence found, then the bare number. Faults: somebody else's key, a boxed number, a chat sentence."""
        if "near" in task.truth:
            return _searched(task, random.Random(f"{task.id}/{seed}"), flaw_rate)
        if "values" not in task.truth:
            raise UserError(f"task {task.id}: only generated long_context tasks have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        answer = str(task.truth["expected_answer"])
        fact, question = PHRASES[str(self.options["phrase"])]
        before, _, after = question.partition("{name}")
        name = str(task.truth["question"]).removeprefix(before).removesuffix(after)
        reasoning = fact.format(name=name, value=answer) if task.thinking else ""
        content = answer
        if rng.random() < flaw_rate:
            other = rng.choice([value for value in task.truth["values"] if value != answer])
            content = rng.choice((other, other, f"\\boxed{{{answer}}}", f"Hello. It is {answer}. Bye."))
        return (Message("assistant", content, reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`question` and `expected_answer`; the context stands in the prompt."""
        expected = rows.field(
            {"expected_answer": rows.verifier_field(row, "expected_answer")}, "expected_answer", str, row_id
        )
        messages = rows.input_messages(row, row_id)
        question = rows.verifier_field(row, "question")
        asked = question if isinstance(question, str) else messages[-1].content
        truth: dict[str, Json] = {"question": asked, "expected_answer": expected, "grading": "judge"}
        if self.options["grading"] == "exact":
            truth["grading"] = "loose"  # exact but for a box, case and the final dot
        return make_task(self.name, messages, truth)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """Nano: exactly the expected text. Released rows: the judge's verdict, or equal texts, as `grading` says."""
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        answer, expected = transcript.final.content.strip(), str(task.truth["expected_answer"])
        if task.truth["grading"] == "judge":
            judge = self.services.equivalence_judge
            if judge is None:
                return Invalid(
                    "rows are graded by a judge; set equivalence_judge.url or .serve in the cascade file, or the "
                    "option grading: exact"
                )
            return grade_equivalence(judge, str(task.truth["question"]), expected, answer)
        if task.truth["grading"] == "loose":
            answer, expected = _boxed(answer).casefold().strip(" ."), expected.casefold().strip(" .")
        right = answer == expected
        if task.truth["grading"] == "set":
            given, wanted = _names(answer), _names(expected)
            right = set(given) == set(wanted) and len(given) == len(wanted)
        return Scored(float(right), reason="found" if right else f"wanted {expected[:40]!r}")

    def cases(self) -> list[Case]:
        """Two keys, answered rightly, wrongly and by cheating."""
        lines = ["Fay's key is 54.", "The star is red.", "Ann's key is 37."]
        task = _task(lines, "What is Ann's key?", "37", ["54", "37"])

        def case(content: str, reward: float, because: str, hack: bool = False, reasoning: str = "") -> Case:
            return Case(task, Transcript((Message("assistant", content, reasoning),)), reward, because, hack)

        return [
            case("37", 1.0, "the key asked for"),
            case(" 37\n", 1.0, "white space does not count"),
            case("54", 0.0, "somebody else's key"),
            case("\\boxed{37}", 0.0, "another domain's format"),
            case("Ann's key is 37.", 0.0, "the answer must stand alone"),
            case("54 37", 0.0, "all keys listed", hack=True),
            case(" ".join(lines), 0.0, "the context copied", hack=True),
            case("", 0.0, "the answer only inside the reasoning", hack=True, reasoning="37"),
            Case(task, Transcript((Message("assistant", "37"),), truncated=True), 0.0, "truncated", hack=True),
        ]


def _found_in(found: haystack.Haystack) -> Task:
    truth: dict[str, Json] = {
        "question": found.question,
        "expected_answer": found.answer,
        "grading": "set" if found.many else "exact",
        "near": list(found.near),
        "clue": found.clue,
    }
    return make_task(LongContext.name, f"{found.text}\n\n{found.question}", truth)


def _searched(task: Task, rng: random.Random, flaw_rate: float) -> tuple[Message, ...]:
    """What the answer rests on, then the answer; a flawed one missed something, or chats around it."""
    content = str(task.truth["expected_answer"])
    if rng.random() < flaw_rate:
        content = rng.choice([*task.truth["near"], f"Hello. It is {content}. Bye."])
    return (Message("assistant", content, str(task.truth["clue"]) if task.thinking else ""),)


def _names(text: str) -> list[str]:
    """Names between commas or white space."""
    return [name for name in re.split(r"[,\s]+", text.strip(" .").casefold()) if name]


def _boxed(text: str) -> str:
    """The content of the last \\boxed{}, out of its \\text{} if it has one; the text itself when nothing is boxed."""
    boxed = extract_boxed(text)
    if boxed is None:
        return text
    wrapped = TEXT_COMMAND.fullmatch(boxed)
    return wrapped.group(1) if wrapped else boxed


DOMAIN = LongContext
