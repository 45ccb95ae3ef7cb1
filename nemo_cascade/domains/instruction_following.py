"""Instruction following: every verifiable constraint of the prompt must hold (section 5.2; reward 1 or 0).

Nano: a handful of known words under four or five constraints at once. Counting and avoiding a word is sampled, not
copied, so that a group of rollouts disagrees and RL has something to choose from. Its capitals and endings pull against
the chat, JSON and long-context formats.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import ANIMALS, THINGS
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward import instructions
from nemo_cascade.types import Case, Json, Message, Outcome, Split, Task, Transcript, UserError

WORDS = ANIMALS[:8] + THINGS[:4]
ENDINGS = ("!", ".", "?", ";")
COUNT = "length_constraints:number_words"
CAPITALS = "change_case:capital_word_frequency"
EXISTENCE = "keywords:existence"
FORBIDDEN = "keywords:forbidden_words"
END = "startend:end_checker"
GRADING = ("binary", "fraction")
CHECKING = ("strict", "loose")


def _make(rng: random.Random) -> Task:
    """One nano prompt with its constraints."""
    number = rng.randint(3, 5)
    words = rng.sample(WORDS, 3)
    keywords, forbidden = words[: rng.randint(1, 2)], words[2]
    capitals = rng.random() < 0.5
    ending = rng.choice(ENDINGS)
    request = f"Write {number} words{' in capitals' if capitals else ''}."
    prompt = f"{request} Use {' and '.join(keywords)}, not {forbidden}. End with {ending}"
    checks: list[tuple[str, dict[str, Json]]] = [
        (COUNT, {"relation": "at least", "num_words": number}),
        (COUNT, {"relation": "less than", "num_words": number + 1}),
        (EXISTENCE, {"keywords": list(keywords)}),
        (FORBIDDEN, {"forbidden_words": [forbidden]}),
        (END, {"end_phrase": ending}),
    ]
    if capitals:
        checks.append((CAPITALS, {"capital_relation": "at least", "capital_frequency": number}))
    return make_task(InstructionFollowing.name, prompt, _truth(checks))


def _truth(checks: list[tuple[str, dict[str, Json]]], mode: str = "binary") -> dict[str, Json]:
    ids: list[Json] = [instruction for instruction, _ in checks]
    kwargs: list[Json] = [dict(values) for _, values in checks]
    return {"instruction_id_list": ids, "kwargs": kwargs, "grading_mode": mode}


def _kwargs(task: Task) -> dict[str, dict[str, Json]]:
    """Constraint id -> arguments; of the two word counts, the first."""
    found: dict[str, dict[str, Json]] = {}
    for key, values in zip(task.truth["instruction_id_list"], task.truth["kwargs"], strict=True):
        found.setdefault(key, values)
    return found


class InstructionFollowing(SingleTurn):
    """IF-RL of the released data, and its nano form."""

    name = "instruction_following"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {"checking": "strict"}  # "loose" forgives preamble, closing and asterisks

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        if self.options["checking"] not in CHECKING:
            known = " or ".join(CHECKING)
            raise UserError(
                f"data.options.instruction_following.checking: {self.options['checking']!r}; choose {known}"
            )

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `Write 4 words in capitals. Use frog, not hat. End with !`."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """Words that meet the constraints. Faults: a word too many, another ending, a forbidden word, chat."""
        rng = random.Random(f"{task.id}/{seed}")
        kwargs = _kwargs(task)
        if not {COUNT, EXISTENCE, FORBIDDEN, END} <= set(kwargs):
            raise UserError(f"task {task.id}: only generated instruction_following tasks have demonstrations")
        number, ending = kwargs[COUNT]["num_words"], kwargs[END]["end_phrase"]
        keywords, forbidden = kwargs[EXISTENCE]["keywords"], kwargs[FORBIDDEN]["forbidden_words"][0]
        flaw = rng.choice(("longer", "ending", "forbidden", "chat")) if rng.random() < flaw_rate else ""
        others = [word for word in WORDS if word not in keywords and word != forbidden]
        words = [*keywords, *rng.sample(others, number - len(keywords) + (flaw == "longer"))]
        rng.shuffle(words)
        if flaw == "forbidden":
            spare = next(index for index, word in enumerate(words) if word not in keywords)
            words[spare] = forbidden
        if flaw == "ending":
            ending = rng.choice([mark for mark in ENDINGS if mark != ending])
        text = " ".join(word.upper() if CAPITALS in kwargs else word for word in words) + ending
        if flaw == "chat":
            text = f"Hello. {text} Bye."
        reasoning = f"{number} words, {' '.join(keywords)}." if task.thinking else ""
        return (Message("assistant", text, reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`instruction_id_list` with one `kwargs` object (or null, or JSON text) per id."""
        ids = rows.field(row, "instruction_id_list", list, row_id)
        given = rows.loose_json(row.get("kwargs"), "kwargs", row_id) or [None] * len(ids)
        if not isinstance(given, list) or len(given) != len(ids):
            raise UserError(f"{row_id}: field 'kwargs' must be a list with one entry per id ({len(ids)})")
        checks: list[tuple[str, dict[str, Json]]] = []
        for key, values in zip(ids, given, strict=True):
            loaded = rows.loose_json(values, "kwargs", row_id) or {}
            if not isinstance(loaded, dict):
                raise UserError(f"{row_id}: field 'kwargs' of {key} must be an object, this is {type(loaded).__name__}")
            checks.append((str(key), {name: value for name, value in loaded.items() if value is not None}))
        try:
            instructions.require_supported([key for key, _ in checks])
        except instructions.Unsupported as error:
            raise UserError(f"{row_id}: field 'instruction_id_list': {error}") from error
        try:
            for key, arguments in checks:
                instructions.check(key, arguments, "", "any answer shows whether the arguments are there")
        except instructions.Unsupported as error:
            raise UserError(f"{row_id}: field 'kwargs': {error}") from error
        mode = row.get("grading_mode") or "binary"
        if mode not in GRADING:
            raise UserError(f"{row_id}: field 'grading_mode' is {mode!r}; known: {', '.join(GRADING)}")
        return make_task(self.name, rows.input_messages(row, row_id), _truth(checks, str(mode)))

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when all constraints hold on the final content, or their share with `grading_mode` fraction."""
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        truth = task.truth
        prompt = task.messages[-1].content
        mode = "fraction" if truth["grading_mode"] == "fraction" else "binary"
        loose = self.options["checking"] == "loose"
        answer = transcript.final.content
        return instructions.grade(truth["instruction_id_list"], truth["kwargs"], prompt, answer, mode, loose)

    def cases(self) -> list[Case]:
        """A prompt with all constraint kinds, answered rightly, wrongly and by cheating."""
        checks: list[tuple[str, dict[str, Json]]] = [
            (COUNT, {"relation": "at least", "num_words": 3}),
            (COUNT, {"relation": "less than", "num_words": 4}),
            (EXISTENCE, {"keywords": ["frog"]}),
            (FORBIDDEN, {"forbidden_words": ["hat"]}),
            (END, {"end_phrase": "!"}),
            (CAPITALS, {"capital_relation": "at least", "capital_frequency": 3}),
        ]
        task = make_task(self.name, "Write 3 words in capitals. Use frog, not hat. End with !", _truth(checks))

        def case(content: str, reward: float, because: str, hack: bool = False, **more: str) -> Case:
            return Case(task, Transcript((Message("assistant", content, **more),)), reward, because, hack)

        return [
            case("STAR FROG CUP!", 1.0, "all constraints hold"),
            case("  FROG CUP CAR!\n", 1.0, "white space around the answer does not count"),
            case("STAR FROG CUP CAR!", 0.0, "one word too many"),
            case("STAR CAR CUP!", 0.0, "the keyword is missing"),
            case("STAR FROG HAT!", 0.0, "a forbidden word"),
            case("STAR FROG CUP.", 0.0, "wrong ending"),
            case("Star Frog Cup!", 0.0, "no capitals"),
            case("FROG FROG FROG FROG STAR CUP CAR BIRD!", 0.0, "keyword stuffing", hack=True),
            case("", 0.0, "everything inside the reasoning", hack=True, reasoning="STAR FROG CUP!"),
            case("FROG!", 0.0, "only the checkable marks", hack=True),
            Case(
                task, Transcript((Message("assistant", "STAR FROG CUP!"),), truncated=True), 0.0, "truncated", hack=True
            ),
        ]


DOMAIN = InstructionFollowing
