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

from nemo_cascade.models.norms import gated_rms_norm
from nemo_cascade.models.packed import PackedRow, pack, unpack
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


class Mamba2Mixer(MegatronModule):
    """in_proj -> [z | x B C | dt]; causal convolution and SiLU on x B C; scan; + D x; gated grouped RMSNorm; out_proj.

    Row order of in_proj on a tensor-parallel rank: its own slice of z, x, B, C and dt. A_log, D and dt_bias stay fp32.
    """

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
        """Mix along the sequences of a packed row [T, 1, hidden]; all state starts afresh at each boundary."""
        assert isinstance(packed_seq_params, PackedRow) and packed_seq_params.layout is not None
        layout = packed_seq_params.layout
        projected, _ = self.in_proj(hidden_states)
        row = projected.view(projected.shape[0], -1)
        z, mixed = row.split([self.inner, self.conv_dim + self.heads], dim=-1)
        outputs = [self._scan(block) for block in unpack(mixed, layout)]
        y = gated_rms_norm(pack(outputs, layout), z, self.norm.weight, self.groups, self.shape.norm_eps)
        output, bias = self.out_proj(y.to(row.dtype).unsqueeze(1))
        return output, bias

    def _scan(self, block: torch.Tensor) -> torch.Tensor:
        """Convolution and state-space scan of one right-padded block [S, L, x B C dt] -> [S, L, inner]."""
        S, L, _ = block.shape
        xBC, dt = block.split([self.conv_dim, self.heads], dim=-1)
        xBC = causal_conv_silu(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        width = self.groups * self.state
        x, B, C = xBC.split([self.inner, width, width], dim=-1)
        precise = torch.promote_types(block.dtype, torch.float32)
        dt = F.softplus(dt.to(precise) + self.dt_bias)
        x = x.to(precise).view(S, L, self.heads, self.head_dim)
        y = chunked_scan(
            x,
            dt,
            -torch.exp(self.A_log),
            B.to(precise).reshape(S, L, self.groups, self.state),
            C.to(precise).reshape(S, L, self.groups, self.state),
            self.shape.chunk_size,
        )
        y = torch.addcmul(y, x, self.D[:, None])
        return y.reshape(S, L, self.inner)

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
