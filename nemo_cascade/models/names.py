"""Which part of which Megatron parameter holds which Hugging Face tensor.

One table serves both directions: a slot can be read (gathered over ranks) and written (each rank takes its slice), so
export and import cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_cascade.models.config import NemotronHConfig

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Piece:
    """A view into a local parameter. `dim` is the dimension that tensor-parallel ranks cut, None: replicated."""

    view: torch.Tensor
    shape: tuple[int, ...]  # of this rank's part, in Hugging Face layout
    dim: int | None = 0


@dataclass(frozen=True)
class Rows:
    """Some rows of a parameter that tensor-parallel ranks cut elsewhere; `index` counts the rows of all ranks."""

    local: torch.Tensor
    index: torch.Tensor

    def gather(self, group: dist.ProcessGroup) -> torch.Tensor:
        """The rows, put together from all ranks."""
        own = self.local.detach().contiguous()
        shards = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(shards, own, group=group)
        return torch.cat(shards)[self.index.to(own.device)]

    def write(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Copy those of the rows that this rank holds."""
        place = self.index - group.rank() * self.local.shape[0]
        mine = (place >= 0) & (place < self.local.shape[0])
        self.local[place[mine].to(self.local.device)] = tensor[mine.to(tensor.device)].to(self.local)


def _fused_rows(fused: torch.Tensor, which: str, config: NemotronHConfig, ranks: int) -> Rows:
    """Query, key or value rows of a linear_qkv whose KV groups are spread over several ranks.

    Its rows are, per KV group, query heads, key head, value head, cut evenly over ranks; Megatron gathers its output
    and each rank picks its queries and its group's key and value (transformer/attention.py:1398).
    """
    groups, width = config.num_key_value_heads, config.head_dim
    heads = config.num_attention_heads // groups
    rows = torch.arange(fused.shape[0] * ranks).view(groups, heads + 2, width)
    part = {"q": rows[:, :heads], "k": rows[:, heads : heads + 1], "v": rows[:, heads + 1 :]}[which]
    return Rows(fused, part.flatten())


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor: pieces stacked along dimension 0, or nothing where another rank holds it.

    `stage` is the pipeline stage and `expert_rank` the expert-parallel rank that holds it (None: every one).
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] | tuple[Rows]
    stage: int
    expert_rank: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether this rank holds (its slice of) the tensor."""
        return bool(self.pieces)

    def read(self) -> torch.Tensor:
        """The whole tensor, on every rank; collective where the model is cut."""
        tensor = self._gather() if self.is_local else torch.empty(self.shape, device=_device())
        if self.expert_rank is not None:
            tensor = _from(self.expert_rank, tensor, parallel_state.get_expert_model_parallel_group())
        return _from(self.stage, tensor, parallel_state.get_pipeline_model_parallel_group())

    def _gather(self) -> torch.Tensor:
        """This stage's tensor, put together over tensor-parallel ranks; always a copy."""
        group = parallel_state.get_tensor_model_parallel_group()
        parts = []
        for piece in self.pieces:
            if isinstance(piece, Rows):
                return piece.gather(group)
            local = piece.view.detach().reshape(piece.shape).contiguous()
            if piece.dim is not None and group.size() > 1:
                shards = [torch.empty_like(local) for _ in range(group.size())]
                dist.all_gather(shards, local, group=group)
                local = torch.cat(shards, dim=piece.dim)
            parts.append(local)
        return torch.cat(parts).view(self.shape) if len(parts) > 1 else parts[0].clone()

    def write(self, tensor: torch.Tensor) -> None:
        """Copy this rank's slice of `tensor` into the parameter."""
        group = parallel_state.get_tensor_model_parallel_group()
        ranks, rank, begin = group.size(), group.rank(), 0
        with torch.no_grad():
            for piece in self.pieces:
                if isinstance(piece, Rows):
                    piece.write(tensor, group)
                    return
                rows = piece.shape[0] * (ranks if piece.dim == 0 else 1)
                part = tensor[begin : begin + rows] if len(self.pieces) > 1 else tensor
                begin += rows
                if piece.dim is not None and ranks > 1:
                    part = part.chunk(ranks, dim=piece.dim)[rank]
                piece.view.copy_(part.reshape(piece.view.shape))


def _device() -> torch.device:
    """Where the ranks' collectives expect tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _from(owner: int, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensor of the group's member `owner`, on all its members, in the owner's dtype."""
    if group.size() > 1:
        source = dist.get_global_rank(group, owner)
        dtype = torch.tensor([_DTYPES.index(tensor.dtype)], device=tensor.device)
        dist.broadcast(dtype, source, group=group)
        tensor = tensor.to(_DTYPES[int(dtype)]).contiguous()
        dist.broadcast(tensor, source, group=group)
    return tensor


