"""Files and overrides become dataclasses, and every mistake is one line with its remedy."""

import dataclasses
from pathlib import Path

import pytest

from nemo_cascade.config.load import diff, find, load_cascade
from nemo_cascade.config.paths import conf_dir
from nemo_cascade.config.schema import GrpoConfig, MopdConfig, SftConfig
from nemo_cascade.types import UserError
from tests.flow.small_cascade import write_cascade

SHIPPED = sorted(path.stem for path in (conf_dir() / "cascade").glob("*.yaml"))


@pytest.fixture
def cascade(tmp_path: Path) -> Path:
    return write_cascade(tmp_path)


def wrong(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_cascade(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_cascade_parses(name):
    loaded = load_cascade(name)
    assert loaded.cascade.name == name
    assert list(loaded.stages) == [Path(stage).name for stage in loaded.cascade.stages]


def test_shipped_numbers_arrive():
    loaded = load_cascade("nemotron_cascade_2")
    assert loaded.stages["mopd"].optimizer.warmup_from == 2.0e-7
    assert loaded.stages["if_rl"].group_size == 16
    assert loaded.hardware.expert_parallel == 8
    assert loaded.model["hidden_size"] == 2688


def test_kind_chooses_the_class(cascade):
    stages = load_cascade(str(cascade)).stages
    assert [type(stages[name]) for name in ("sft", "if_rl", "mopd")] == [SftConfig, GrpoConfig, MopdConfig]


def test_overrides_reach_the_file_they_name(cascade):
    loaded = load_cascade(
        str(cascade),
        [
            "stages.if_rl.optimizer.lr=1e-4",
            "evaluation.report=64",
            "seed=3",
            "hardware.ranks_per_node=1",
            "model.chunk_size=16",
        ],
    )
    assert loaded.stages["if_rl"].optimizer.lr == 1.0e-4
    assert loaded.stages["math_rl"].optimizer.lr == 0.08
    assert loaded.cascade.seed == 3
    assert loaded.hardware.ranks_per_node == 1
    assert loaded.model["chunk_size"] == 16
    assert {stage.evaluation.report for stage in loaded.stages.values()} == {64}


def test_a_stage_lies_over_the_evaluation_of_the_cascade(cascade):
    loaded = load_cascade(str(cascade), ["stages.if_rl.evaluation.report=8"])
    assert (loaded.stages["if_rl"].evaluation.report, loaded.stages["if_rl"].evaluation.select) == (8, 40)
    assert loaded.stages["sft"].evaluation.report == 80


def test_an_override_of_a_mapping_replaces_it(cascade):
    loaded = load_cascade(str(cascade), ["stages.if_rl.data.domains={code: 2}"])
    assert loaded.stages["if_rl"].data.domains == {"code": 2.0}


def test_a_star_changes_every_stage_that_has_the_key(cascade):
    loaded = load_cascade(str(cascade), ["stages.*.num_steps=7", "stages.*.group_size=4"])
    assert {stage.num_steps for stage in loaded.stages.values()} == {7}
    assert loaded.stages["mopd"].group_size == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.if_rl.optimzer.lr=1", "key 'optimzer' unknown; did you mean 'optimizer'?"),
        ("stages.if_rl.lr=1", "key 'lr' unknown; did you mean 'optimizer.lr'?"),
        ("stages.if_rll.num_steps=1", "the cascade has no stage 'if_rll'; did you mean 'if_rl'?"),
        ("stages.if_rl=1", "name a key of the stage"),
        ("evaluation.reports=1", "key 'evaluation.reports' unknown; did you mean 'evaluation.report'?"),
        ("hardware=cpuu", "did you mean 'cpu'?"),
        ("seed=three", "key 'seed': 'three' is not an integer"),
        ("stages.if_rl.num_steps=1.5", "key 'num_steps': '1.5' is not an integer"),
        ("stages.if_rl.num_steps=0", "num_steps: 0 is below 1"),
        ("stages.if_rl.filters.overlong=drop", "filters.overlong: 'drop' is not one of penalty, filter, neither"),
        ("stages.if_rl.sampling=3", "key 'sampling': 3 is not a mapping of keys to values"),
        ("stages.if_rl.gates=[{min_gain: 1}]", "key 'gates[0].domain' is missing"),
        ("stages.if_rl.gates=[{domain: math, on_fial: stop}]", "did you mean 'gates[0].on_fail'?"),
        ("stages.if_rl.kind=grop", "'grop' is no kind of stage; did you mean 'grpo'?"),
        ("seed", "write it as key=value"),
        ("seed=[", "the value is not YAML"),
        ("stages=[sft, sft]", "two stages named 'sft'"),
    ],
)
def test_bad_overrides_say_what_to_do(cascade, override, words):
    assert words in wrong(cascade, override)


