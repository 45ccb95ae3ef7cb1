"""The Mamba-2 mixer in PyTorch, in the place where Megatron's specs put its CUDA-only MambaMixer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from nemo_cascade.models.context import RowCut
from nemo_cascade.models.mixer_native import MixerSizes, mix
from nemo_cascade.models.norms import RMSNorm, gated_rms_norm
from nemo_cascade.models.packed import PackedLayout, PackedRow, pack, unpack
from nemo_cascade.models.scan import causal_conv_silu, chunked_scan
from nemo_cascade.models.sharding import stacked_rows


@dataclass
class MixerSubmodules:
    """The two projections; the scan between them is ours."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass(frozen=True)
class MixerShape:
    """What TransformerConfig does not hold about the mixer; passed through the layer spec."""

    conv_kernel: int
    chunk_size: int
    time_step_min: float
    time_step_max: float
    time_step_floor: float
    norm_eps: float


@dataclass(frozen=True)
class ScanWeights:
    """What convolution and scan read, for all heads of this rank or, with context parallelism, for a share of them."""

    conv: torch.Tensor  # [x B C channels, taps]
    conv_bias: torch.Tensor
    dt_bias: torch.Tensor  # [heads], as A_log and D
    A_log: torch.Tensor
    D: torch.Tensor
    groups: int


def share_columns(heads: int, head_dim: int, groups: int, state: int, ranks: int) -> torch.Tensor:
    """[ranks, width]: the columns of [x | B | C | dt] that each context-parallel rank scans, in that order.

    A rank has heads / ranks heads and the groups they read; where ranks outnumber groups, several have the same group.
    """
    inner, conv = heads * head_dim, heads * head_dim + 2 * groups * state
    mine, width = heads // ranks, max(1, groups // ranks) * state
    rows = []
    for rank in range(ranks):
        first = rank * mine // (heads // groups) * state
        parts = (
            (rank * mine * head_dim, mine * head_dim), (inner + first, width), (inner + groups * state + first, width),
            (conv + rank * mine, mine),
        )  # fmt: skip
        rows.append(torch.cat([torch.arange(begin, begin + count) for begin, count in parts]))
    return torch.stack(rows)