def slots(model: torch.nn.Module, config: NemotronHConfig) -> Iterator[tuple[str, Slot]]:
    """Every tensor of the checkpoint in the order of `config.tensor_shapes()`, which is the same on all ranks."""
    shapes = config.tensor_shapes()
    local = dict(model.named_parameters()) | dict(model.named_buffers())
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    per_stage = config.num_hidden_layers // stages
    here = parallel_state.get_pipeline_model_parallel_rank()
    ends = {
        "backbone.embeddings.weight": ("embedding.word_embeddings.weight", 0, 0),
        "backbone.norm_f.weight": ("decoder.final_norm.weight", None, stages - 1),
        "lm_head.weight": ("output_layer.weight", 0, stages - 1),
    }
    for name, shape in shapes.items():
        if name in ends:
            megatron, dim, stage = ends[name]
            pieces = (_whole(local[megatron], dim),) if stage == here else ()
            yield name, Slot(shape, pieces, stage)
            continue
        index, rest = name.removeprefix("backbone.layers.").split(".", 1)
        stage = int(index) // per_stage
        layer = (
            _LayerView(local, f"decoder.layers.{int(index) - stage * per_stage}.", config) if stage == here else None
        )
        kind = config.hybrid_override_pattern[int(index)]
        owner = _expert_owner(rest, config)
        pieces = layer.pieces(kind, rest) if layer else ()
        yield name, Slot(shape, pieces, stage, owner)


def _expert_owner(rest: str, config: NemotronHConfig) -> int | None:
    """The expert-parallel rank that holds `mixer.experts.K...`; None for tensors that all hold."""
    if not rest.startswith("mixer.experts."):
        return None
    per_rank = config.n_routed_experts // parallel_state.get_expert_model_parallel_world_size()
    return int(rest.split(".")[2]) // per_rank


def _whole(parameter: torch.Tensor, dim: int | None) -> Piece:
    """A parameter whose layout is the same on both sides."""
    return Piece(parameter, tuple(parameter.shape), dim)


class _LayerView:
    """The Hugging Face tensors of one Megatron layer."""

    def __init__(self, local: dict[str, torch.Tensor], prefix: str, config: NemotronHConfig) -> None:
        self.local, self.prefix, self.config = local, prefix, config
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()

    def _get(self, name: str) -> torch.Tensor:
        return self.local[self.prefix + name]

    def pieces(self, kind: str, rest: str) -> tuple[Piece, ...] | tuple[Rows]:
        """The pieces of the tensor `rest` (name below `backbone.layers.N.`) of a layer of this kind."""
        if rest == "norm.weight":
            norm = {"M": "norm.weight", "*": "input_layernorm.weight", "E": "pre_mlp_layernorm.weight"}[kind]
            return (_whole(self._get(norm), None),)
        by_kind = {"M": self._mamba, "*": self._attention, "E": self._moe}
        return by_kind[kind](rest.removeprefix("mixer."))

    def _mamba(self, name: str) -> tuple[Piece, ...]:
        parameter = self._get(f"mixer.{name}")
        if name == "out_proj.weight":
            return (_whole(parameter, 1),)
        config, ranks = self.config, self.ranks
        width = config.n_groups * config.ssm_state_size // ranks
        conv = [config.mamba_inner // ranks, width, width]
        sizes = {
            "in_proj.weight": [config.mamba_inner // ranks, *conv, config.mamba_num_heads // ranks],
            "conv1d.weight": conv,
            "conv1d.bias": conv,
        }
        if name not in sizes:
            return (_whole(parameter, 0),)
        return tuple(_whole(part, 0) for part in parameter.split(sizes[name]))

    def _attention(self, name: str) -> tuple[Piece, ...] | tuple[Rows]:
        if name == "o_proj.weight":
            return (_whole(self._get("self_attention.linear_proj.weight"), 1),)
        config = self.config
        fused = self._get("self_attention.linear_qkv.weight")
        if config.num_key_value_heads < self.ranks:
            return (_fused_rows(fused, name.split("_")[0], config, self.ranks),)
        groups, width = config.num_key_value_heads // self.ranks, config.head_dim
        heads = config.num_attention_heads // config.num_key_value_heads
        # linear_qkv stacks, per KV group: its query heads, its key head, its value head
        grouped = fused.view(groups, heads + 2, width, config.hidden_size)
        view = {
            "q_proj.weight": grouped[:, :heads],
            "k_proj.weight": grouped[:, heads : heads + 1],
            "v_proj.weight": grouped[:, heads + 1 :],
        }[name]
        return (Piece(view, (groups * view.shape[1] * width, config.hidden_size), 0),)

    def _moe(self, name: str) -> tuple[Piece, ...]:
        same = {
            "gate.weight": ("mlp.router.weight", None),
            "gate.e_score_correction_bias": ("mlp.router.expert_bias", None),
            "shared_experts.up_proj.weight": ("mlp.shared_experts.linear_fc1.weight", 0),
            "shared_experts.down_proj.weight": ("mlp.shared_experts.linear_fc2.weight", 1),
        }
        if name in same:
            megatron, dim = same[name]
            return (_whole(self._get(megatron), dim),)
        _, expert, which, _ = name.split(".")
        count = self.config.n_routed_experts // parallel_state.get_expert_model_parallel_world_size()
        index = int(expert) - parallel_state.get_expert_model_parallel_rank() * count
        if not 0 <= index < count:
            return ()
        grouped = "mlp.experts.linear_fc1.weight" if which == "up_proj" else "mlp.experts.linear_fc2.weight"
        if f"{self.prefix}{grouped}0" in self.local:  # te in FP8: one tensor per expert
            return (_whole(self._get(f"{grouped}{index}"), None),)
        return (_whole(self._get("mlp.experts.up" if which == "up_proj" else "mlp.experts.down")[index], None),)
