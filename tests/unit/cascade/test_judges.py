"""Which judges a stage asks: check, content keys and the launch agree, and what HTTP answers is the reward."""

import json
from pathlib import Path

import pytest

from nemo_cascade import launch
from nemo_cascade.cascade import fingerprint, judges
from nemo_cascade.cascade.plan import Plan, make_plan
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.schema import StageRun
from nemo_cascade.learner.ranks import Place
from nemo_cascade.types import Message, Scored, Transcript, UserError
from tests.unit.reward.judging import JudgeServer

ROWS = [
    {"prompt": "Who wrote it?", "question": "Who wrote it?", "expected_answer": "Charles Darwin"},
    {"prompt": "Where?", "question": "Where?", "expected_answer": "in Kent"},
]
RL = (
    "kind: grpo\ninit: base\nnum_steps: 1\nprompts_per_step: 2\ngroup_size: 2\nrecord_every: 1\n"
    "sampling: {max_new_tokens: 8, max_prompt_tokens: 160, max_total_tokens: 256}\noptimizer: {lr: 1.0e-3}\n"
)
EXACT = "{long_context: {grading: exact}}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def plan(folder: Path, data: str, evaluation: str = "select: 0, report: 0", *overrides: str) -> Plan:
    """One grpo stage on `data`, measured by `evaluation`."""
    (folder / "rl.yaml").write_text(RL + f"data: {{{data}}}\n")
    (folder / "one.yaml").write_text(
        f"name: one\nmodel: nano\nbase: random\nhardware: cpu1\nstages: [rl]\nevaluation: {{{evaluation}}}\n"
    )
    return make_plan(load_cascade(str(folder / "one.yaml"), overrides))


def test_rows_to_grade_need_a_judge_or_the_word_exact(tmp_path, rows):
    data = f"domains: {{long_context: 1}}, files: {{long_context: [{rows}]}}"
    with pytest.raises(UserError) as caught:
        plan(tmp_path, data)
    assert str(caught.value) == (
        f"{tmp_path}/rl.yaml: key 'equivalence_judge' is missing; rows of data.files.long_context are graded by a "
        "judge (data.options.long_context.grading: exact compares texts instead): set equivalence_judge.serve (a "
        "checkpoint, hf:PATH) or equivalence_judge.url here or in the cascade file"
    )
    measured = f"select: 0, report: 2, domains: [long_context], files: {{long_context: [{rows}]}}"
    with pytest.raises(UserError, match=r"rows of evaluation\.files\.long_context are graded by a judge"):
        plan(tmp_path, "domains: {math: 1}", measured)
    (tmp_path / "sft.yaml").write_text(
        "kind: sft\ninit: base\nnum_steps: 1\ntokens_per_step: 1024\ndata: {domains: {math: 1}}\noptimizer: {lr: 1.0}\n"
    )
    with pytest.raises(UserError, match=r"sft\.yaml: key 'equivalence_judge' is missing; rows of evaluation\.files"):
        plan(tmp_path, "domains: {math: 1}", measured, "stages=[sft]")
    plan(tmp_path, f"{data}, options: {EXACT}", f"{measured}, options: {EXACT}")
    plan(tmp_path, data, measured, "equivalence_judge={url: 'http://j:1'}")
    plan(tmp_path, "domains: {long_context: 1}")  # generated tasks have exact answers