def test_a_type_error_is_blamed_on_its_override(cascade):
    message = wrong(cascade, "seed=1", "stages.if_rl.optimizer.lr=fast")
    assert message == "override 'stages.if_rl.optimizer.lr=fast': key 'optimizer.lr': 'fast' is not a number"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("group_size: 2", "grop_size: 2", "key 'grop_size' unknown; did you mean 'group_size'?"),
        ("group_size: 2", "frobnicate: 2", "key 'frobnicate' unknown; known: kind, init"),
        (
            "max_new_tokens",
            "max_new_token",
            "key 'sampling.max_new_token' unknown; did you mean 'sampling.max_new_tokens'?",
        ),
        ("num_steps: 6", "num_steps: many", "key 'num_steps': 'many' is not an integer"),
        ("num_steps: 6\n", "", "key 'num_steps' is missing"),
        ("max_new_tokens: 8, ", "", "key 'sampling.max_new_tokens' is missing"),
        ("kind: grpo\n", "", "key 'kind' is missing; known: sft, grpo, mopd"),
        ("init: sft", "init: [sft", "line "),
        ("init: sft", "init: sft\ninit: sft", "line 3: found duplicate key init"),
    ],
)
def test_a_wrong_stage_file_is_named(cascade, old, new, words):
    replace(cascade.parent / "if_rl.yaml", old, new)
    message = wrong(cascade)
    assert words in message
    assert "if_rl.yaml: " in message


def test_missing_files_are_named(cascade):
    assert "no such cascade file" in wrong(Path("nowhere.yaml"))
    assert "did you mean 'nano'?" in wrong(Path("nanoo"))
    (cascade.parent / "side.yaml").unlink()
    assert "key 'stages': stage 'side': no file" in wrong(cascade)


def test_a_file_that_is_no_mapping_is_named(cascade):
    (cascade.parent / "side.yaml").write_text("- kind: grpo\n")
    assert "side.yaml: a mapping of keys to values is needed" in wrong(cascade)


def test_names_lead_to_files(tmp_path):
    assert find("nano/if_rl", "stage", tmp_path) == conf_dir() / "stage" / "nano" / "if_rl.yaml"
    own = tmp_path / "if_rl.yaml"
    own.write_text("kind: grpo\n")
    assert find("if_rl", "stage", tmp_path) == own
    assert find("if_rl.yaml", "stage", tmp_path) == own


