"""Every parser of what a model writes takes any text, or any bytes, within its time and without an escaping exception.

`NEMO_CASCADE_FUZZ=100000 python -m pytest tests/contracts/test_fuzz.py` tries that many per parser; the default is
small. Texts are arbitrary (surrogates and control characters too) or made of the words that the parsers look for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_cascade.data.chat import parse_text
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.domains import code
from nemo_cascade.reward import instructions, mcqa, repair_judge, schema, wire
from nemo_cascade.reward.assertions import plain
from nemo_cascade.reward.genrm import parse_verdict
from nemo_cascade.reward.judge import _content, parse_equivalence
from nemo_cascade.reward.math_equal import extract_boxed, is_runaway, normalized
from nemo_cascade.reward.patience import retry_after
from nemo_cascade.reward.repair_judge import Repair, grade_repair, repair_prompt
from nemo_cascade.reward.repository import _read_report
from nemo_cascade.reward.row_scripts import last_fence, read_summary
from nemo_cascade.reward.search_replace import BadEdit, apply_diff, apply_edits, parse_diff, parse_edits
from nemo_cascade.types import Tool, UserError

EXAMPLES = int(os.environ.get("NEMO_CASCADE_FUZZ", "60"))
SECONDS = 5.0  # CPU time of one call
WORDS = (
    *("\\boxed{", "}", "{", "[", "]", "(", ")", "^", "!", "\\frac", "\\text{", "42", "A", "B"),
    *("Answer: ", "answer:", ",",),
    *("```", "```python\n", "def f(x): return x\n", "\n", " ", "\t", "<think>", "</think>"),
    *("<tool_call>\n", "</tool_call>",),
    *("<function=f>\n", "</function>\n", "<parameter=a>\n", "</parameter>\n", "<solution>"),
    *("</solution>", "### a.py\n",),
    *("<<<<<<< SEARCH\n", "=======\n", ">>>>>>> REPLACE\n", "x = 1\n", "--- a/a.py\n", "+++ b/a.py\n"),
    *("@@ -1,1 +1,1 @@\n",),
    *("-x = 1\n", "+x = 2\n", "\\ No newline at end of file\n", "rename from a.py\n"),
    *("GIT binary patch\n", "@@ -0,0 +1 @@\n",),
    *('"', "'", '{"score_1": 5, "score_2": 1, "ranking": 2}', '"overall": ', "CORRECT", "INCORRECT"),
    *("NaN", "1e999", "null", '{"choices": [', '{"message": {"content": ', "}}]}", "Wed, 21 Oct 2015 07:28:00 GMT"),
    *('"a": ', "nonce\tpassed\tt\t\n", "nonce\tend\n", "\ud800", "\0", "\u202e", "\x85", "\u2028"),
    *("9" * 50, "a" * 300, "$",),
    *("<judgement>", "YES", "</judgement>", "<|im_end|>", "[/INST]", "=== short test summary info ===\n"),
    *("PASSED a.py::t\n", "\x1b[32m"),
)
FILES = {"a.py": "x = 1\n", "b/c.py": ""}
CHECKS = (
    ("keywords:existence", {"keywords": ["a"]}),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("combination:two_responses", {}),
    ("startend:quotation", {}),
)
KEYS = ("type", "output", "role", "content", "text", "arguments", "name", "refusal", "int", "dict", "set")
anything = st.one_of(
    st.text(st.characters(), max_size=400),
    st.lists(st.sampled_from(WORDS), max_size=60).map("".join),
    st.binary(max_size=400).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.tuples(st.sampled_from(WORDS), st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    ),
    max_leaves=12,
)


def _edits(text: str) -> None:
    apply_edits(FILES, parse_edits(text))


def _diff(text: str) -> None:
    apply_diff(FILES, parse_diff(text))


def _repairs(text: str) -> None:
    gold = {**FILES, "a.py": "x = 2\n"}
    grade_repair(None, Repair("", FILES, text, gold), apply_edits(FILES, parse_edits(text)))


def _letters(text: str) -> None:
    for mode in mcqa.MODES:
        mcqa.extract_letter(text, {"A": "one", "B": "two"}, mode)
    mcqa.extract_letter(text, {"A": "one", "B": "two"}, output_regex=r"answer:\s*\(?([A-B])\)?")


def _calls(text: str) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "object"}}})
    for thinking in (True, False):
        parse_text(text, thinking, (tool,))


def _source(text: str) -> None:
    code._broken(code.extract_code(text), "python")


def _constraints(text: str) -> None:
    instructions.grade([key for key, _ in CHECKS], [dict(kwargs) for _, kwargs in CHECKS], "Say a.", text, "fraction")


def _mathematics(text: str) -> None:
    is_runaway(normalized(text))


SCHEMA = '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"items": {"type": "number"}}}}'
TEXTS: dict[str, tuple[Callable[[str], object], tuple[type[Exception], ...]]] = {
    "boxes": (extract_boxed, ()),
    "mathematics": (_mathematics, ()),
    "letters": (_letters, ()),
    "json": (lambda text: schema.grade(SCHEMA, text), ()),
    "edits": (_edits, (BadEdit,)),
    "diffs": (_diff, (BadEdit,)),
    "code": (_source, ()),
    "calls": (_calls, ()),
    "constraints": (_constraints, ()),
    "verdicts": (parse_verdict, ()),
    "equivalence": (parse_equivalence, ()),
    "chat replies": (_content, (ValueError,)),
    "pauses": (retry_after, ()),
    "repairs": (_repairs, (BadEdit,)),
    "repair prompts": (lambda text: repair_prompt(Repair(text, {text: text}, text), text), ()),
    "repair verdicts": (repair_judge.parse_verdict, ()),
    "summaries": (read_summary, ()),
    "fences": (last_fence, ()),
    "reports": (lambda text: _read_report(text, "nonce"), ()),
}
many = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def within_time(parse: Callable[[object], object], value: object, allowed: tuple[type[Exception], ...]) -> None:
    started = time.thread_time()
    try:
        parse(value)
    except allowed:
        return
    finally:
        assert time.thread_time() - started < SECONDS


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_any_text(name: str) -> None:
    parse, allowed = TEXTS[name]

    @many
    @given(anything)
    def tried(text: str) -> None:
        within_time(parse, text, allowed)  # type: ignore[arg-type]

    tried()


@many
@given(values)
def test_any_response_object(value: object) -> None:
    within_time(lambda item: transcript_of({"output": [item]}, "row"), value, (UserError,))  # type: ignore[list-item]


@many
@given(values)
def test_any_answer_of_a_candidate(value: object) -> None:
    within_time(plain, value, (ValueError, TypeError, KeyError, OverflowError, AttributeError))


@many
@given(st.binary(max_size=600))
def test_any_frame(data: bytes) -> None:
    within_time(wire.decode, data, (ValueError,))  # type: ignore[arg-type]
