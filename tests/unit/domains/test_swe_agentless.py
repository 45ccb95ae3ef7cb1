"""Agentless repair: patches are applied to a real repository and judged by its tests."""

import json
import os
from pathlib import Path

import pytest

from nemo_cascade.data.tasks import FileTasks, PromptLimit
from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.nano_repository import Function, wrong_lines
from nemo_cascade.types import Invalid, Message, Scored, Transcript, UserError
from tests.unit.reward.judging import JudgeServer


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
    assert len(opened) == 3  # the tests, and two controls with wrong expectations
    assert ".git/HEAD" in opened[0]  # the tests run in a git checkout
    path, line = wrong_lines(task.truth)[0]
    patch = f"### {path}\n<<<<<<< SEARCH\n{line}\n=======\n{line}\n>>>>>>> REPLACE"
    assert domain.score(task, answer(patch)).reward == 0.0  # no change: nothing to run
    assert domain.score(task, answer(patch.replace("=======\n", "=======\n)"))).reward == 0.0  # does not compile
    assert len(opened) == 3


def test_cascade_1_punishes_unreadable_patches(services):
    domain = SweAgentless(services, {"unreadable_reward": -1.0})
    task = domain.tasks("train", 1, seed=0)[0]
    assert domain.score(task, answer("I would change the operator.")).reward == -1.0
    with pytest.raises(UserError, match="without_image"):
        SweAgentless(services, {"without_image": "skip"})


def test_released_rows_are_read_and_invalid_without_their_image(domain, services):
    similar = SweAgentless(services, {"without_image": "similarity"})
    judged, modes = 0, []
    for number, row in enumerate(released()):
        task = domain.parse_row(row, f"rows:{number}")
        assert task.id.startswith(f"{row['instance']['instance_id']}-")
        assert task.truth["FAIL_TO_PASS"] == json.loads(row["instance"]["FAIL_TO_PASS"])
        outcome = domain.score(task, answer("### a.py"))
        assert isinstance(outcome, Invalid)
        assert "container image" in outcome.reason
        gold = similar.score(task, answer(str(task.truth["patch"])))
        modes.append(task.truth["mode"])
        if modes[-1] == "repro-gen":
            assert isinstance(gold, Invalid) and "asks for a script" in gold.reason
        else:
            assert (gold.reward, gold.parts) == (1.0, {"similarity": 1.0})
            judged += 1
    assert (judged, sorted(modes)) == (3, ["eval"] * 3 + ["repro-gen"] * 2)


def test_released_rows_are_judged_over_http(services):
    """Gold patches are never asked about; a patch with one more line is, with issue, files and gold in the question."""
    seen = []

    def reply(messages):
        seen.append(messages[0]["content"])
        return "<judgement>NO</judgement>"

    with JudgeServer(reply) as server, Judge(server.url, "m", timeout_s=30) as judge:
        judging = SweAgentless(Services(repair_judge=judge), {"without_image": "judge"})
        for number, row in enumerate(row for row in released() if row["mode"] == "eval"):
            task = judging.parse_row(row, f"rows:{number}")
            gold = str(task.truth["patch"])
            assert judging.score(task, answer(gold)).reward == 1.0
            assert server.calls == number
            path = next(iter(task.truth["shown_files"]))
            first = task.truth["shown_files"][path].partition("\n")[0]
            assert task.truth["shown_files"][path].split("\n").count(first) == 1
            edit = f"### {path}\n<<<<<<< SEARCH\n{first}\n=======\n{first}\n# patched\n>>>>>>> REPLACE"
            outcome = judging.score(task, answer(f"<solution>\n```python\n{edit}\n```\n</solution>"))
            assert (outcome.reward, outcome.parts["applies"]) == (0.0, 1.0)
            assert "+# patched" in seen[-1].partition("# Candidate's repair")[2]
            assert row["instance"]["problem_statement"].split()[0] in seen[-1]
            changed = [line for line in gold.split("\n") if line.startswith("+") and len(line) > 20]
            assert changed and all(line in seen[-1].partition("# Known repair")[2] for line in changed)
    assert judging.score(task, answer("no patch")) == Scored(0.0, {"applies": 0.0}, "no SEARCH/REPLACE block")


def test_generated_repositories_by_judge_and_by_similarity():
    with JudgeServer(lambda messages: "<judgement>NO</judgement>") as server, Judge(server.url, "m") as judge:
        judging = SweAgentless(Services(repair_judge=judge), {"reward": "judge"})
        alike = SweAgentless(Services(), {"reward": "similarity"})
        for task in judging.tasks("train", 5, seed=1):
            right = Transcript(judging.demonstrate(task, 0))
            assert (judging.score(task, right).reward, alike.score(task, right).reward) == (1.0, 1.0)
            path, line = wrong_lines(task.truth)[0]
            wrong = answer(f"### {path}\n<<<<<<< SEARCH\n{line}\n=======\n{line}+1\n>>>>>>> REPLACE")
            assert judging.score(task, wrong).reward == 0.0
            assert 0.0 < alike.score(task, wrong).reward < 1.0
        assert server.calls == 5


