"""One of two ranks of test_precision.py: bf16 weights through every cut, and three steps in emulated FP8.

Run as a script with RANK and WORLD_SIZE set: precision_ranks.py FOLDER; FOLDER/start holds the weights.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
from megatron.core import parallel_state

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.models import convert, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_copy import stored
from nemo_cascade.types import Sequence

DEEP = NemotronHConfig(
    vocab_size=64, hidden_size=32, hybrid_override_pattern="M*ME*M*", num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=48, moe_shared_expert_intermediate_size=32, chunk_size=16,
)  # fmt: skip


def rows() -> list[Sequence]:
    """Ten token sequences, every token trained."""
    draw = random.Random(1)
    made = [tuple(draw.randrange(3, 24) for _ in range(draw.randint(4, 30))) for _ in range(10)]
    return [Sequence(tokens, (1,) * len(tokens)) for tokens in made]


def check_weights(folder: Path) -> None:
    """What comes out of a bf16 model is what went in, on every rank, whoever holds it."""
    start = dict(stored(folder / "start"))
    layouts = (parallel.ParallelLayout(tensor=2), parallel.ParallelLayout(expert=2))
    for number, layout in enumerate(layouts):
        parallel.start(layout, rendezvous=folder / f"weights-{number}")
        model = nemotron_h.build(DEEP, layout, "bf16")
        convert.load_folder(model, folder / "start")
        for name, tensor in convert.export_weights(model, DEEP):
            if not torch.equal(tensor.float(), start[name]):
                raise AssertionError(f"{layout}: {name} came back changed")
        parallel.stop()


def train(folder: Path, name: str, hardware: HardwareConfig) -> None:
    """Three steps; the losses go to FOLDER/NAME.pt."""
    rendezvous = folder / f"{name}.rendezvous"
    parallel.start(parallel.ParallelLayout.from_hardware(hardware), rendezvous=rendezvous)
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), 20, hardware=hardware)
    learner = MegatronLearner(DEEP, settings, init_folder=str(folder / "start"))
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = [learner.update(rows()[replica::replicas], cross_entropy("token"))["loss"] for _ in range(3)]
    if torch.distributed.get_rank() == 0:
        torch.save(losses, folder / f"{name}.pt")
    parallel.stop()


def main(folder: Path) -> None:
    """All of it."""
    check_weights(folder)
    half = {"ranks_per_node": 2, "precision": "hopper_fp8_emulated"}
    train(folder, "tensor", HardwareConfig(**half, tensor_parallel=2))
    train(folder, "expert", HardwareConfig(**half, expert_parallel=2))
    train(folder, "context", HardwareConfig(**half, context_parallel=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
