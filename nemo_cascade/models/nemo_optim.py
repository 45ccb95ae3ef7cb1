"""A stage's `optimizer` section in the words of NeMo, so that Lightning's Trainer takes the steps our Learner takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nemo.core.config.schedulers import SchedulerParams
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS, register_scheduler
from torch.optim.lr_scheduler import LRScheduler

from nemo_cascade.algorithms.schedule import learning_rate
from nemo_cascade.config.schema import OptimizerConfig

SCHEDULE = "StageSchedule"


class StageSchedule(LRScheduler):
    """The learning rate of a stage at each step (`algorithms.schedule`), as one of NeMo's schedulers.

    NeMo's own CosineAnnealing is the same curve when `warmup_from` is lr / (warmup_steps + 1): it counts the warm-up
    from (step + 1) / (warmup_steps + 1).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_steps: int, last_epoch: int = -1, **curve: Any) -> None:
        self.cfg = OptimizerConfig(lr=optimizer.defaults["lr"], **curve)
        self.max_steps = max_steps
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The rate of step `last_epoch`, in proportion for groups with a rate of their own."""
        rate, full = learning_rate(self.cfg, self.last_epoch, self.max_steps), self.cfg.lr
        return [rate if base == full else rate * base / full for base in self.base_lrs]


if SCHEDULE not in AVAILABLE_SCHEDULERS:
    register_scheduler(SCHEDULE, StageSchedule, SchedulerParams)


def optim_config(cfg: OptimizerConfig, num_steps: int) -> dict[str, Any]:
    """`cfg.optim` of a CascadeModel that says what the `optimizer` section of a stage says.

    Clipping is the Trainer's (`gradient_clip_val`); a frozen router and the expert bias's rate are keys of the model.
    """
    return {
        "name": "adamw",
        "lr": cfg.lr,
        "betas": list(cfg.betas),
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
        "sched": {
            "name": SCHEDULE,
            "schedule": cfg.schedule,
            "min_lr": cfg.min_lr,
            "warmup_steps": cfg.warmup_steps,
            "warmup_from": cfg.warmup_from,
            "schedule_steps": cfg.schedule_steps,
            "max_steps": num_steps,
        },
    }


def decay_groups(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Trained parameters in two groups, vectors (norms, biases, per-head values) without weight decay, as Megatron."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
