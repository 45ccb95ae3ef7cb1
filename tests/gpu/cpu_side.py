"""What the CPU computes, for the comparison with the GPU: run with CUDA_VISIBLE_DEVICES empty, cpu_side.py FOLDER.

Written to FOLDER/cpu.pt: the losses of five updates, all log-probabilities before them, and the experts used, which the
GPU replays so that a rounding at the edge of the top-k does not hide everything else.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Sequence

STEPS = 5


def sequences() -> list[Sequence]:
    """Fixed token sequences of several lengths, every token trained."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 31, 32, 33, 64, 100)
    rows = [tuple(torch.randint(16, 512, (length,), generator=generator).tolist()) for length in lengths]
    return [Sequence(row, (1,) * len(row)) for row in rows]


def run(folder: Path, experts: list[bytes] | None) -> dict[str, object]:
    """Log-probabilities, experts and losses from the weights in FOLDER/hf; the first update replays `experts`."""
    settings = LearnerSettings(OptimizerConfig(lr=1.0e-3, weight_decay=0.1), num_steps=STEPS)
    learner = MegatronLearner(NemotronHConfig.preset("nano"), settings, str(folder / "hf"))
    rows = sequences()
    logprobs, own = learner.logprobs(rows), learner.routing(rows)
    fixed = [dataclasses.replace(row, routed_experts=e) for row, e in zip(rows, experts or own, strict=True)]
    updates = [learner.update(fixed, cross_entropy("token")) for _ in range(STEPS)]
    return {"logprobs": logprobs, "experts": own, "losses": [metrics["loss"] for metrics in updates]}


if __name__ == "__main__":
    torch.save(run(Path(sys.argv[1]), None), Path(sys.argv[1]) / "cpu.pt")
