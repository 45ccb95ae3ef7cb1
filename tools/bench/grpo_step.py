"""A GRPO step of ours against TRL's GRPOTrainer: whole, and its update alone on fixed rollouts.

Whole: both sample the same prompts with the same group size, limit of new tokens, temperature and stop tokens from the
same weights, score with the same reward, and make one update; ours also brings the new weights to its sampler. The
answers are drawn, so their lengths agree in the mean only (`tokens_*` says how well). TRL's `train` runs as it is: its
callbacks say when one of its steps begins and ends, and our step runs between two of them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
from transformers import TrainerCallback

from nemo_cascade.algorithms.advantage import group_relative
from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.schema import AdvantageConfig, FiltersConfig, LossConfig, SamplingConfig
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.refit.memory import MemoryRefit
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.stages.sequences import as_sequences
from tools.bench import trl_peer
from tools.bench.clock import median_ratio, now
from tools.bench.trl_peer import FOLDER, OPTIMIZER, Prompts, peer_trainer

CPU = torch.device("cpu")
ROW_TOKENS = 4096  # the default of a stage


def our_learner() -> MegatronLearner:
    """The shipped base, as a stage would train it."""
    settings = LearnerSettings(OPTIMIZER, 1_000_000, micro_batch_tokens=ROW_TOKENS)
    return MegatronLearner(read_config(FOLDER), settings, init_folder=str(FOLDER))


class OurGrpo:
    """The loop of stages/grpo.py, one step at a call, with the same parts."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.learner, self.sampler, self.refit = our_learner(), LocalSampler(read_config(FOLDER)), MemoryRefit()
        sampling = SamplingConfig(max_new_tokens=prompts.max_new_tokens, temperature=1.0, top_p=1.0)
        self.collector = Collector(
            {prompts.domain_name: prompts.domain}, self.sampler, prompts.chat, sampling, FiltersConfig()
        )
        self.tasks = prompts.tasks
        self.objective = policy_gradient(LossConfig(normalize="batch_tokens"))
        self.steps = 0
        self.tokens: list[int] = []
        self.refit.refit(self.learner, self.sampler, version=0)

    def __call__(self) -> None:
        prompts = self.prompts
        collected = self.collector.collect(
            lambda count, attempt: self.tasks, prompts.count, prompts.group_size, seed=1, step=self.steps
        )
        advantages_P_G = group_relative(collected.groups, AdvantageConfig())
        self.learner.update(as_sequences(collected.groups, advantages_P_G), self.objective)
        self.steps += 1
        self.refit.refit(self.learner, self.sampler, version=self.steps)
        self.tokens.append(collected.tokens)

    def close(self) -> None:
        """End the threads of the reward."""
        self.collector.close()
        self.sampler.close()


class TakeTurns(TrainerCallback):
    """Times each step of TRL and, after it, one of ours; the first `warmup` of each are forgotten."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.ours: Callable[[], object] = lambda: None
        self.seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Its batch of prompts is there; nothing is sampled yet."""
        self.begin = now(CPU)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Its optimizer has stepped and its gradients are empty again."""
        reached = now(CPU)
        self.ours()
        taken = {"theirs": reached - self.begin, "ours": now(CPU) - reached}
        if state.global_step > self.warmup:
            for name, seconds in taken.items():
                self.seconds[name].append(seconds)


def whole_step(prompts: Prompts, name: str, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Sampling, reward, loss and update of both; `NAME_vs_trl` is above 1 where ours is faster."""
    turns, ours = TakeTurns(warmup), OurGrpo(prompts)
    turns.ours = ours
    try:
        with tempfile.TemporaryDirectory() as output:
            trainer = peer_trainer(prompts, output, [turns], max_steps=warmup + repeats)
            trainer.train()
            lengths = trainer.state.log_history[-1]["completions/mean_length"]
    finally:
        ours.close()
    return {
        f"{name}_vs_trl": median_ratio(turns.seconds, "theirs", "ours"),
        f"{name}_seconds_ours": statistics.median(turns.seconds["ours"]),
        f"{name}_seconds_trl": statistics.median(turns.seconds["theirs"]),
        f"{name}_tokens_ours": statistics.fmean(ours.tokens),
        f"{name}_tokens_trl": lengths * prompts.count * prompts.group_size,
    }


def update_alone(repeats: int, warmup: int = 2) -> dict[str, float]:
    """The update on rollouts that TRL has sampled in its first step, which is not counted.

    `num_iterations` is TRL's own way to train again on the same rollouts. `tokens_trl` counts its padding.
    """
    prompts, turns = Prompts(), TakeTurns(warmup)
    learner, objective = our_learner(), policy_gradient(LossConfig(normalize="batch_tokens"))
    with tempfile.TemporaryDirectory() as output:
        rounds = warmup + repeats
        trainer = peer_trainer(prompts, output, [turns], max_steps=rounds, num_iterations=rounds)

        def update() -> None:
            (inputs,) = trainer._buffered_inputs
            learner.update(trl_peer.as_sequences(inputs, prompts.group_size), objective)

        turns.ours = update
        trainer.train()
        (inputs,) = trainer._buffered_inputs
    return {
        "grpo_update_vs_trl": median_ratio(turns.seconds, "theirs", "ours"),
        "grpo_update_seconds_ours": statistics.median(turns.seconds["ours"]),
        "grpo_update_seconds_trl": statistics.median(turns.seconds["theirs"]),
        "grpo_update_tokens_ours": float(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()),
        "grpo_update_tokens_trl": float(inputs["prompt_mask"].numel() + inputs["completion_mask"].numel()),
    }
