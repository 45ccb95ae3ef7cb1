"""What fuzzing found, kept: inputs that once escaped a parser as an exception, or took it minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.data.chat import ChatTokenizer, parse_text
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.data.rows import MAX_NESTING, loose_json, too_deep
from nemo_cascade.reward import instructions, judge, mcqa, schema, workplace_office
from nemo_cascade.reward.control_tests import controls, mixed
from nemo_cascade.reward.genrm import parse_verdict
from nemo_cascade.reward.math_equal import is_runaway
from nemo_cascade.reward.math_reader import Reader
from nemo_cascade.reward.row_scripts import judged
from nemo_cascade.reward.runtimes import ContainerLost
from nemo_cascade.reward.search_replace import BadEdit, apply_edits, parse_diff, parse_edits
from nemo_cascade.reward.swe import grading
from nemo_cascade.reward.swe.checkout import checkout, folder_of
from nemo_cascade.reward.swe.instance import sif_of
from nemo_cascade.reward.workplace import Workplace
from nemo_cascade.rollout import openai_api
from nemo_cascade.types import Json, Message, Tool, UserError


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(NANO_TOKENIZER)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_a_letter_that_lowers_to_two_characters() -> None:
    def follows(text: str) -> bool:
        return instructions.check("keywords:no_adjacent_consecutive", {}, "", text)

    assert follows("\u0130stanbul is no neighbour")
    assert not follows("\u0130nk jar")  # i, then j


def test_scores_beyond_all_floats() -> None:
    assert parse_verdict('{"score_1": 1%s, "score_2": 3, "ranking": 2}' % ("0" * 400)) is None
    assert parse_verdict('{"score_1": NaN, "score_2": 3, "ranking": 2}') is None
    assert parse_verdict('{"score_1": 5, "score_2": 1.0, "ranking": "1"}') is not None


def test_a_judge_that_nests() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        judge._content(nested(100_000))


def test_workplace_calls_that_the_tables_cannot_take() -> None:
    office = Workplace(workplace_office.FOLDER)

    def said(name: str, **arguments: Json) -> str:
        return json.loads(office.call(name, arguments))["output"]

    task = str(office.tables["task"][0]["task_id"])
    event = {"event_name": "m", "participant_email": "a@b.c", "event_start": "2023-12-01 10:00:00"}
    before = office.state()
    assert said("calendar_create_event", duration="\u00b2", **event).startswith("Duration must be a positive number")
    assert "integer string conversion" in said("calendar_create_event", duration="9" * 5000, **event)
    assert "offset-naive" in said("calendar_search_events", time_min="2023-11-30T00:00:00+01:00")
    assert office.state() == before
    renumbered = said("project_management_update_task", task_id=task, field="task_id", new_value="abc")
    assert renumbered == "Task updated successfully."
    values = {"assigned_to_email": str(office.tables["task"][0]["assigned_to_email"]), "list_name": "Backlog"}
    made = said("project_management_create_task", task_name="t", due_date="2023-12-01", board="Design", **values)
    assert made.startswith("Error executing tool 'project_management_create_task': invalid literal for int()")
    for row in list(office.tables["customer"]):
        said("customer_relationship_manager_delete_customer", customer_id=row["customer_id"])
    assert office.tables["customer"] == []
    added = said("customer_relationship_manager_add_customer", customer_name="n", assigned_to_email="a", status="Lead")
    assert added == "00000001"
    assert office.tables["customer"][0]["customer_email"] is None


def test_values_nested_beyond_what_python_writes(chat: ChatTokenizer) -> None:
    """They parse, and `repr`, `==` or `json.dumps` of them fails later: what a model nests so deeply is no value."""
    assert not too_deep(json.loads(nested(MAX_NESTING)))
    assert too_deep(json.loads(nested(MAX_NESTING + 1)))
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "array"}}})

    def argument(value: str) -> Json:
        form = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"
        return parse_text(form, False, (tool,)).tool_calls[0].arguments["a"]

    assert argument("[[1]]") == [[1]]
    assert argument(nested(900)) == nested(900)
    with pytest.raises(UserError, match="r: field 'arguments' is nested deeper than 100 levels"):
        loose_json(nested(900), "arguments", "r")
    with pytest.raises(UserError, match="body: nested deeper than 100 levels"):
        openai_api.body_of(f'{{"a": {nested(900)}}}'.encode())
    with pytest.raises(UserError, match="body: not JSON: maximum recursion depth"):
        openai_api.body_of(b"[" * 100_000)


def test_lone_surrogates_have_tokens(chat: ChatTokenizer) -> None:
    """JSON spells them, so a tool may repeat them to the model; the environment's turn must be encoded all the same."""
    assert chat.decode(chat.encode_text("a\ud800b\udcff")) == "a\ufffdb\ufffd"
    assert chat.reply_ids([Message("tool", "error: no id \ud800")], True) == chat.reply_ids(
        [Message("tool", "error: no id \ufffd")], True
    )
    hostile = chat.encode_text("\ud800<|im_end|>\ud800")
    assert chat.im_end_id not in hostile
    assert chat.decode(hostile) == "\ufffd<|im_end|>\ufffd"


