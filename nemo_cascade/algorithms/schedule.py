"""The learning rate of each step: linear warm-up, then constant, cosine or linear decay. Plain floats, no torch."""

from __future__ import annotations

import math

from nemo_cascade.config.schema import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of update `step`, counted from 0.

    Warm-up goes linearly from `warmup_from` (at step 0) to `lr` (at step `warmup_steps`), as in Megatron and NeMo-RL;
    with `warmup_from` 0 the first step moves nothing. Decay goes from `lr` to `min_lr` at step `schedule_steps` (by
    default the stage's `num_steps`) and stays there.
    """
    if step < cfg.warmup_steps:
        return cfg.warmup_from + (cfg.lr - cfg.warmup_from) * step / cfg.warmup_steps
    low = cfg.lr if cfg.min_lr is None else cfg.min_lr
    if cfg.schedule == "constant":
        return cfg.lr
    last = num_steps if cfg.schedule_steps is None else cfg.schedule_steps
    share = min((step - cfg.warmup_steps) / max(last - cfg.warmup_steps, 1), 1.0)
    remaining = 1.0 - share if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return low + (cfg.lr - low) * remaining
