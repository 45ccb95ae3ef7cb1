"""One of two ranks of test_precision.py: bf16 weights through every cut, and three steps in emulated FP8.

Run as a script with RANK and WORLD_SIZE set: precision_ranks.py FOLDER; FOLDER/start holds the weights of DEEP,
FOLDER/even those of EVEN.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

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
EVEN = dataclasses.replace(DEEP, hybrid_override_pattern="M*ME*ME*")
"""Two pipeline stages of four layers; FP8 in the last two of the first and the first two of the second."""

CUTS = ("tensor", "expert", "context", "pipeline")


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


def rounded_products(learner: MegatronLearner) -> set[str]:
    """What this rank rounds to FP8: linear layers and experts, as LAYER.NAME with the whole model's layer number."""
    return {
        f"{layer.layer_number - 1}.{name}"
        for layer in learner.model.decoder.layers
        for name, module in layer.named_modules()
        if (isinstance(module, ColumnParallelLinear | RowParallelLinear) and "_forward_impl" in vars(module))
        or getattr(module, "fp8", None) is not None
    }


def three_steps(learner: MegatronLearner) -> list[tuple[float, float]]:
    """Loss and gradient norm of each."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    steps = [learner.update(rows()[replica::replicas], cross_entropy("token")) for _ in range(3)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def train(folder: Path, name: str, hardware: HardwareConfig) -> None:
    """Three steps; what was rounded and the steps' numbers go to FOLDER/NAME-RANK.pt."""
    parallel.start(parallel.ParallelLayout.from_hardware(hardware), rendezvous=folder / f"{name}.rendezvous")
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), 20, hardware=hardware)
    model, start = (EVEN, "even") if hardware.pipeline_parallel > 1 else (DEEP, "start")
    learner = MegatronLearner(model, settings, init_folder=str(folder / start))
    found = (rounded_products(learner), three_steps(learner))
    torch.save(found, folder / f"{name}-{torch.distributed.get_rank()}.pt")
    parallel.stop()


def main(folder: Path) -> None:
    """All of it."""
    check_weights(folder)
    half = {"ranks_per_node": 2, "precision": "hopper_fp8_emulated"}
    for name in CUTS:
        train(folder, name, HardwareConfig(**half, **{f"{name}_parallel": 2}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
