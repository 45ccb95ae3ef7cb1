"""A Learner of a tiny model, sequences for it, and its weights as one vector: for tests of single steps."""

from __future__ import annotations

import random

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.config.schema import OptimizerConfig
from nemo_cascade.types import Sequence
from tests.numerics.learner_worker import TINY


def build(seed: int = 1, **settings: object) -> MegatronLearner:
    optimizer = settings.pop("optimizer", OptimizerConfig(lr=1e-3, weight_decay=0.1, expert_bias_rate=1e-2))
    return MegatronLearner(TINY, LearnerSettings(optimizer, num_steps=20, **settings), seed=seed)


def sequences(count: int = 8, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)
    made = []
    for index in range(count):
        prompt, answer = draw.randint(3, 20), draw.randint(1, 8)
        tokens = tuple(draw.randrange(64) for _ in range(prompt + answer))
        mask = (0,) * prompt + (1,) * answer
        advantage = draw.uniform(-1, 1)
        made.append(Sequence(tokens, mask, tuple(advantage * m for m in mask), (-4.16,) * len(mask), group=index // 2))
    return made


def flat(learner: MegatronLearner) -> torch.Tensor:
    return torch.cat([tensor.flatten().clone() for _, tensor in learner.weights()])
