"""Agentic repair: tools on a checkout, reward from replayed edits and the repository's tests."""

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentic import SweAgentic, WorkingCopy
from nemo_cascade.types import Message, Scored, ToolCall, Transcript, UserError


@pytest.fixture(scope="module")
def services():
    services = Services()
    yield services
    services.close()


@pytest.fixture(scope="module")
def domain(services):
    return SweAgentic(services)


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_demonstrations_show_what_the_environment_answers(domain):
    """The teacher answers run_tests from what it knows; the environment must say the same."""
    for index, task in enumerate(domain.tasks("train", 10, seed=5)):
        shown = domain.demonstrate(task, index, 0.5)
        episode = domain.begin(task)
        played = []
        for turn in shown:
            if turn.role == "assistant":
                played += [turn, *(episode.reply(turn) or ())]
        assert tuple(played) == shown


def test_flawless_and_flawed_demonstrations(domain):
    tasks = domain.tasks("train", 10, seed=3)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 1))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 1, 1.0))).reward for t in tasks)
    assert not any(task.thinking for task in tasks)  # this stage trains the non-thinking mode


def test_the_place_is_not_in_the_prompt_but_one_look_shows_it(domain):
    for task in domain.tasks("train", 40, seed=1):
        assert str(task.truth["before"]) not in task.messages[0].content
        seen = [m.content for m in domain.demonstrate(task, 0) if m.role == "tool"]
        assert any(str(task.truth["before"]) in text for text in seen)


def test_tools_answer_in_few_words_and_errors_change_nothing(domain):
    task = next(t for t in domain.tasks("train", 20, seed=2) if t.tools[0].name == "view")
    path, before = str(task.truth["path"]), str(task.truth["before"])
    expression = before.partition("return ")[2]
    copy = WorkingCopy(task, lambda *_: Scored(0.0))
    untouched = dict(copy.files)

    def call(name, **arguments):
        return copy.call(ToolCall(name, arguments))

    assert before in call("view", file=path)
    assert call("search", word="x") == "error: no tool search"  # not offered by this prompt
    assert call("view", file="/etc/passwd") == "error: no file /etc/passwd"
    assert call("view") == "error: view needs file"
    assert call("edit", file=path, old="y", new="z") == "error: old is not there"
    assert call("edit", file=path, old="", new="z") == "error: old is not there"
    assert "times" in call("edit", file=f"test_{path}", old="assert", new="")
    assert call("run_tests", fast="yes") == "error: run_tests needs"
    assert copy.files == untouched
    assert call("run_tests") == "fail"
    assert call("edit", file=path, old=expression, new="0") == "ok"
    assert copy.files != untouched


def test_two_calls_in_one_turn_are_answered_in_order(domain):
    task = domain.tasks("train", 1, seed=2)[0]
    path = str(task.truth["path"])
    calls = (ToolCall("run_tests", {}), ToolCall("edit", {"file": path, "old": "?", "new": ""}))
    answers = domain.begin(task).reply(Message("assistant", tool_calls=calls))
    assert [m.content for m in answers] == ["fail", "error: old is not there"]
    assert {m.role for m in answers} == {"tool"}


def test_turns_of_generated_tasks_and_of_released_rows(services, domain):
    generated = domain.tasks("train", 1, seed=2)[0]
    fields = {"instance_id": "a", "repo": "b", "base_commit": "c", "problem_statement": "d"}
    released = domain.parse_row(fields, "rows:1")
    assert (domain.max_turns, domain.turns(generated), domain.turns(released)) == (6, 6, 200)
    chosen = SweAgentic(services, {"max_turns": 9})
    assert (chosen.max_turns, chosen.turns(generated), chosen.turns(released)) == (9, 9, 9)
    with pytest.raises(UserError, match=r"swe_agentic.max_turns: -1 is below 0"):
        SweAgentic(services, {"max_turns": -1})
