"""The first gradient of every objective on one of two ranks: `invariance_worker.py FOLDER` with RANK, WORLD_SIZE."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence as Several
from pathlib import Path

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import DistillConfig, HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Sequence
from tests.numerics.learner_worker import TINY, groups

OBJECTIVES = {
    "sft by token": cross_entropy("token"),
    "sft by sequence": cross_entropy("sequence"),
    **{
        f"grpo by {normalize}": policy_gradient(LossConfig(normalize=normalize, kl=0.03, importance="tis"))
        for normalize in ("batch_tokens", "group_tokens", "sequence")
    },
    "mopd": distillation(DistillConfig()),
    "mopd full_vocab": distillation(DistillConfig(kind="full_vocab")),
}


def share(folder: Path, rank: int, world: int) -> list[Sequence]:
    """Whole groups of this rank: two thirds of them on rank 0, so that the ranks' denominators differ."""
    mine = [group for index, group in enumerate(groups(0)) if world == 1 or (index % 3 == 2) == (rank == 1)]
    teacher = str(folder / "teacher")
    return [
        dataclasses.replace(
            sequence, group=index, teacher=teacher, teacher_logprobs=tuple(-3.9 * m for m in sequence.loss_mask)
        )
        for index, group in enumerate(mine)
        for sequence in group
    ]


def gradients(
    folder: Path, objective: Objective, sequences: Several[Sequence], micro_batch_tokens: int
) -> dict[str, torch.Tensor]:
    """Gradients of one step from the weights in FOLDER/start, summed over ranks and not clipped."""
    hardware = HardwareConfig(ranks_per_node=int(os.environ.get("WORLD_SIZE", "1")))
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), 1, micro_batch_tokens, hardware=hardware)
    learner = MegatronLearner(TINY, settings, init_folder=str(folder / "start"))
    found: dict[str, torch.Tensor] = {}

    def read(_: object) -> None:
        found.update({name: parameter.main_grad.clone() for name, parameter in learner.model.named_parameters()})

    learner.update(sequences, dataclasses.replace(objective, check=read))
    return found


def main(folder: Path) -> None:
    """Every objective's gradients in FOLDER/gradients-RANK.pt."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hardware = HardwareConfig(ranks_per_node=world)
    layout = parallel.ParallelLayout.from_hardware(hardware)
    parallel.start(layout, rendezvous=folder / "rendezvous")
    sequences = share(folder, rank, world)
    found = {name: gradients(folder, objective, sequences, 64) for name, objective in OBJECTIVES.items()}
    torch.save(found, folder / f"gradients-{rank}.pt")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