def test_numbers_of_a_chat_request() -> None:
    def refused(**body: Json) -> str:
        with pytest.raises(UserError) as error:
            openai_api.asked({"prompt": [1], **body}, [[1]], [2])
        return str(error.value).partition(":")[0]

    assert refused(n=float("inf")) == "n"
    assert refused(n=10**9) == "n"
    assert refused(top_k=float("nan")) == "top_k"
    assert refused(temperature=10**400) == "temperature"
    assert refused(logprobs_mode=["raw_logprobs"]) == "logprobs_mode"
    assert len(openai_api.asked({"n": 3}, [[1]], [2])) == 3
    for parameters in ([1], {"properties": [1]}, {"properties": {"a": 1}}, {"properties": {"a": {"description": 1}}}):
        with pytest.raises(UserError, match=r"tools\[0\]\.function\.parameters"):
            openai_api.tools_of({"tools": [{"function": {"name": "f", "parameters": parameters}}]})


def test_refusals_without_text_and_line_numbers_without_end() -> None:
    item: Json = {"type": "message", "role": "assistant", "content": [{"type": "refusal"}]}
    with pytest.raises(UserError, match=r"row output\[0\]: field 'text' is missing"):
        transcript_of({"output": [item]}, "row")
    with pytest.raises(BadEdit, match="not a unified diff: Exceeds the limit"):
        parse_diff(f"--- a/a.py\n+++ b/a.py\n@@ -{'9' * 5000},1 +1,1 @@\n-x\n+y\n")


def test_digits_that_are_no_numbers() -> None:
    """A circled digit is a digit to Python and no number to anybody: in an answer it is a symbol."""
    assert not is_runaway("\u2792")
    assert Reader("x^\u2792").too_large == ""
    assert Reader("9^{9^{\u0669}}").too_large == "a number of more than 10000 digits"  # an Arabic nine is a nine


@pytest.mark.parametrize(
    ("expression", "written"), [("1" + "+1" * 800, True), (f"(0x{'f' * 5000},)", False), (f"g(0x{'f' * 5000})", True)]
)
def test_test_files_that_python_reads_and_cannot_write(expression: str, written: bool) -> None:
    """A file is left out where the changed expectation cannot be written; the others are changed all the same."""
    texts = {"t.py": f"def test_a():\n    assert f() == {expression}\n", "u.py": "def test_b():\n    assert f() == 2\n"}
    changed, ids = controls(texts, ["t.py::test_a", "u.py::test_b"])
    start = f"def test_a():\n    raise AssertionError('control'); assert f() == {expression}\n"
    assert changed == {**({"t.py": start} if written else {}), "u.py": "def test_b():\n    assert f() == 3\n"}
    assert ids == [*(["t.py::test_a"] if written else []), "u.py::test_b"]
    remade = mixed(texts, ["t.py::test_a", "u.py::test_b"])
    assert list(remade.files) == ["u.py"] and {*remade.wrong.values(), *remade.right.values()} == {"u.py::test_b"}


def test_names_of_instances_that_no_file_system_holds(tmp_path: Path) -> None:
    (tmp_path / "x.sif").write_bytes(b"")
    images = tmp_path / "images"
    images.mkdir()
    (images / "o__r-1.sif").write_bytes(b"")
    for name in ("n" * 300, "\0", "\ud800", "../x", f"{tmp_path}/x"):
        assert sif_of({"instance_id": name}, str(images)) == ""
        assert folder_of({"instance_id": name, "repo": name}, str(images)) is None
        with pytest.raises(ContainerLost, match="repo_path: no folder"):
            checkout(images / name / "none", "c0ffee")
    assert sif_of({"instance_id": "o__r-1"}, str(images)) == str(images / "o__r-1.sif")