def test_a_missing_judge_is_invalid_with_the_remedy():
    domain = SweAgentless(Services(), {"reward": "judge"})
    task = domain.tasks("train", 1, seed=1)[0]
    path, line = wrong_lines(task.truth)[0]
    wrong = answer(f"### {path}\n<<<<<<< SEARCH\n{line}\n=======\n{line}+1\n>>>>>>> REPLACE")
    outcome = domain.score(task, wrong)
    assert isinstance(outcome, Invalid)
    assert "set repair_judge.url or .serve" in outcome.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "tests"}, r"data\.options\.swe_agentless\.reward: 'tests'; choose execution, judge or similarity"),
        ({"prompts": "all"}, r"prompts: 'all'; choose row, golden, retrieved or both"),
        ({"judge_samples": 0}, r"judge_samples: 0 is below 1"),
        ({"shown_files": "5"}, r"shown_files: '5' is not a whole number"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        SweAgentless(Services(), options)


REPOSITORY = {
    "instance_id": "i1",
    "problem_statement": "parse_date cuts the time zone off a date: parse_date keeps ten letters",
    "patch": (
        "--- a/src/dates.py\n+++ b/src/dates.py\n@@ -1,2 +1,2 @@\n def parse_date(text):\n-    return text[:10]\n"
        "+    return text\n"
    ),
    "repository_files": {
        "src/dates.py": "def parse_date(text):\n    return text[:10]\n",
        "src/zone.py": "class TimeZone:\n    offset = 0\n",
        "src/colors.py": "RED = 1\n",
        "tests/test_dates.py": "from dates import parse_date\n# parse_date time zone offset date\n",
    },
}


def test_rows_with_a_repository_make_two_tasks(tmp_path):
    options = {"reward": "similarity", "prompts": "both", "shown_files": 2}
    domain = SweAgentless(Services(), options)
    golden, retrieved = domain.parse_rows(REPOSITORY, "rows:1")
    assert (golden.id, retrieved.id) == ("i1/golden", "i1/retrieved")
    for task in (golden, retrieved):
        assert set(task.truth["shown_files"]) == {"src/dates.py", "src/zone.py"}
        patch = (
            "<solution>\n### src/dates.py\n<<<<<<< SEARCH\n    return text[:10]\n=======\n    return text\n"
            ">>>>>>> REPLACE\n</solution>"
        )
        assert domain.score(task, answer(patch)).reward == 1.0
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(REPOSITORY) + "\n")
    assert [task.id for task in FileTasks(domain, [str(path)]).tasks] == ["i1/golden", "i1/retrieved"]
    one = SweAgentless(Services(), {**options, "prompts": "retrieved", "shown_files": 1})
    assert [list(task.truth["shown_files"]) for task in one.parse_rows(REPOSITORY, "rows:1")] == [["src/dates.py"]]
    with pytest.raises(UserError, match="rows:1: field 'repository_files' is missing"):
        domain.parse_row({key: value for key, value in REPOSITORY.items() if key != "repository_files"}, "rows:1")
    with pytest.raises(UserError, match="rows:1: field 'patch': it changes src/other.py, which is no file"):
        domain.parse_row({**REPOSITORY, "patch": REPOSITORY["patch"].replace("dates", "other")}, "rows:1")
    with pytest.raises(UserError, match="rows:1: field 'problem_statement' is missing"):
        domain.parse_row({**REPOSITORY, "problem_statement": None}, "rows:1")


def test_prompts_out_of_their_bounds_are_dropped_and_counted(tmp_path):
    domain = SweAgentless(Services(), {"reward": "similarity", "prompts": "both", "shown_files": 1})
    rows = [REPOSITORY, {**REPOSITORY, "instance_id": "i2", "problem_statement": "parse_date " * 3000}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = PromptLimit(lambda task: task.messages[0].content.split(), 2000, {"swe_agentless": 240})
    (fits,) = {len(task.messages[0].content.split()) for task in domain.parse_rows(REPOSITORY, "rows:1")}
    assert fits < 240
    with pytest.raises(UserError) as caught:
        FileTasks(domain, [str(path)], limit)
    assert "2 prompts are over sampling.max_prompt_tokens; raise it" in str(caught.value)
    assert "2 prompts are under data.options.swe_agentless.min_prompt_tokens; lower it" in str(caught.value)
    assert limit.metrics() == {
        "prompts_dropped": 2.0, "prompts_dropped/swe_agentless": 2.0, "prompts_too_short/swe_agentless": 2.0,
    }  # fmt: skip
    assert limit.said() == [
        "prompts over sampling.max_prompt_tokens were dropped: 2 of swe_agentless",
        "prompts under min_prompt_tokens were dropped: 2 of swe_agentless",
    ]
    kept = FileTasks(domain, [str(path)], PromptLimit(lambda task: task.messages[0].content.split(), 2000))
    assert [task.id for task in kept.tasks] == ["i1/golden", "i1/retrieved"]
