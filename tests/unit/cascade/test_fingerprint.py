"""Which changes make which stages run again."""

from pathlib import Path

import pytest

from nemo_cascade.cascade import fingerprint
from nemo_cascade.cascade.plan import make_plan
from nemo_cascade.config.load import load_cascade
from nemo_cascade.types import UserError
from tests.flow.small_cascade import write_cascade

STAGES = ["sft", "if_rl", "math_rl", "side", "mopd"]


@pytest.fixture
def cascade(tmp_path: Path) -> str:
    return str(write_cascade(tmp_path))


def keys(cascade: str, *overrides: str) -> dict[str, str]:
    return fingerprint.keys(make_plan(load_cascade(cascade, overrides)))


def changed(cascade: str, *overrides: str) -> list[str]:
    before, after = keys(cascade), keys(cascade, *overrides)
    return [name for name in STAGES if before[name] != after[name]]


def test_keys_are_stable_and_distinct(cascade):
    first = keys(cascade)
    assert list(first) == STAGES
    assert first == keys(cascade)
    assert len({*first.values()}) == 5
    assert all(len(key) == 64 for key in first.values())


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.if_rl.optimizer.lr=0.06", ["if_rl", "math_rl", "mopd"]),
        ("stages.side.optimizer.lr=0.06", ["side", "mopd"]),
        ("stages.mopd.distill.kind=full_vocab", ["mopd"]),
        ("stages.mopd.teachers.pin={math: sft}", ["mopd"]),
        ("stages.mopd.teachers.candidates=[sft, if_rl]", ["mopd"]),
        ("stages.side.init=if_rl", ["side", "mopd"]),
        ("stages.side.init=sft@2", ["side", "mopd"]),  # what sft computes is the same, whatever it keeps
        ("seed=2", STAGES),
        ("model.chunk_size=16", STAGES),
        ("evaluation.select=50", ["mopd"]),  # the teachers are chosen by select scores
        ("stages.if_rl.gates=[{domain: math, on_fail: rollback}]", ["math_rl"] + ["mopd"]),  # may start elsewhere
    ],
)
def test_a_change_reaches_the_stage_and_what_is_below_it(cascade, override, stages):
    assert changed(cascade, override) == stages


@pytest.mark.parametrize(
    "override",
    [
        "output=elsewhere",
        "stages.if_rl.save_every=1",
        "stages.if_rl.keep_steps=[1]",
        "evaluation.steps=[1]",
        "evaluation.report=4",
        "evaluation.other_mode=0",
        "trackers.wandb_project=mine",
        "hardware.reward_workers=1",
        "hardware.ranks_per_node=1",
        "stages.if_rl.gates=[{domain: math, on_fail: stop}]",
        "judge={url: 'http://other:1', timeout_s: 5}",
        "stages.if_rl.optimizer.lr=5e-2",  # the same number in other letters
    ],
)
def test_where_and_how_it_runs_changes_nothing(cascade, override):
    assert changed(cascade, override) == []


def test_the_judge_counts_where_a_verifier_asks_it(cascade):
    preference = ("stages.side.data.domains={preference: 1}",)
    judge = "judge={url: 'http://j:1', model: %s, timeout_s: %s}"
    first = keys(cascade, *preference, judge % ("a", 1))
    assert keys(cascade, *preference, judge % ("a", 9)) == first
    other = keys(cascade, *preference, judge % ("b", 1))
    assert [name for name in STAGES if other[name] != first[name]] == ["side", "mopd"]


def test_data_files_count_by_content_and_not_by_path(cascade, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"a": 1}\n')
    two.write_text('{"a": 1}\n')
    override = "stages.side.data.files={code: [%s]}"
    first = keys(cascade, override % one)
    assert keys(cascade, override % two) == first
    two.write_text('{"a": 2}\n')
    assert [name for name in STAGES if keys(cascade, override % two)[name] != first[name]] == ["side", "mopd"]


def test_the_code_of_an_outside_domain_counts(cascade, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("class Mine: ...\n")
    override = f"stages.side.data.domains={{'{source}:Mine': 1}}"
    pin = "stages.mopd.teachers.candidates=[sft]"
    first = keys(cascade, override, pin)
    source.write_text("class Mine: pass\n")
    assert [name for name in STAGES if keys(cascade, override, pin)[name] != first[name]] == ["side"]


def test_evaluation_key_follows_the_evaluation(cascade):
    def evaluation(*overrides: str) -> str:
        return fingerprint.evaluation_key(make_plan(load_cascade(cascade, overrides)).stages["side"])

    assert evaluation() == evaluation("seed=4")
    assert evaluation() != evaluation("evaluation.report=4")


@pytest.mark.parametrize("content", [{"a": {1, 2}}, {"a": object()}, {"a": float("nan")}, {1: "a"}, {"a": b"x"}])
def test_what_has_no_stable_identity_is_refused(content):
    with pytest.raises(UserError, match="no stable identity"):
        fingerprint.digest(content)


def test_digest_is_known():
    # printf '{"a":[1,"x"],"b":null}' | sha256sum
    expected = "854ef06dc57f5dfed10206344ab2d02e0b6c84b0e19436703a5afd0f1f9f2687"
    assert fingerprint.digest({"b": None, "a": (1, "x")}) == expected


def test_folder_hash_follows_names_and_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    first = fingerprint.folder_sha256(tmp_path / "one")
    assert fingerprint.folder_sha256(tmp_path / "two") == first
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "b.txt")
    assert fingerprint.folder_sha256(tmp_path / "two") != first
    with pytest.raises(UserError, match="no such folder"):
        fingerprint.folder_sha256(tmp_path / "three")
