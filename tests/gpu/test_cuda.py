"""What only a GPU can show: the same step as on a CPU, bf16, and the Transformer Engine spec.

python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]


def sequences() -> list[Sequence]:
    """Fixed token sequences of several lengths, every token trained."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 31, 32, 33, 64, 100)
    rows = [tuple(torch.randint(16, 512, (length,), generator=generator).tolist()) for length in lengths]
    return [Sequence(row, (1,) * len(row)) for row in rows]


def losses(precision: str, layer_spec: str = "local", steps: int = 5) -> list[float]:
    """The losses of a few updates on the GPU."""
    optimizer = OptimizerConfig(lr=1.0e-3)
    hardware = HardwareConfig(name="one_gpu", precision=precision, layer_spec=layer_spec)
    learner = MegatronLearner(
        NemotronHConfig.preset("nano"), LearnerSettings(optimizer, steps, hardware=hardware), seed=3
    )
    return [learner.update(sequences(), cross_entropy("token"))["loss"] for _ in range(steps)]


def test_fp32_learns_on_the_gpu():
    found = losses("fp32")
    assert 5.5 < found[0] < 7.5
    assert found[-1] < found[0] - 0.05


def test_bf16_follows_fp32():
    exact, rounded = losses("fp32"), losses("bf16")
    assert rounded == pytest.approx(exact, abs=0.05)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer_engine is not installed"
)
def test_the_transformer_engine_spec_agrees_with_the_local_one():
    assert losses("bf16", "te") == pytest.approx(losses("bf16", "local"), abs=0.05)