def test_diff_lists_what_changed(cascade):
    left, right = (
        load_cascade(str(cascade)),
        load_cascade(str(cascade), ["seed=9", "stages.side.data.domains={math: 1}"]),
    )
    assert diff(left, right) == [
        "cascade.seed: 1 -> 9",
        "stages.side.data.domains.code: 1.0 -> absent",
        "stages.side.data.domains.math: absent -> 1.0",
    ]
    assert diff(left, dataclasses.replace(left)) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.if_rl.optimizer.lr=-1", "optimizer.lr: -1.0 is below 0"),
        ("stages.if_rl.optimizer.lr=.nan", "optimizer.lr: nan is below 0"),
        ("stages.if_rl.optimizer.betas=[0.9, 2.0]", "optimizer.betas: [0.9, 2.0] are not both in [0, 1)"),
        ("stages.if_rl.optimizer.eps=0", "optimizer.eps: 0.0 is not above 0.0"),
        ("stages.if_rl.optimizer.schedule_steps=0", "optimizer.schedule_steps: 0 is below 1"),
        (
            "stages.if_rl.optimizer.min_lr=0.01",
            "optimizer.min_lr: 0.01 has no effect with schedule constant; remove it or choose cosine or linear",
        ),
        ("stages.mopd.group_size=0", "group_size: 0 is below 1"),
        ("stages.if_rl.group_size=1", "group_size: 1 is below 2"),
        ("evaluation.report=-5", "evaluation.report: -5 is below 0"),
        ("evaluation.top_p=0", "evaluation.top_p: 0.0 is outside (0, 1]; use 1 to keep every token"),
        ("stages.sft.data.flaw_rate=7", "data.flaw_rate: 7.0 is outside [0, 1]"),
        ("stages.sft.data.flaw_rates={math: -0.1}", "data.flaw_rates.math: -0.1 is outside [0, 1]"),
        ("stages.sft.data.thinking_share=1.5", "data.thinking_share: 1.5 is outside [0, 1]"),
        ("stages.sft.data.judge_share=-1", "data.judge_share: -1.0 is outside [0, 1]"),
        ("stages.if_rl.sampling.top_p=1.5", "sampling.top_p: 1.5 is outside (0, 1]; use 1 to keep every token"),
        ("stages.if_rl.sampling.top_k=-1", "sampling.top_k: -1 is below 0"),
        (
            "stages.if_rl.sampling.temperature=0",
            "sampling.temperature: 0 (greedy) has no log-probabilities to train on; use a value above 0",
        ),
        ("stages.if_rl.sampling.logprobs=all", "sampling.logprobs: 'all' is not one of kept, raw"),
        ("stages.if_rl.filters.max_invalid_share=2", "filters.max_invalid_share: 2.0 is outside [0, 1]"),
        ("stages.if_rl.loss.kl=-0.1", "loss.kl: -0.1 is below 0.0"),
        ("stages.if_rl.loss.importance_high=0.1", "loss.importance_high: 0.1 is below 0.5"),
        ("stages.mopd.distill.clip_advantage=0", "distill.clip_advantage: 0.0 is not above 0.0"),
        ("stages.mopd.distill.top_k=0", "distill.top_k: 0 is below 1"),
        ("stages.mopd.distill.power_alpha=0", "distill.power_alpha: 0.0 is not above 0.0"),
        ("stages.mopd.distill.domain_weights={math: 0}", "distill.domain_weights.math: 0.0 is not above 0.0"),
        (
            "stages.mopd.distill.domain_weights={math: 1}",
            "distill.domain_weights: math are not the stage's domains code, instruction_following, math; give each "
            "domain a weight, or none",
        ),
        (
            "stages.mopd.filters.dynamic=true",
            "filters.dynamic: distillation has no rewards that could differ; set it to false",
        ),
        ("stages.if_rl.optimizer.max_skipped_steps=-1", "optimizer.max_skipped_steps: -1 is below 0"),
        (
            "stages.if_rl.loss.normalize=constant",
            "loss.constant: it goes with normalize constant, and only with it; Dr. GRPO divides by "
            "sampling.max_new_tokens x prompts_per_step x group_size",
        ),
        (
            "stages.if_rl.loss.clip_low=0.2",
            "loss.clip_low: it goes with loss.clip_high; set both (PPO: 0.2 and 0.2) or none",
        ),
        (
            "stages.if_rl.loss={clip_low: 0.2, clip_high: 0.28, importance: tis}",
            "loss.clip_low: clipping already weighs by the ratio to the Sampler, and importance tis would weigh by it "
            "again; set one of them to none (null)",
        ),
        (
            "stages.if_rl.loss.dual_clip=3",
            "loss.dual_clip: it bounds what loss.clip_low and clip_high leave free; set these too",
        ),
        (
            "stages.if_rl.loss={clip_low: 0.2, clip_high: 0.28, dual_clip: 1.0}",
            "loss.dual_clip: 1.0 is not above 1.0",
        ),
        ("stages.mopd.micro_batch_tokens=0", "micro_batch_tokens: 0 is below 1"),
        ("judge={url: 'http://j', timeout_s: 0}", "judge.timeout_s: 0.0 is not above 0.0"),
        ("judge={url: 'http://j', strategy: ring}", "judge.strategy: 'ring' is not one of all_pairs, circular"),
        ("hardware.reward_workers=0", "hardware.reward_workers: 0 is below 1"),
    ],
)
def test_a_value_out_of_bounds(cascade, override, said):
    assert wrong(cascade, override) == f"override {override!r}: {said}"


def test_bounds_name_the_file(cascade):
    replace(cascade.with_name("sft.yaml"), "lr: 0.02", "lr: 0.02, min_lr: 0.001")
    said = wrong(cascade)
    assert said.startswith(f"{cascade.with_name('sft.yaml')}: optimizer.min_lr: 0.001 has no effect with schedule con")
    assert load_cascade(str(cascade), ["stages.sft.optimizer.schedule=cosine"]).stages["sft"].optimizer.min_lr == 0.001


def test_the_power_advantage_belongs_to_sampled_tokens(cascade):
    said = wrong(cascade, "stages.mopd.distill={kind: topk, advantage: power}")
    assert "distill.advantage: power has no effect with kind topk; choose kind sampled" in said


@pytest.mark.parametrize("kind", ["full_vocab", "topk"])
@pytest.mark.parametrize("cut", ["top_p=0.9", "top_k=5"])
def test_the_exact_reverse_kl_needs_the_whole_vocabulary(cascade, cut, kind):
    key, value = cut.split("=")
    said = wrong(cascade, f"stages.mopd.distill.kind={kind}", f"stages.mopd.sampling.{key}={value}")
    assert f"distill.kind: {kind} compares whole vocabularies, and sampling.top_p or top_k cuts them" in said
    load_cascade(str(cascade), ["stages.mopd.distill.kind=full_vocab"])
    raw = ["stages.mopd.distill.kind=full_vocab", f"stages.mopd.sampling.{cut}", "stages.mopd.sampling.logprobs=raw"]
    load_cascade(str(cascade), raw)
