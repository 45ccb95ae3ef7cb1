"""Agentless repair: patches are applied to a real repository and judged by its tests."""

import json
import os
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.reward.nano_repository import Function, wrong_lines
from nemo_cascade.types import Invalid, Message, Scored, Transcript, UserError


@pytest.fixture(scope="module")
def services():
    services = Services()
    yield services
    services.close()


@pytest.fixture(scope="module")
def domain(services):
    return SweAgentless(services)


def answer(text):
    return Transcript((Message("assistant", text),))


def released():
    folder = os.environ.get("NEMO_CASCADE_DATA")
    if not folder:
        pytest.skip("NEMO_CASCADE_DATA is not set: no released rows at hand")
    return [json.loads(line) for line in (Path(folder) / "gym" / "swerl_gen.example.jsonl").open()]


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_flawless_and_flawed_demonstrations(domain):
    tasks = domain.tasks("train", 12, seed=3)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 1))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 1, 1.0))).reward for t in tasks)


def test_the_request_leaves_one_operator(domain):
    for task in domain.tasks("report", 150, seed=0):
        head, shown = str(task.truth["check"]).split("=")
        line, constant = str(task.truth["before"]), head[-1]
        x = head[:-2]
        fits = [o for o in "+-*" if Function("f", "", int(constant), o).value(int(x)) == int(shown)]
        assert fits == [str(task.truth["after"])[-2]]
        assert line in task.messages[0].content


def test_equal_patches_start_one_sandbox(services):
    domain = SweAgentless(services)
    task = domain.tasks("train", 1, seed=7)[0]
    opened = []
    real = services.code_sandbox()

    class Counting:
        def session(self, files):
            opened.append(sorted(files))
            return real.session(files)

    domain.grader._sandbox = Counting
    right = Transcript(domain.demonstrate(task, 0))
    assert [domain.score(task, right).reward for _ in range(3)] == [1.0, 1.0, 1.0]
    assert len(opened) == 2  # the tests, and the same with one expectation changed, which must fail
    assert ".git/HEAD" in opened[0]  # the tests run in a git checkout
    path, line = wrong_lines(task.truth)[0]
    patch = f"### {path}\n<<<<<<< SEARCH\n{line}\n=======\n{line}\n>>>>>>> REPLACE"
    assert domain.score(task, answer(patch)).reward == 0.0  # no change: nothing to run
    assert domain.score(task, answer(patch.replace("=======\n", "=======\n)"))).reward == 0.0  # does not compile
    assert len(opened) == 2


def test_cascade_1_punishes_unreadable_patches(services):
    domain = SweAgentless(services, {"unreadable_reward": -1.0})
    task = domain.tasks("train", 1, seed=0)[0]
    assert domain.score(task, answer("I would change the operator.")).reward == -1.0
    with pytest.raises(UserError, match="without_image"):
        SweAgentless(services, {"without_image": "skip"})


def test_released_rows_are_read_and_invalid_without_their_image(domain, services):
    similar = SweAgentless(services, {"without_image": "similarity"})
    judged = 0
    for number, row in enumerate(released()):
        task = domain.parse_row(row, f"rows:{number}")
        assert task.id == row["instance"]["instance_id"]
        assert task.truth["FAIL_TO_PASS"] == json.loads(row["instance"]["FAIL_TO_PASS"])
        outcome = domain.score(task, answer("### a.py"))
        assert isinstance(outcome, Invalid)
        assert "container image" in outcome.reason
        gold = similar.score(task, answer(str(task.truth["patch"])))
        if isinstance(gold, Scored):
            assert gold.reward == 1.0
            assert gold.parts == {"similarity": 1.0}
            judged += 1
    assert judged >= 2  # in the other rows the shown files do not hold all that the gold patch changes
