"""Tool use: the state decides, on the nano diary and on the tables of the released rows."""

import json

import pytest

from nemo_cascade.domains.tool_use import Diary, ToolUse
from nemo_cascade.reward.workplace import TOOLS, Workplace
from nemo_cascade.types import Invalid, Message, ToolCall, Transcript, UserError
from tests.released import released_data


@pytest.fixture(scope="module")
def domain():
    return ToolUse()


def released(name):
    folder = released_data()
    return folder, [json.loads(line) for line in (folder / "gym" / name).open()]


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_a_flawless_demonstration_always_scores_and_a_flawed_one_never(domain):
    tasks = domain.tasks("train", 120, seed=4)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 1))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 1, 1.0))).reward for t in tasks)


def test_flaw_rate_is_a_share(domain):
    tasks = domain.tasks("train", 300, seed=2)
    right = sum(domain.score(t, Transcript(domain.demonstrate(t, 0, 0.35))).reward for t in tasks)
    assert 0.57 < right / 300 < 0.73  # three standard errors around 0.65


def test_no_request_is_in_two_splits(domain):
    prompts = [{t.messages[0].content for t in domain.tasks(split, 300, 0)} for split in ("train", "select", "report")]
    assert [len(p) for p in prompts] == [300, 300, 300]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_moving_needs_the_number_that_only_a_lookup_reveals(domain):
    tasks = [t for t in domain.tasks("train", 60, seed=0) if t.truth["ground_truth"][0]["name"] == "move"]
    for task in tasks:
        number = task.truth["ground_truth"][0]["arguments"]["id"]
        assert number not in task.messages[0].content
        turns = domain.demonstrate(task, 0)
        assert [m.role for m in turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
        assert turns[1].content == number


def test_errors_reach_the_model_and_change_nothing():
    diary = Diary({"14": ["Eva", "Mon"]})
    before = diary.state()
    assert diary.call("move", {"id": "41", "day": "Fri"}) == "error: no id 41"
    assert diary.call("move", {"id": "14"}) == "error: move needs id day"
    assert diary.call("move", {"id": "14", "day": "Friday"}) == "error: no day Friday"
    assert diary.call("fly", {}) == "error: no tool fly"
    assert diary.state() == before
    assert diary.call("move", {"id": 14, "day": "Fri"}) == "ok"  # a number as JSON is the same number
    assert diary.state() == {"14": ["Eva", "Fri"]}


def test_a_row_without_tables_is_invalid_with_the_remedy(domain, monkeypatch):
    monkeypatch.delenv("NEMO_CASCADE_WORKPLACE", raising=False)
    row = {"responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}, "ground_truth": []}
    outcome = domain.score(domain.parse_row(row, "rows:1"), Transcript((Message("assistant", "Hi"),)))
    assert isinstance(outcome, Invalid)
    assert "workplace_tables" in outcome.reason


def test_broken_rows_name_the_field(domain):
    row = {"responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}}
    with pytest.raises(UserError, match=r"rows:1: field 'ground_truth' is missing"):
        domain.parse_row(row, "rows:1")
    with pytest.raises(UserError, match=r"ground_truth\[0\].*not JSON"):
        domain.parse_row({**row, "ground_truth": [{"name": "find", "arguments": "{name"}]}, "rows:1")


def test_released_rows_accept_their_own_calls_and_refuse_silence():
    folder, rows = released("workplace_assistant.example.jsonl")
    domain = ToolUse(None, {"workplace_tables": str(folder / "workplace")})
    for number, row in enumerate(rows):
        task = domain.parse_row(row, f"rows:{number}")
        assert {tool.name for tool in task.tools} == set(TOOLS)
        calls = tuple(ToolCall(e["name"], e["arguments"]) for e in task.truth["ground_truth"])
        one_by_one = [Message("assistant", tool_calls=(call,)) for call in reversed(calls)]
        assert domain.score(task, Transcript((Message("assistant", tool_calls=calls),))).reward == 1.0
        assert domain.score(task, Transcript(tuple(one_by_one))).reward == 1.0
        assert domain.score(task, Transcript((Message("assistant", "All done."),))).reward == 0.0
        assert domain.score(task, Transcript((Message("assistant", tool_calls=calls[1:]),))).reward == 0.0
        wrong = ToolCall("email_delete_email", {"number": "1"})
        outcome = domain.score(task, Transcript((Message("assistant", tool_calls=(wrong, *calls)),)))
        assert (outcome.reward, outcome.parts["tool_errors"]) == (1.0, 1.0)


def test_tools_answer_as_the_recorded_server_did():
    folder, rows = released("workplace_assistant.example_rollouts.jsonl")
    compared = 0
    for row in rows:
        workplace = Workplace(folder / "workplace")
        calls = {item["call_id"]: item for item in row["response"]["output"] if item["type"] == "function_call"}
        for item in row["response"]["output"]:
            if item["type"] == "function_call_output":
                call = calls[item["call_id"]]
                answer = workplace.call(call["name"], json.loads(call["arguments"]))
                assert json.loads(answer) == json.loads(item["output"]), call["name"]
                compared += 1
    assert compared == 8


def test_workplace_refuses_what_the_server_refuses():
    folder, _ = released("workplace_assistant.example.jsonl")
    workplace = Workplace(folder / "workplace")
    before = workplace.state()

    def answer(name, **arguments):
        return json.loads(workplace.call(name, arguments))["output"]

    assert answer("email_delete_email", email_id="99999999") == "Email not found."
    assert answer("email_send_email", recipient="nobody", subject="a", body="b") == "Invalid recipient email address."
    assert answer("calendar_create_event", event_name="x").endswith("not provided.")
    assert answer("calendar_update_event", event_id="00000013", field="color", new_value="red").startswith(
        "Invalid field"
    )
    assert answer("analytics_create_plot", time_min="a", time_max="b", value_to_plot="c", plot_type="bar").startswith(
        "Value"
    )
    assert answer("customer_relationship_manager_search_customers").startswith("No search parameters")
    assert answer("project_management_delete_task", number="1").startswith("Error executing tool")
    assert answer("email_search_emails", query="kofi", page_size="many").startswith("Error executing tool")
    assert workplace.state() == before
    assert answer("customer_relationship_manager_add_customer", customer_name="A B", assigned_to_email="X@Y.com",
                  status="Lead") == "00000200"  # fmt: skip
    assert workplace.state() != before
