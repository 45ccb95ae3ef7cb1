"""What a training checkpoint holds, tensor by tensor, with names and cuts that do not depend on the layout.

Megatron's own optimizer state dicts number optimizers and parameter groups, and both change with the layout (experts
cut over ranks get an optimizer of their own). Here every moment is named after its parameter, whoever holds it, and the
count of steps is one number: what param_groups hold besides comes from the stage's config at each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from nemo_cascade.learner.optimizer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"  # the fp32 copy of a bf16 parameter


@dataclass
class TrainingState:
    """This rank's tensors by stored name: how each is cut, and the memory it lives in (and is loaded into)."""

    sharded: dict[str, ShardedTensor | ShardedTensorFactory] = field(default_factory=dict)
    live: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor) -> None:
        """One more tensor."""
        self.sharded[entry.key] = entry
        self.live[entry.key] = tensor.detach()

    @torch.no_grad()
    def take(self, loaded: dict[str, torch.Tensor]) -> None:
        """Overwrite the live tensors with those of a checkpoint."""
        for key, tensor in self.live.items():
            if loaded[key].data_ptr() != tensor.data_ptr():
                tensor.copy_(loaded[key])


def training_state(trainer: Trainer) -> TrainingState:
    """Weights, expert biases and optimizer state of this rank. Moments that do not exist yet are made, as zeros.

    Left out: the routers' token counts, which are zero between steps, and Transformer Engine's extra state, which holds
    nothing without delayed scaling.
    """
    state = TrainingState()
    by_parameter = {}
    for entry in trainer.model.sharded_state_dict().values():
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            by_parameter[id(entry.data)] = entry
            state.add(entry, entry.data)
    for optimizer in _members(trainer.optimizer):
        if any(not optimizer.optimizer.state[main] for _, main in _parameters(optimizer)):
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            _set_steps(optimizer, 0)
        for parameter, main in _parameters(optimizer):
            held = {name: optimizer.optimizer.state[main][name] for name in MOMENTS}
            if main is not parameter:
                held[MAIN] = main
            for name, tensor in held.items():
                entry = make_sharded_optimizer_tensor(
                    by_parameter[id(parameter)], tensor, prefix=f"optimizer.state.{name}"
                )
                state.add(entry, tensor)
    return state


def optimizer_steps(trainer: Trainer) -> int:
    """Adam's count of updates, the same for all parameters: the exponent of its bias correction."""
    counts = set()
    for optimizer in _members(trainer.optimizer):
        for group in optimizer.optimizer.param_groups:
            held = [optimizer.optimizer.state[main] for main in group["params"]]
            counts |= {int(state["step"] if "step" in state else group.get("step", 0)) for state in held}
    assert len(counts) == 1, f"parameters have seen different numbers of updates: {sorted(counts)}"
    return counts.pop()


def set_optimizer_steps(trainer: Trainer, steps: int) -> None:
    """Put Adam's count where the optimizer keeps it."""
    for optimizer in _members(trainer.optimizer):
        _set_steps(optimizer, steps)


def _set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """torch's Adam counts per parameter in a tensor, the fused ones of apex and Transformer Engine per group."""
    for group in optimizer.optimizer.param_groups:
        if isinstance(optimizer.optimizer, torch.optim.Adam):
            for main in group["params"]:
                optimizer.optimizer.state[main]["step"] = torch.tensor(float(steps))
        else:
            group["step"] = steps


def _members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain: parameters whose gradients are summed over other ranks have their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _parameters(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter of the model, the tensor that Adam updates): the same tensor in fp32, a copy of it in bf16."""
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from zip(parameters, mains, strict=True)
        groups = optimizer.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in optimizer.param_groups]
    for group in groups:
        for parameter in group:
            yield parameter, parameter