def test_patches_need_a_judge_where_it_is_the_reward(tmp_path, rows):
    judged = "options: {swe_agentless: {reward: judge}}"
    where = "set repair_judge.serve"
    missing = r"rl\.yaml: key 'repair_judge' is missing; data\.options\.swe_agentless\.reward is judge"
    with pytest.raises(UserError, match=missing):
        plan(tmp_path, f"domains: {{swe_agentless: 1}}, {judged}")
    measured = f"select: 4, report: 0, domains: [swe_agentless], {judged}"
    with pytest.raises(UserError, match=rf"evaluation\.options\.swe_agentless\.reward is judge.*{where}"):
        plan(tmp_path, "domains: {math: 1}", measured)
    fallback = "options: {swe_agentless: {without_image: judge}}"
    files = f"files: {{swe_agentless: [{rows}]}}"
    with pytest.raises(UserError, match=rf"without_image is judge.*{where}"):
        plan(tmp_path, f"domains: {{swe_agentless: 1}}, {files}, {fallback}")
    plan(tmp_path, f"domains: {{swe_agentless: 1}}, {fallback}")  # generated repositories are here
    plan(tmp_path, f"domains: {{swe_agentless: 1}}, {files}")
    one, two = (f"repair_judge={{url: 'http://a:1', model: {model}}}" for model in "ab")
    data = f"domains: {{swe_agentless: 1}}, {judged}"
    keys = [
        fingerprint.keys(plan(tmp_path, data, "select: 0, report: 0", judge))["rl"]
        for judge in (one, two, "repair_judge={url: 'http://b:9', model: a, timeout_s: 9}")
    ]
    assert keys[0] == keys[2] != keys[1]
    with JudgeServer(lambda messages: "<judgement>YES</judgement>") as server:
        found = plan(
            tmp_path, f"domains: {{swe_agentless: 1}}, {judged}", "select: 0, report: 0",
            f"repair_judge={{url: '{server.url}', timeout_s: 20}}",
        )  # fmt: skip
        with launch.build_domains(StageRun(config=found.stages["rl"]), Place(0, 0, 1, True)) as built:
            domain = built.trained["swe_agentless"]
            task = domain.tasks("train", 1, 0)[0]
            path, line = str(task.truth["path"]), str(task.truth["before"])
            patch = f"### {path}\n<<<<<<< SEARCH\n{line}\n=======\n{line}+0\n>>>>>>> REPLACE"
            outcome = domain.score(task, Transcript((Message("assistant", patch),)))
        assert (outcome.reward, server.calls) == (1.0, 1)


def test_the_papers_agentless_stage_asks_its_own_judge():
    found = make_plan(load_cascade("nemotron_cascade_2")).stages["swe_agentless_rl"]
    assert [item.key for item in judges.asked_in_training(found)] == [judges.REPAIR]
    assert found.repair_judge.model == "openai/gpt-oss-120b"
    assert found.filters.mask_groups_below_max == 0.5
    with pytest.raises(UserError, match=r"swe_agentless_rl\.yaml: key 'repair_judge' is missing"):
        make_plan(load_cascade("nemotron_cascade_2", ["repair_judge=null"]))


def test_a_single_checkpoint_is_judged_by_those_that_its_evaluation_asks(tmp_path, rows):
    measured = "select: 0, report: 2, domains: [swe_agentless], options: {swe_agentless: {reward: judge}}"
    both = [f"{key}={{url: 'http://a:1', model: {key}}}" for key in judges.KEYS[1:]]
    (tmp_path / "rl.yaml").write_text(RL + "data: {domains: {math: 1}}\n")
    (tmp_path / "one.yaml").write_text(
        f"name: one\nmodel: nano\nbase: random\nhardware: cpu1\nstages: [rl]\nevaluation: {{{measured}}}\n"
    )
    cascade = load_cascade(str(tmp_path / "one.yaml"), both).cascade
    assert judges.for_evaluation(cascade.evaluation, cascade) == {"repair_judge": cascade.repair_judge}
    cascade.evaluation.options = {}
    assert judges.for_evaluation(cascade.evaluation, cascade) == {}
    cascade.evaluation.options = {"swe_agentless": {"reward": "judge"}}
    cascade.repair_judge = None
    with pytest.raises(UserError, match="cascade one: key 'repair_judge' is missing"):
        judges.for_evaluation(cascade.evaluation, cascade)


def test_one_judge_has_one_address(tmp_path):
    with pytest.raises(UserError, match=r"judge\.url: judge\.serve is set too"):
        plan(tmp_path, "domains: {math: 1}", "select: 0, report: 0", "judge={url: 'http://j:1', serve: hf:nano_judge}")
    with pytest.raises(UserError, match="key 'equivalence_judge.strategy' unknown"):
        plan(tmp_path, "domains: {math: 1}", "select: 0, report: 0", "equivalence_judge={strategy: circular}")


