"""What the first step of a stage says, and that a Sampler which draws from another distribution is found in it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from nemo_cascade.config.paths import NANO_TOKENIZER, hf_folder
from nemo_cascade.config.schema import (
    GrpoConfig,
    HardwareConfig,
    LossConfig,
    MopdConfig,
    OptimizerConfig,
    SamplingConfig,
)
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.learner import parallel
from nemo_cascade.observe.first_step import EXACT, ROUNDED, FirstStep
from nemo_cascade.observe.record import RunRecord
from nemo_cascade.types import UserError

GRPO = {"kind": "grpo", "init": "base", "num_steps": 1, "prompts_per_step": 4, "group_size": 4}
GOOD = {"step": 0, "ratio": 1.0, "gap_abs": 1e-6, "kl": 0.0, "all_equal_share": 0.25, "truncated_share": 0.0}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    parallel.start()
    yield
    parallel.stop()


def measured(temperature: float) -> dict[str, float]:
    """A step of the real Learner (at temperature 1) on rollouts drawn by the real Sampler at `temperature`."""
    from nemo_cascade.algorithms.advantage import group_relative
    from nemo_cascade.algorithms.loss import policy_gradient
    from nemo_cascade.config.schema import AdvantageConfig
    from nemo_cascade.domains import load
    from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
    from nemo_cascade.models.config import NemotronHConfig
    from nemo_cascade.refit.memory import MemoryRefit
    from nemo_cascade.rollout.collect import Collector
    from nemo_cascade.rollout.local import LocalSampler
    from nemo_cascade.stages.sequences import as_sequences

    config, domain = NemotronHConfig.preset("nano"), load("instruction_following")
    settings = LearnerSettings(OptimizerConfig(lr=3e-4), num_steps=1)
    learner, sampler = MegatronLearner(config, settings, str(hf_folder("hf:nano"))), LocalSampler(config)
    MemoryRefit().refit(learner, sampler, version=0)
    sampling = SamplingConfig(max_new_tokens=48, temperature=temperature)
    collector = Collector({domain.name: domain}, sampler, ChatTokenizer(NANO_TOKENIZER), sampling)
    tasks = domain.tasks("train", count=4, seed=7)
    found = collector.collect(lambda count, attempt: tasks[:count], prompts=4, group_size=4, seed=1, step=0)
    collector.close()
    sequences = as_sequences(found.groups, group_relative(found.groups, AdvantageConfig()))
    return {"step": 0, **learner.update(sequences, policy_gradient(LossConfig()))}


def test_a_right_sampler_passes_and_one_at_another_temperature_is_refused() -> None:
    bounds = FirstStep.of(GrpoConfig(**GRPO), HardwareConfig())
    bounds.check("if_rl", measured(temperature=1.0))
    with pytest.raises(UserError, match=r"if_rl: in its first step gap_abs is 0\.\d+, off by more than max_gap 0\.001"):
        bounds.check("if_rl", measured(temperature=0.6))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"gap_abs": 0.2}, "gap_abs"),
        ({"gap_abs": float("nan")}, "gap_abs"),
        ({"ratio": 1.2}, "ratio"),
        ({"kl": 0.3}, "kl"),
    ],
)
def test_each_bound_refuses(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=f"in its first step {named} is"):
        FirstStep(ROUNDED).check("rl", GOOD | wrong)
    FirstStep(ROUNDED).check("rl", GOOD)


def test_the_reference_may_be_far_away_after_a_resume() -> None:
    FirstStep(ROUNDED).check("rl", GOOD | {"step": 40, "kl": 0.3})


def test_bounds_follow_precision_and_mode() -> None:
    config = GrpoConfig(**GRPO)
    assert FirstStep.of(config, HardwareConfig()).max_gap == EXACT
    assert FirstStep.of(config, HardwareConfig(precision="bf16")).max_gap == ROUNDED
    assert FirstStep.of(config, HardwareConfig(sampler="remote")).max_gap == ROUNDED
    assert FirstStep.of(GrpoConfig(**GRPO, max_gap=0.3), HardwareConfig()).max_gap == 0.3
    recorded = GrpoConfig(**GRPO, mode="train_only", rollouts="there")
    assert FirstStep.of(recorded, HardwareConfig()).max_gap is None
    distilled = MopdConfig(**{**GRPO, "kind": "mopd", "group_size": 1})
    assert "all_equal_share" not in FirstStep.of(distilled, HardwareConfig()).sentence(GOOD, "")


def test_the_record_says_it_once_and_stops_the_stage(tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="nemo_cascade")
    record = RunRecord(tmp_path, "rl", 3)
    record.first_step = FirstStep(ROUNDED)
    record.refitted("0123456789abcdef")
    with pytest.raises(UserError, match="rl: in its first step ratio is 1.5"):
        for step in record.remaining():
            record.step(step, GOOD | {"ratio": 1.5, "all_equal_share": 1.0, "truncated_share": 0.75})
    said = [entry.getMessage() for entry in caplog.records if "first step" in entry.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("rl: first step: ratio 1.5, gap_abs 1e-06, kl 0, all_equal_share 1, truncated_share 0.75")
    assert "refit 0123456789ab, WARNING: hardly a group disagrees" in said[0]
    assert "WARNING: most answers are cut off" in said[0]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["ratio"] == 1.5
    again = RunRecord(tmp_path, "rl", 2)
    again.first_step = FirstStep(ROUNDED)
    for step in again.remaining():
        again.step(step, GOOD)
    assert len([entry for entry in caplog.records if "first step" in entry.getMessage()]) == 2
