"""From a name in a stage file to a Domain, from a row to a name."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.types import Message, Scored, Transcript, UserError

OWN = """
from nemo_cascade.domains import SingleTurn, make_task
from nemo_cascade.types import Scored


class Echo(SingleTurn):
    name = "echo"
    DEFAULTS = {"word": "hi"}

    def tasks(self, split, count, seed):
        return [make_task("echo", f"{self.options['word']} {seed} {index}", {}) for index in range(count)]

    def score(self, task, transcript):
        return Scored(float(transcript.final.content == task.messages[-1].content))
"""


def test_a_domain_of_your_own_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    echo = domains.load(f"{path}:Echo", options={"word": "ho"})
    task = echo.tasks("train", 1, 5)[0]
    assert task.messages[0].content == "ho 5 0"
    said = Transcript((Message("assistant", "ho 5 0"),))
    assert echo.score_group(task, [said, Transcript(())]) == [Scored(1.0), Scored(0.0)]
    assert pickle.loads(pickle.dumps(echo)).options == {"word": "ho"}
    assert echo.begin(task).reply(Message("assistant", "x")) is None


def test_a_domain_of_your_own_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_domain_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert domains.load("own_domain_module:Echo").name == "echo"
    monkeypatch.delitem(sys.modules, "own_domain_module")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mth", "domain 'mth': no such domain, did you mean 'math'"),
        ("none/own.py:Echo", "no file none/own.py"),
        ("no_such_package.x:Echo", "No module named 'no_such_package'; is its package installed"),
        ("nemo_cascade.domains.math:Maths", "has no class Maths, did you mean 'Math'"),
    ],
)
def test_wrong_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        domains.load(name)
    assert "\n" not in str(caught.value)


def test_wrong_options() -> None:
    with pytest.raises(UserError, match="data.options.long_context.key: no such option, did you mean 'keys'"):
        domains.load("long_context", options={"key": 3})
    with pytest.raises(UserError, match="data.options.long_context.keys: 99 is no whole number from 2 to 12"):
        domains.load("long_context", options={"keys": 99})


@pytest.mark.parametrize(
    ("row", "domain"),
    [
        ({"agent_ref": {"name": "instruction_following_simple_agent"}}, "instruction_following"),
        ({"agent_ref": {"name": "mcqa_simple_agent"}}, "mcqa"),
        ({"agent_ref": {"name": "workplace_assistant_simple_agent"}}, "tool_use"),
        ({"agent_ref": {"name": "structured_outputs_v4_simple_agent"}}, "structured_output"),
        ({"agent_ref": {"name": "genrm_simple_agent"}}, "preference"),
        ({"agent_ref": {"name": "swerl_gen_simple_agent"}}, "swe_agentless"),
        ({"agent_ref": {"name": "swe_agents_train"}}, "swe_agentic"),
        ({"agent_ref": None, "instruction_id_list": ["x"], "options": None}, "instruction_following"),
        ({"options": [{"A": "x"}], "expected_answer": "A"}, "mcqa"),
        ({"question": "x", "answer": "#### 3"}, "math"),
        ({"instance_id": "i", "relevant_file_contents": {"a.py": ""}, "FAIL_TO_PASS": ["t"]}, "swe_agentless"),
        ({"verifier_metadata": {"unit_tests": {}}}, "code"),
    ],
)
def test_rows_find_their_domain(row: dict[str, object], domain: str) -> None:
    assert domains.for_row(row) == domain


def test_unknown_rows() -> None:
    with pytest.raises(UserError, match="agent_ref.name 'chess_agent': no domain grades this agent"):
        domains.for_row({"agent_ref": {"name": "chess_agent"}})
    with pytest.raises(UserError, match="agent_ref: missing"):
        domains.for_row({"prompt": "x"})