def test_a_judge_is_part_of_what_it_decides(tmp_path, rows):
    data = f"domains: {{long_context: 1}}, files: {{long_context: [{rows}]}}"
    measured = f"select: 0, report: 2, domains: [long_context], files: {{long_context: [{rows}]}}"

    def both(data: str, measured: str, *overrides: str) -> tuple[str, str]:
        found = plan(tmp_path, data, measured, *overrides)
        return fingerprint.keys(found)["rl"], fingerprint.evaluation_key(found.stages["rl"])

    one, two = (f"equivalence_judge={{url: 'http://a:1', model: {model}}}" for model in "ab")
    other_place = "equivalence_judge={url: 'http://b:2', model: a, timeout_s: 9}"
    first = both(data, measured, one)
    assert both(data, measured, other_place) == first
    assert all(left != right for left, right in zip(both(data, measured, two), first, strict=True))
    exact = (f"{data}, options: {EXACT}", f"{measured}, options: {EXACT}")
    assert both(*exact, one) == both(*exact, two)
    # The preference judge is asked by nothing here, so it decides nothing.
    assert both(data, measured, one, "judge={url: 'http://a:1', model: a}") == first


def test_a_domain_of_ones_own_gets_every_judge(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nemo_cascade.domains.math import Math\n\n\nclass Mine(Math):\n    name = 'mine'\n"
    )
    data = f"domains: {{'{tmp_path}/mine.py:Mine': 1}}"
    overrides = [f"{key}={{url: 'http://a:1', model: %s}}" for key in judges.KEYS]
    keys = {
        fingerprint.keys(plan(tmp_path, data, "select: 0, report: 0", *(text % name for text in overrides)))["rl"]
        for name in ("a", "b")
    }
    assert len(keys) == 2
    found = plan(tmp_path, data, "select: 0, report: 0", *(text % "a" for text in overrides))
    with launch.build_domains(StageRun(config=found.stages["rl"]), Place(0, 0, 1, True)) as built:
        services = built.trained["mine"].services
        assert services.preference_judge is not None and services.equivalence_judge is not None
        assert services.repair_judge is not None


def test_the_launch_asks_the_judge_for_training_and_for_evaluation(tmp_path, rows):
    """The server grants what names Darwin; equal texts would refuse both answers and grant the third."""
    asked: list[str] = []

    def verdict(messages: list[dict[str, str]]) -> str:
        asked.append(messages[0]["content"])
        return "CORRECT" if "darwin" in messages[0]["content"].rpartition("Candidate answer:")[2] else "INCORRECT"

    with JudgeServer(verdict) as server:
        found = plan(
            tmp_path,
            f"domains: {{long_context: 1}}, files: {{long_context: [{rows}]}}",
            f"select: 0, report: 2, domains: [long_context], files: {{long_context: [{rows}]}}",
            f"equivalence_judge={{url: '{server.url}/v1', timeout_s: 20}}",
        )
        run = StageRun(config=found.stages["rl"])
        with launch.build_domains(run, Place(0, 0, 1, True)) as built:
            for domain in (built.trained["long_context"], built.measured["long_context"]):
                task = domain.parse_row(ROWS[0], "f:1")
                outcomes = [
                    domain.score(task, Transcript((Message("assistant", text),)))
                    for text in ("it was darwin", "somebody else", "Charles Darwin")
                ]
                assert [type(outcome) for outcome in outcomes] == [Scored] * 3
                assert [(item.reward, item.reason) for item in outcomes] == [
                    (1.0, "CORRECT"), (0.0, "INCORRECT"), (0.0, "INCORRECT"),
                ]  # fmt: skip
        assert server.calls == 3  # training and evaluation share what the judge said
    assert all("Charles Darwin" in text and "Who wrote it?" in text for text in asked)
    exact = plan(
        tmp_path, f"domains: {{long_context: 1}}, files: {{long_context: [{rows}]}}, options: {EXACT}",
    )  # fmt: skip
    with launch.build_domains(StageRun(config=exact.stages["rl"]), Place(0, 0, 1, True)) as built:
        domain = built.trained["long_context"]
        assert domain.services.equivalence_judge is None
        task = domain.parse_row(ROWS[0], "f:1")
        scores = [
            domain.score(task, Transcript((Message("assistant", text),))).reward
            for text in ("it was darwin", "charles darwin.", "\\boxed{Charles Darwin}")
        ]
        assert scores == [0.0, 1.0, 1.0]
