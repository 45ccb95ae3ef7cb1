"""Math: the expression in the last \\boxed{} equals the expected answer (reward 1 or 0).

Option `judge: true` asks the equivalence judge, in both orders, about boxed answers that algebra finds unequal or too
expensive to compare (NeMo-Gym's `math_with_judge`): words, units, forms that no parser knows. Integers, overlong
answers, towers, and sums or limits that nobody has worked out are never left to it: these are decided, or the question
again.

Nano: sums of two numbers below 100, worked digit by digit in the reasoning. GSM8K rows (`question`, `answer` ending in
`#### N`) and the released `question`/`expected_answer` rows load as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import NAMES, THINGS
from nemo_cascade.domains import SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward.judge import grade_sameness
from nemo_cascade.reward.math_equal import extract_boxed, is_runaway
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

GSM8K_INSTRUCTION = "\n\nPut the final answer (and only the answer) inside \\boxed{}."
UNDECIDED = ("not equal", "comparison needs more than")
"""How the grader's reasons begin where a judge may see more than algebra did."""


def _make(rng: random.Random) -> Task:
    """A bare sum or a story of the same sum; the result stays below 100."""
    first = rng.randint(11, 79)
    second = rng.randint(11, 99 - first)
    if rng.random() < 0.5:
        return _task(f"{first}+{second}=?", first, second)
    name, thing = rng.choice(NAMES), rng.choice(THINGS[:6])
    return _task(f"{name} has {first} {thing}s and gets {second}. How many?", first, second)


def _task(prompt: str, first: int, second: int) -> Task:
    truth: dict[str, Json] = {"expected_answer": str(first + second), "terms": [first, second]}
    return make_task(Math.name, prompt, truth)


def _steps(first: int, second: int) -> str:
    """Units, then tens with the carry: `5+7=12 2+1+1=4`."""
    units = first % 10 + second % 10
    tens = first // 10 + second // 10 + units // 10
    carry = "+1" if units > 9 else ""
    return f"{first % 10}+{second % 10}={units} {first // 10}+{second // 10}{carry}={tens}"


def content_of_question(task: Task) -> str:
    """What the policy was asked, as the judge reads it: the last user turn."""
    return next((message.content for message in reversed(task.messages) if message.role == "user"), "")


class Math(SingleTurn):
    """Short-answer mathematics in the released schema, and its nano form."""

    name = "math"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {"judge": False}

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `25+17=?`."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The column sum, then the box. Faults: a slipped carry, a bare number, the number in a chat sentence."""
        if "terms" not in task.truth:
            raise UserError(f"task {task.id}: only generated math tasks have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        first, second = task.truth["terms"]
        answer = int(str(task.truth["expected_answer"]))
        reasoning = _steps(first, second) if task.thinking else ""
        content = f"\\boxed{{{answer}}}"
        if rng.random() < flaw_rate:
            slipped = answer + rng.choice((-10, 10, -1, 1))
            content = rng.choice(
                (f"\\boxed{{{slipped}}}", f"\\boxed{{{slipped}}}", str(answer), f"Hello. It is {answer}. Bye.")
            )
        return (Message("assistant", content, reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`expected_answer`, or GSM8K's `question` with an `answer` that ends in `#### N`."""
        expected = rows.verifier_field(row, "expected_answer")
        if expected is None and "answer" in row:
            _, mark, final = rows.field(row, "answer", str, row_id).rpartition("####")
            if not mark:
                raise UserError(f"{row_id}: field 'answer' has no '#### N' at its end")
            question = rows.field(row, "question", str, row_id)
            return make_task(
                self.name, question + GSM8K_INSTRUCTION, {"expected_answer": final.strip().replace(",", "")}
            )
        if expected is None or isinstance(expected, bool | list | dict):
            raise UserError(
                f"{row_id}: field 'expected_answer' is missing or no text; GSM8K rows have 'answer' with '#### N'"
            )
        return make_task(self.name, rows.input_messages(row, row_id), {"expected_answer": str(expected)})

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the final content's last box equals the expected answer as mathematics."""
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        expected, content = str(task.truth["expected_answer"]), transcript.final.content
        outcome = self.services.math_grader().grade(expected, content)
        if not self.options["judge"] or isinstance(outcome, Invalid) or not outcome.reason.startswith(UNDECIDED):
            return outcome
        answer = extract_boxed(content) or ""
        if is_runaway(answer):
            return outcome
        judge = self.services.equivalence_judge
        if judge is None:
            return Invalid(
                "option judge of domain math needs a judge; set equivalence_judge.url or .serve in the cascade file"
            )
        asked = grade_sameness(judge, content_of_question(task), expected, answer)
        if isinstance(asked, Invalid):
            return asked
        return Scored(asked.reward, {**asked.parts, "judge": 1.0}, f"{outcome.reason}; the judge: {asked.reason}")

    def cases(self) -> list[Case]:
        """A sum answered rightly, wrongly and by cheating."""
        task = _task("25+17=?", 25, 17)

        def case(content: str, reward: float, because: str, hack: bool = False, reasoning: str = "") -> Case:
            return Case(task, Transcript((Message("assistant", content, reasoning),)), reward, because, hack)

        return [
            case("\\boxed{42}", 1.0, "the right number"),
            case("So the sum is \\boxed{42.0}", 1.0, "equal as a number"),
            case("\\boxed{\\frac{84}{2}}", 1.0, "equal as an expression"),
            case("\\boxed{32}", 0.0, "the carry is missing"),
            case("42", 0.0, "no box"),
            case("\\boxed{}", 0.0, "an empty box"),
            case("\\boxed{42} or \\boxed{41}", 0.0, "the last box decides", hack=True),
            case("\\boxed{40, 41, 42, 43}", 0.0, "several numbers in one box", hack=True),
            case("\\boxed{9^{9^{9^{9}}}}", 0.0, "a tower that would stall the grader", hack=True),
            case("", 0.0, "the answer only inside the reasoning", hack=True, reasoning="\\boxed{42}"),
            Case(task, Transcript((Message("assistant", "\\boxed{42}"),), truncated=True), 0.0, "truncated", hack=True),
        ]


DOMAIN = Math
