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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from nemo_cascade.learner.optimizer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"  # the fp32 copy of a bf16 parameter
Entry = ShardedTensor | ShardedTensorFactory
Named = tuple[str, Entry]


@dataclass
class TrainingState:
    """This rank's tensors by its own names: how each is stored, and where a loaded one goes: (memory, which elements).

    `steps`: Adam's count of updates, the exponent of its bias correction; 0 where this rank holds no moments.
    """

    sharded: dict[str, Entry] = field(default_factory=dict)
    live: dict[str, tuple[torch.Tensor, slice]] = field(default_factory=dict)
    optimizers: list[MegatronOptimizer] = field(default_factory=list)
    steps: int = 0

    def add(self, name: str, entry: Entry, live: torch.Tensor | None, elements: slice = slice(None)) -> None:
        """One more tensor. `elements`: of the flat loaded tensor, what `live` holds; `live` None: only written."""
        self.sharded[name] = entry
        if live is not None:
            self.live[name] = (live.detach(), elements)

    def memory(self) -> set[int]:
        """Addresses of the memory that training goes on to change; what lies elsewhere was gathered to be written."""
        return {tensor.untyped_storage().data_ptr() for tensor, _ in self.live.values()}

    @torch.no_grad()
    def take(self, loaded: dict[str, torch.Tensor], steps: int) -> None:
        """Overwrite the live tensors and the count of updates with those of a checkpoint."""
        for name, (live, elements) in self.live.items():
            if loaded[name].data_ptr() != live.data_ptr():
                live.copy_(loaded[name].reshape(-1)[elements].view(live.shape))
        for optimizer in self.optimizers:
            _set_steps(optimizer, steps)


def training_state(trainer: Trainer, loading: bool = False) -> TrainingState:
    """Weights, expert biases and optimizer state of this rank. Moments that do not exist yet are made, as zeros.

    Collective in a distributed optimizer unless `loading`. Left out: the routers' token counts, which are zero between
    steps, and Transformer Engine's extra state, which holds nothing without delayed scaling.
    """
    # Parameters whose gradients are summed over other ranks have an optimizer of their own in a chain.
    optimizers = list(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))
    state = TrainingState(optimizers=optimizers, steps=_steps(optimizers))
    by_parameter: dict[int, Named] = {}
    for name, entry in trainer.model.sharded_state_dict().items():
        if isinstance(entry, Entry):
            by_parameter[id(entry.data)] = (name, entry)
            state.add(name, entry, entry.data)
    for optimizer in optimizers:
        if any(not optimizer.optimizer.state[main] for group in optimizer.param_groups for main in group["params"]):
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            _set_steps(optimizer, 0)
        if not isinstance(optimizer, DistributedOptimizer):
            _add_whole(state, optimizer, by_parameter)
        elif loading:
            _add_owned(state, optimizer, by_parameter)
        else:
            _add_gathered(state, optimizer, by_parameter)
    return state


def _add_whole(state: TrainingState, optimizer: MegatronOptimizer, by_parameter: dict[int, Named]) -> None:
    """The moments of an optimizer that every data-parallel rank holds whole."""
    for parameter, main in _parameters(optimizer):
        held = {name: optimizer.optimizer.state[main][name] for name in MOMENTS}
        if main is not parameter:
            held[MAIN] = main
        for name, tensor in held.items():
            state.add(*_moment(by_parameter[id(parameter)], name, tensor), tensor)


def _add_gathered(state: TrainingState, optimizer: DistributedOptimizer, by_parameter: dict[int, Named]) -> None:
    """To be written: the first data-parallel rank gets the others' parts into its host memory."""
    gathered = optimizer.get_parameter_state_dp_zero()
    if gathered is None:
        return
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        (dtype,) = ranges
        for parameter, (begin, end, _) in optimizer.buffers[index].param_index_map.items():
            for name, flat in _stored_names(parameter).items():
                tensor = gathered[index][dtype][flat][begin:end].view(parameter.shape)
                state.add(*_moment(by_parameter[id(parameter)], name, tensor), None)


def _add_owned(state: TrainingState, optimizer: DistributedOptimizer, by_parameter: dict[int, Named]) -> None:
    """To be loaded: whole moments from the file, of which this data-parallel rank keeps its elements."""
    for parameter in optimizer.model_param_group_index_map:
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        held = optimizer._get_main_param_and_optimizer_states(parameter)
        for name, flat in _stored_names(parameter).items():
            whole = torch.empty(parameter.shape)
            state.add(*_moment(by_parameter[id(parameter)], name, whole), held[flat], slice(owned.start, owned.end))


def _stored_names(parameter: torch.Tensor) -> dict[str, str]:
    """Stored name -> the distributed optimizer's name. Its copy of an fp32 parameter is that parameter's memory."""
    names = {name: name for name in MOMENTS}
    return names if parameter.dtype == torch.float32 else {**names, MAIN: "param"}


def _moment(parameter: Named, moment: str, tensor: torch.Tensor) -> Named:
    """A moment is cut as its parameter is."""
    name, entry = parameter
    prefix = f"optimizer.state.{moment}"
    return f"{prefix}.{name}", make_sharded_optimizer_tensor(entry, tensor, prefix=prefix)


def _steps(optimizers: list[MegatronOptimizer]) -> int:
    """Adam's count, the same for all parameters."""
    counts = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [optimizer.optimizer.state[main] for main in group["params"]]
            counts |= {int(state["step"] if "step" in state else group.get("step", 0)) for state in held}
    assert len(counts) <= 1, f"parameters have seen different numbers of updates: {sorted(counts)}"
    return counts.pop() if counts else 0


def _set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """torch's Adam counts per parameter in a tensor, the fused ones of apex and Transformer Engine per group."""
    for group in optimizer.param_groups:
        if isinstance(optimizer.optimizer, torch.optim.Adam):
            for main in group["params"]:
                optimizer.optimizer.state[main]["step"] = torch.tensor(float(steps))
        else:
            group["step"] = steps


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
