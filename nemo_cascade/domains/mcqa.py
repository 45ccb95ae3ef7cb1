"""Multiple choice: the letter in the last \\boxed{} or by the row's own pattern (section 5.3; reward 1 or 0).

Nano: colors of things that the base model knows by heart; what is learned is to link the fact to a letter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import COLORS, FACTS
from nemo_cascade.domains import SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward import mcqa
from nemo_cascade.types import Case, Json, Message, Outcome, Split, Task, Transcript, UserError

LETTERS = "ABCD"


def _make(rng: random.Random) -> Task:
    """`What color is the frog?` or, half of the time, `Which is pink?`, with four options."""
    noun = rng.choice(sorted(FACTS))
    color = FACTS[noun]
    if rng.random() < 0.5:
        question, right = f"What color is the {noun}?", color
        wrong = rng.sample([other for other in COLORS if other != color], 3)
    else:
        question, right = f"Which is {color}?", noun
        wrong = rng.sample([other for other in sorted(FACTS) if FACTS[other] != color], 3)
    texts = [right, *wrong]
    rng.shuffle(texts)
    return _task(question, texts, LETTERS[texts.index(right)], f"The {noun} is {color}.")


def _task(question: str, texts: list[str], answer: str, fact: str) -> Task:
    options: list[Json] = [{letter: text} for letter, text in zip(LETTERS, texts, strict=True)]
    listed = " ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, texts, strict=True))
    truth: dict[str, Json] = {
        "options": options,
        "expected_answer": answer,
        "grading_mode": "strict_single_letter_boxed",
        "output_regex": None,
        "fact": fact,
    }
    return make_task(McQA.name, f"{question} {listed}", truth)


class McQA(SingleTurn):
    """STEM questions with options in the released data, and their nano form."""

    name = "mcqa"

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `What color is the frog? A: pink B: blue C: green D: gold`."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The fact, then the boxed letter. Faults: another letter, no box, the option's text in chat style."""
        rng = random.Random(f"{task.id}/{seed}")
        answer, fact = str(task.truth["expected_answer"]), str(task.truth.get("fact") or "")
        reasoning = fact if task.thinking else ""
        content = f"\\boxed{{{answer}}}"
        if rng.random() < flaw_rate:
            letters = [next(iter(option)) for option in task.truth["options"]]
            other = rng.choice([letter for letter in letters if letter != answer])
            content = rng.choice((f"\\boxed{{{other}}}", f"\\boxed{{{other}}}", answer, f"Hello. {fact} Bye."))
        return (Message("assistant", content, reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`options` (one-letter objects, or one object), `expected_answer`, `template_metadata.output_regex`."""
        given = rows.loose_json(rows.verifier_field(row, "options"), "options", row_id)
        answer = rows.field(
            {"expected_answer": rows.verifier_field(row, "expected_answer")}, "expected_answer", str, row_id
        )
        metadata = rows.verifier_field(row, "template_metadata")
        pattern = metadata.get("output_regex") if isinstance(metadata, dict) else None
        if pattern is not None:
            pattern = rows.field({"output_regex": pattern}, "output_regex", str, f"{row_id} template_metadata")
        mode = row.get("grading_mode") or mcqa.MODES[0]
        try:
            letters = mcqa.truth_options(given)
            if pattern is not None:
                mcqa.checked_regex(pattern)
        except UserError as error:
            raise UserError(f"{row_id}: {error}") from error
        if answer.strip().upper() not in letters:
            raise UserError(f"{row_id}: field 'expected_answer' is {answer!r}; the options are {', '.join(letters)}")
        if mode not in mcqa.MODES:
            raise UserError(f"{row_id}: field 'grading_mode' is {mode!r}; known: {', '.join(mcqa.MODES)}")
        truth: dict[str, Json] = {
            "options": given,
            "expected_answer": answer.strip().upper(),
            "grading_mode": mode,
            "output_regex": pattern,
        }
        return make_task(self.name, rows.input_messages(row, row_id), truth)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the final content names the expected letter, and only that one."""
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        truth = task.truth
        options = mcqa.truth_options(truth["options"])
        content, pattern = transcript.final.content, truth.get("output_regex")
        return mcqa.grade(str(truth["expected_answer"]), content, options, truth["grading_mode"], pattern)

    def cases(self) -> list[Case]:
        """The color of the frog, answered rightly, wrongly and by cheating."""
        task = _task("What color is the frog?", ["pink", "black", "green", "gold"], "B", "The frog is black.")

        def case(content: str, reward: float, because: str, hack: bool = False, reasoning: str = "") -> Case:
            return Case(task, Transcript((Message("assistant", content, reasoning),)), reward, because, hack)

        return [
            case("\\boxed{B}", 1.0, "the right letter"),
            case("The frog is black, so \\boxed{B}.", 1.0, "text around the box is allowed"),
            case("\\boxed{A}", 0.0, "another letter"),
            case("B", 0.0, "no box"),
            case("I do not know.", 0.0, "no letter"),
            case("\\boxed{A, B, C, D}", 0.0, "all letters listed in one box", hack=True),
            case("\\boxed{ABCD}", 0.0, "all letters run together", hack=True),
            case("\\boxed{A} \\boxed{C} \\boxed{D}", 0.0, "several boxes, none of them right", hack=True),
            case("", 0.0, "the answer only inside the reasoning", hack=True, reasoning="\\boxed{B}"),
            Case(task, Transcript((Message("assistant", "\\boxed{B}"),), truncated=True), 0.0, "truncated", hack=True),
        ]


DOMAIN = McQA
