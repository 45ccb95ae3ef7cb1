import pytest

from nemo_cascade.algorithms.schedule import learning_rate
from nemo_cascade.config.schema import OptimizerConfig


def rates(cfg: OptimizerConfig, steps: list[int], num_steps: int = 100) -> list[float]:
    return [learning_rate(cfg, step, num_steps) for step in steps]


def test_warmup_of_the_paper_in_mopd():
    cfg = OptimizerConfig(lr=2e-6, warmup_steps=30, warmup_from=2e-7)
    assert rates(cfg, [0, 15, 30, 52]) == pytest.approx([2e-7, 1.1e-6, 2e-6, 2e-6])


def test_cosine_reaches_min_lr_at_the_end_and_stays():
    cfg = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="cosine", warmup_steps=20)
    assert rates(cfg, [20, 60, 100, 150]) == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_linear_over_its_own_steps():
    cfg = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="linear", schedule_steps=10)
    assert rates(cfg, [0, 4, 10, 11]) == pytest.approx([1.0, 0.6, 0.0, 0.0])


def test_without_min_lr_decay_is_flat():
    assert rates(OptimizerConfig(lr=0.5, schedule="cosine"), [0, 50, 99]) == [0.5, 0.5, 0.5]