def _columns(count: int) -> str:
    return ",".join(f"c{number}" for number in range(count))


def _refused_edit() -> str:
    flood = "\n" * 80_000
    made = f"### n.py\n<<<<<<< SEARCH\n=======\n{flood}>>>>>>> REPLACE\n"
    with pytest.raises(BadEdit) as error:
        apply_edits({}, parse_edits(f"{made}<<<<<<< SEARCH\n{flood[:45_000]}z\n=======\n>>>>>>> REPLACE\n"))
    return str(error.value)


TESTS: dict[str, Json] = {"FAIL_TO_PASS": ["t.py::a[1"], "PASS_TO_PASS": [f"t.py::old[{n}" for n in range(3000)]}
FORGED = {f"t.py::made[{number} up]": "PASSED" for number in range(30_000)}
CALL = "<tool_call>\n<function=f>\n</function>\n</tool_call>\n"
SENTENCES = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1})
NUMBERED = ",".join(f'"{number}":1' for number in range(90_000))
SLOW: dict[str, tuple[Callable[[], object], str]] = {
    "a JSON key twice among ninety thousand": (
        lambda: schema.grade("{}", f'{{{NUMBERED},"0":1}}').reason, "not JSON: duplicate key '0'"
    ),
    "a CSV column twice among thirty thousand": (
        lambda: schema.grade("{}", f"{_columns(30_000)},c29999\n1\n", "csv").reason,
        "not CSV: duplicate column 'c29999'",
    ),
    "a CSV table of short rows": (
        lambda: schema.grade("{}", f"{_columns(15_000)}\n" + "1\n" * 40_000, "csv").reason,
        "not CSV: 40000 rows of 15000 cells",
    ),
    "a TOML key of eighty thousand parts": (
        lambda: schema.grade("{}", "a." * 80_000 + "a = 1", "toml").reason, "not TOML: nested too deeply"
    ),
    "a TOML table of eighty thousand parts": (
        lambda: schema.grade("{}", "[" + "a." * 80_000 + "a]", "toml").reason, "not TOML: nested too deeply"
    ),
    "a TOML key inside a table": (
        lambda: schema.grade("{}", "x = {a = 1, " + "b . " * 40_000 + "b = 1}", "toml").reason,
        "not TOML: nested too deeply",
    ),
    "a letter in twenty thousand wrappings": (
        lambda: str(mcqa.extract_letter("Answer: " + "\\text{" * 20_000, {"A": "x"}, "lenient_answer_colon")), "None"
    ),
    "a letter in five hundred wrappings": (
        lambda: str(mcqa.extract_letter("\\boxed{" + "\\text{" * 500 + "A" + "}" * 501, {"A": "x"})), "A"
    ),
    "sixty thousand dots in a row": (
        lambda: str(instructions.check(*SENTENCES, "", "." * 60_000 + "x")), "True"
    ),
    "sixty thousand dots and quotes": (
        lambda: str(instructions.check(*SENTENCES, "", ".'" * 30_000 + "x")), "True"
    ),
    "forty thousand SEARCH lines in a file of eighty thousand, all alike": (
        _refused_edit, "n.py: the SEARCH lines occur 0 times, not once"
    ),
    "thirty thousand results that no test is named in": (
        lambda: grading.judged(TESTS, FORGED).reason, "t.py::a[1: no result"
    ),
    "thirty thousand lines of a summary that no test is named in": (
        lambda: judged(TESTS, FORGED).reason, "t.py::a[1: no result"
    ),
    "a turn of ten thousand calls": (
        lambda: str(len(parse_text(CALL * 10_000, False).tool_calls)), "10000"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_takes_no_longer_than_its_length(name: str) -> None:
    read, wanted = SLOW[name]
    started = time.thread_time()
    assert read() == wanted
    assert time.thread_time() - started < 3.0


def test_answers_to_ten_thousand_calls_are_encoded(chat: ChatTokenizer) -> None:
    started = time.thread_time()
    ids = chat.reply_ids([Message("tool", "no")] * 10_000, True)
    assert time.thread_time() - started < 5.0
    assert len(ids) > 20_000


def test_a_dotted_text_is_no_key() -> None:
    """What TOML refuses is a key of a hundred parts, not a text with a hundred dots."""
    text = "a = '''\n" + "Sentences end. " * 300 + "\n'''\nb = 1.5\nc.d.e = 'x.y.z'\n"
    assert schema.grade("{}", text, "toml").reward == 1.0