class Mamba2Mixer(MegatronModule):
    """in_proj -> [z | x B C | dt]; causal convolution and SiLU on x B C; scan; + D x; gated grouped RMSNorm; out_proj.

    Row order of in_proj on a tensor-parallel rank: its own slice of z, x, B, C and dt. A_log, D and dt_bias stay fp32.
    """

    norm_class: type[RMSNorm] = RMSNorm  # that the local spec's layers begin with, where this mixer runs

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        shape: MixerShape,
        d_model: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.shape = shape
        self.pg_collection = pg_collection
        ranks = pg_collection.tp.size()
        assert config.mamba_num_heads is not None
        self.heads = config.mamba_num_heads // ranks
        self.head_dim, self.state = config.mamba_head_dim, config.mamba_state_dim
        self.groups = config.mamba_num_groups // ranks
        self.inner = self.heads * self.head_dim
        self.conv_dim = self.inner + 2 * self.groups * self.state
        self.sizes = MixerSizes(self.heads, self.head_dim, self.groups, self.state, shape.conv_kernel, shape.norm_eps)
        self.scan_ranks, self.scan_rank = pg_collection.cp.size(), pg_collection.cp.rank()
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            (self.inner + self.conv_dim + self.heads) * ranks,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.inner * ranks,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
        )
        self._create_parameters(config, pg_collection.tp.rank(), ranks)

    def _create_parameters(self, config: TransformerConfig, rank: int, ranks: int) -> None:
        """Convolution, norm and per-head parameters at their random start (dt log-uniform, A uniform in 1..16).

        Per-head values are drawn for the heads of all ranks, so that the seed gives the same model at every layout.
        """
        taps, dtype = self.shape.conv_kernel, config.params_dtype
        bound = 1.0 / math.sqrt(taps)
        self.conv1d = torch.nn.Conv1d(self.conv_dim, self.conv_dim, taps, groups=self.conv_dim, bias=True, dtype=dtype)
        torch.nn.init.uniform_(self.conv1d.weight, -bound, bound)
        torch.nn.init.zeros_(self.conv1d.bias)
        low, high = math.log(self.shape.time_step_min), math.log(self.shape.time_step_max)
        dt = torch.exp(torch.rand(self.heads * ranks) * (high - low) + low).clamp(min=self.shape.time_step_floor)
        inverse = dt + torch.log(-torch.expm1(-dt))  # softplus(dt_bias) = dt
        log_rate = torch.empty(self.heads * ranks).uniform_(1.0, 16.0).log()
        self.dt_bias = torch.nn.Parameter(inverse.chunk(ranks)[rank].clone())
        self.A_log = torch.nn.Parameter(log_rate.chunk(ranks)[rank].clone())
        self.D = torch.nn.Parameter(torch.ones(self.heads))
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.ones(self.inner, dtype=dtype))
        conv = (self.conv1d.weight, self.conv1d.bias)
        for parameter in (*conv, self.dt_bias, self.A_log, self.D, self.norm.weight):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix along the sequences of a packed row [T, 1, hidden]; all state starts afresh at each boundary.

        With context parallelism T counts the tokens of this rank.
        """
        assert isinstance(packed_seq_params, PackedRow)
        projected, _ = self.in_proj(hidden_states)
        row = projected.view(projected.shape[0], -1)
        if packed_seq_params.cut is None and self.sizes.usable(row):
            conv = self.conv1d.weight.squeeze(1)
            weights = (conv, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight)
            mixed = mix(row, weights, packed_seq_params.cu_seqlens_q.tolist(), self.sizes)
        else:
            mixed = self._mix(row, packed_seq_params)
        output, bias = self.out_proj(mixed.unsqueeze(1))
        return output, bias

    def _mix(self, row: torch.Tensor, packed: PackedRow) -> torch.Tensor:
        """What is between the projections, [T, z | x B C dt] -> [T, heads * head_dim]."""
        z, mixed = row.split([self.inner, self.conv_dim + self.heads], dim=-1)
        if packed.cut is None:
            y = self._scan_row(mixed, packed.layout, self.scan_weights())
        else:
            y = self._scan_cut(mixed, packed.layout, packed.cut)
        return gated_rms_norm(y, z, self.norm.weight, self.groups, self.shape.norm_eps).to(row.dtype)

    def scan_weights(self) -> ScanWeights:
        """Those of all heads of this rank."""
        conv = self.conv1d.weight.squeeze(1)
        return ScanWeights(conv, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.groups)

    def _scan_cut(self, mixed: torch.Tensor, layout: PackedLayout, cut: RowCut) -> torch.Tensor:
        """Own tokens of [x B C dt], all heads -> own tokens of y: between them all tokens of a share of the heads.

        Each rank's gradient of the weights is that of its heads; data parallelism adds them up.
        """
        columns = share_columns(self.heads, self.head_dim, self.groups, self.state, self.scan_ranks).to(mixed.device)
        share = cut.to_heads(mixed.index_select(1, columns.flatten()))
        heads = self.heads // self.scan_ranks
        channels, mine = columns[self.scan_rank, :-heads], slice(self.scan_rank * heads, (self.scan_rank + 1) * heads)
        weights = ScanWeights(
            self.conv1d.weight.squeeze(1)[channels], self.conv1d.bias[channels],
            self.dt_bias[mine], self.A_log[mine], self.D[mine], max(1, self.groups // self.scan_ranks),
        )  # fmt: skip
        return cut.to_tokens(self._scan_row(share, layout, weights))

    def _scan_row(self, mixed: torch.Tensor, layout: PackedLayout, weights: ScanWeights) -> torch.Tensor:
        """The scan of a packed row [T, x B C dt] -> [T, heads * head_dim]."""
        return pack([self._scan(block, weights) for block in unpack(mixed, layout)], layout)

    def _scan(self, block: torch.Tensor, weights: ScanWeights) -> torch.Tensor:
        """Convolution and state-space scan of one right-padded block [S, L, x B C dt] -> [S, L, heads * head_dim]."""
        S, L, _ = block.shape
        heads, groups = weights.D.shape[0], weights.groups
        inner, width = heads * self.head_dim, groups * self.state
        xBC, dt = block.split([inner + 2 * width, heads], dim=-1)
        xBC = causal_conv_silu(xBC, weights.conv, weights.conv_bias)
        x, B, C = xBC.split([inner, width, width], dim=-1)
        precise = torch.promote_types(block.dtype, torch.float32)
        dt = F.softplus(dt.to(precise) + weights.dt_bias)
        x = x.to(precise).view(S, L, heads, self.head_dim)
        y = chunked_scan(
            x,
            dt,
            -torch.exp(weights.A_log),
            B.to(precise).reshape(S, L, groups, self.state),
            C.to(precise).reshape(S, L, groups, self.state),
            self.shape.chunk_size,
        )
        y = torch.addcmul(y, x, weights.D[:, None])
        return y.reshape(S, L, inner)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's hook for distributed checkpoints; names and cuts are those of its own MambaMixer."""
        groups = self.pg_collection
        sharded: dict[str, Any] = {}
        for name in ("in_proj", "out_proj"):
            sharded |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata, tp_group=groups.tp
            )
        own = {name: value for name, value in self.named_parameters() if "_proj." not in name}
        sharded |= make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=groups.tp, dp_cp_group=groups.dp_cp
        )
        width = self.groups * self.state
        conv = {"x": self.inner, "B": width, "C": width}
        rows = {"z": self.inner, **conv, "dt": self.heads}
        for name, parts in (("in_proj.weight", rows), ("conv1d.weight", conv), ("conv1d.bias", conv)):
            sharded[prefix + name] = stacked_rows(prefix + name, self.get_parameter(name), parts, groups)
        return sharded
