"""One rank of the test that a training checkpoint fits every layout.

Run as a script with RANK and WORLD_SIZE set: checkpoint_worker.py FOLDER STEP..., each STEP `LAYOUT:load:NAME` (go on
from the checkpoint FOLDER/NAME) or `LAYOUT:save:NAME` (train two steps from FOLDER/start, then write FOLDER/NAME;
`save-async` trains a step further while it is written).
Either way FOLDER/NAME-LAYOUT.pt gets what the policy then is and does: see `facts`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from megatron.core import parallel_state

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.learner.training_state import training_state
from nemo_cascade.models.config import NemotronHConfig
from tests.numerics.learner_worker import share

NANO = NemotronHConfig.from_yaml(Path(__file__).resolve().parents[2] / "conf" / "model" / "nano.yaml")
SETTINGS = LearnerSettings(OptimizerConfig(lr=1e-3, weight_decay=0.1, expert_bias_rate=1e-2), num_steps=9)
LAYOUTS = {
    "one": {},
    "data": {},
    "tensor": {"tensor_parallel": 2},
    "expert": {"expert_parallel": 2},
    "stages": {"pipeline_parallel": 2},
    "zero": {"distributed_optimizer": True},
    "context": {"context_parallel": 2},
    "tensor-expert": {"tensor_parallel": 2, "expert_parallel": 2},
    "tensor-context": {"tensor_parallel": 2, "context_parallel": 2},
}


def build(layout: str, folder: Path, asynchronous: bool = False) -> MegatronLearner:
    """A Learner in this layout."""
    hardware = HardwareConfig(
        ranks_per_node=int(os.environ.get("WORLD_SIZE", "1")), async_save=asynchronous, **LAYOUTS[layout]
    )
    settings = dataclasses.replace(SETTINGS, hardware=hardware)
    return MegatronLearner(NANO, settings, init_folder=str(folder / "start"))


def update(learner: MegatronLearner, step: int) -> float:
    """The loss of one step on data that depends on the step alone."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return learner.update(share(step, rank, ranks), cross_entropy("token"))["loss"]


def published(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    """The parameters' values under Hugging Face names, whole."""
    return {name: tensor.clone() for name, tensor in learner.weights()}


@contextmanager
def moments_as_weights(learner: MegatronLearner, moment: str) -> Iterator[None]:
    """Inside the context the parameters hold this moment of theirs, so that it can be gathered as weights are."""
    own = {name: value.clone() for name, value in learner.model.named_parameters()}
    stored = training_state(learner.trainer).sharded
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            entry = stored.get(f"optimizer.state.{moment}.{name}")
            if entry is not None:  # of a distributed optimizer only the first data-parallel rank gets them
                parameter.copy_(entry.data)
        yield
        for name, value in own.items():
            learner.model.get_parameter(name).copy_(value)


def facts(learner: MegatronLearner) -> dict[str, object]:
    """Weights and moments by published name, Adam's count, and the losses of the next two steps."""
    found: dict[str, object] = {"weights": published(learner), "steps": training_state(learner.trainer).steps}
    for moment in ("exp_avg", "exp_avg_sq"):
        with moments_as_weights(learner, moment):
            found[moment] = published(learner)
    found["losses"] = [update(learner, step) for step in (2, 3)]
    return found


def run(folder: Path, layout: str, action: str, name: str) -> None:
    """One STEP, inside started ranks."""
    learner = build(layout, folder, asynchronous=action == "save-async")
    if action == "load":
        assert learner.load(str(folder / name)) == 2
    else:
        for step in (0, 1):
            update(learner, step)
        learner.save(str(folder / name), 2)
    if action == "save-async":
        update(learner, 2)
        learner.finish_saving()
        assert learner.load(str(folder / name)) == 2
    found = facts(learner)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{name}-{layout}.pt")


def main(folder: Path, *steps: str) -> None:
    for step in steps:
        layout, action, name = step.split(":")
        hardware = HardwareConfig(ranks_per_node=int(os.environ["WORLD_SIZE"]), **LAYOUTS[layout])
        rendezvous = folder / f"{layout}-{action}-{name}.rendezvous"
        parallel.start(parallel.ParallelLayout.from_hardware(hardware), rendezvous=rendezvous)
        run(folder, layout, action, name)
        parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
