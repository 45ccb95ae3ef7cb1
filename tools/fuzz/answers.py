"""Answers that are graded by their text: boxes, letters, documents, programs, constraints."""

from __future__ import annotations

import json

from nemo_cascade.data.responses import split_thinking
from nemo_cascade.domains import code, long_context, unanswered
from nemo_cascade.reward import instructions, judge, mcqa, schema
from nemo_cascade.reward.math_equal import MathGrader, extract_boxed, is_runaway, normalized
from nemo_cascade.reward.search_replace import solution_part
from nemo_cascade.types import Json, Message, Scored, Transcript
from tools.fuzz import grammars
from tools.fuzz.catalogue import parser
from tools.fuzz.grammars import Grammar


@parser("boxes", grammars.MATHEMATICS, "math mcqa long_context", "reward.math_equal")
def _boxes(text: str) -> object:
    return extract_boxed(text)


class _Unasked(MathGrader):
    """What is left for algebra is not asked: that runs in a process which can be killed."""

    def _ask(self, gold: str, prediction: str) -> Scored:
        return Scored(0.0, reason=f"asked: {gold} {prediction}")


@parser(
    "mathematics", grammars.MATHEMATICS, "math", "reward.math_equal reward.math_reader reward.math_size"
)  # fmt: skip
def _mathematics(text: str) -> object:
    """An answer, and an expected one: rows are as long as they like."""
    grader = _Unasked()
    said = [grader.equal("\\frac{1}{2}", text), grader.grade("9^{9^{9}}", text), grader.equal(text[:2000], "x+1")]
    return said, is_runaway(normalized(text)), is_runaway(text)


@parser("letters", grammars.LETTERS, "mcqa", "reward.mcqa")
def _letters(text: str) -> object:
    options = {"A": "one", "B": "two"}
    found = [mcqa.extract_letter(text, options, mode) for mode in mcqa.MODES]
    return [*found, mcqa.extract_letter(text, options, output_regex=r"answer\s*:\s*\(?([A-B])\)?")]


@parser("thinking", grammars.THOUGHTS, "long_context math mcqa preference", "data.responses domains.long_context")
def _thinking(text: str) -> object:
    _, said = split_thinking(judge._THINKING.sub("", text))
    refused = unanswered(Transcript((Message("assistant", said),)))
    return refused, solution_part(said), long_context._boxed(said), long_context._names(said)


SCHEMA = json.dumps({
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "array", "items": {"type": ["number", "null"]}},
        "c": {"type": "object", "properties": {"d": {"type": "boolean"}, "e": {"type": ["integer", "null", "string"]}}},
    },
})  # fmt: skip
ROOTED = json.dumps({"type": "object", "properties": {"r": json.loads(SCHEMA)}})
ROWS = json.dumps({
    "type": "array",
    "items": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": ["number", "boolean"]}}},
})  # fmt: skip


def _document(kind: str, grammar: Grammar, schema_text: str, seconds: float) -> None:
    modules = "reward.schema" if kind == "json" else "reward.documents"

    @parser(kind, grammar, "structured_output", modules, seconds=seconds)
    def read(text: str) -> object:
        return schema.grade(schema_text, text, kind)


for _kind, _grammar, _schema, _seconds in (
    ("json", grammars.JSON, SCHEMA, 1.0), ("xml", grammars.XML, ROOTED, 1.0), ("toml", grammars.TOML, SCHEMA, 1.0),
    ("csv", grammars.CSV, ROWS, 1.0), ("yaml", grammars.YAML, SCHEMA, 4.0),  # PyYAML reads 130 kB a second
):  # fmt: skip
    _document(_kind, _grammar, _schema, _seconds)


@parser("programs", grammars.PROGRAMS, "code", "domains.code")
def _programs(text: str) -> object:
    source = code.extract_code(text)
    return code._broken(source, "python"), code._broken(source, "cpp")


@parser("printed output", grammars.OUTPUT, "code", "domains.code")
def _printed(text: str) -> object:
    """What a program printed, beside what it should print."""
    wanted = ("3 1.50\n-2e5\n", "yes\n", text[1:])
    return [same(text, each) for same in code.COMPARISONS.values() for each in wanted]


ARGUMENTS: dict[str, Json] = {
    **dict.fromkeys(
        ("N", "n", "m", "small_n", "n_start", "n_sent", "n_words", "num_bullets", "num_sentences", "num_words",
         "frequency", "capital_frequency", "let_frequency", "num_paragraphs", "num_placeholders", "num_highlights",
         "num_sections", "min_words", "nth_paragraph", "percentage"), 2,
    ),
    **{"n_end": 9, "max_words": 40, "relation": "at least", "capital_relation": "less than"},
    **{"let_relation": "at least"},
    **dict.fromkeys(("keyword", "keyword1", "word", "first_word", "letter"), "frog"),
    **{"keyword2": "cat", "keywords": ["frog", "star"], "forbidden_words": ["hat"], "last_word": "end", "letter": "e"},
    **{"prompt_to_repeat": "Say frog twice.", "phrase": "the frog sat on it", "sep": "-", "options": "yes/no/maybe"},
    **{"section_spliter": "SECTION", "postscript_marker": "P.S.", "end_phrase": "Bye.", "language": "en"},
    **{"reference_text": "The frog sat on the old wall and sang a song."},
}  # fmt: skip
"""Every argument that any instruction asks for, so that each check can be made of every text."""


@parser(
    "instructions", grammars.WRITING, "instruction_following", "reward.instructions domains.instruction_following",
    seconds=5.0,
)  # fmt: skip
def _instructions(text: str) -> object:
    """All checks of one text. The limit is that of all of them together."""
    return [instructions.check(name, ARGUMENTS, "Say frog twice.", text) for name in instructions.CHECKS]


@parser("loose instructions", grammars.WRITING, "instruction_following", "reward.instructions")
def _loose(text: str) -> object:
    ids = ("startend:end_checker", "detectable_format:json_format")
    return instructions.grade(ids, [ARGUMENTS] * len(ids), "", text, "fraction", loose=True)
