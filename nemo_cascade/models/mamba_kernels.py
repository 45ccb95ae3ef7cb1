"""The Mamba-2 mixer and RMSNorm on mamba-ssm's Triton kernels; imported only where mamba_ssm is installed."""

from __future__ import annotations

import importlib.util

import torch
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

from nemo_cascade.models.mamba import Mamba2Mixer, ScanWeights
from nemo_cascade.models.norms import RMSNorm
from nemo_cascade.models.packed import PackedRow
from nemo_cascade.models.scan import causal_conv_silu

if importlib.util.find_spec("causal_conv1d") is not None:
    from causal_conv1d import causal_conv1d_fn
else:
    causal_conv1d_fn = None

PLACES = 2**31
"""The kernels count the places of a row in int32."""


class KernelRMSNorm(RMSNorm):
    """The local spec's norm as one kernel each way; computed in fp32 as well."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        if hidden.numel() >= PLACES:
            return super().forward(hidden)
        normed: torch.Tensor = rmsnorm_fn(hidden, self.weight, None, eps=self.eps)
        return normed


class KernelMixer(Mamba2Mixer):
    """Our mixer with convolution, scan and gated norm as kernels; same parameters, same result up to rounding."""

    norm_class = KernelRMSNorm

    def _mix(self, row: torch.Tensor, packed: PackedRow) -> torch.Tensor:
        """One call for the packed row as it is: convolution and state start afresh where the sequence's number changes,
        so nothing is padded or moved.
        """
        whole = packed.cut is None and row.numel() < PLACES
        if causal_conv1d_fn is None or not whole or self.conv_dim % 8 or row.shape[1] % 8:  # channels last
            return super()._mix(row, packed)
        weights = self.scan_weights()
        y_1TC = mamba_split_conv1d_scan_combined(
            row[None],
            weights.conv,
            weights.conv_bias,
            weights.dt_bias,
            -torch.exp(weights.A_log),
            weights.D,
            self.shape.chunk_size,
            seq_idx=packed.sequence_1T,
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.shape.norm_eps,
            headdim=self.head_dim,
            ngroups=weights.groups,
            norm_before_gate=False,
        )
        return y_1TC[0]

    def _scan(self, block: torch.Tensor, weights: ScanWeights) -> torch.Tensor:
        """Convolution and state-space scan of one right-padded block [S, L, x B C dt] -> [S, L, heads * head_dim]."""
        S, L, _ = block.shape
        heads, groups = weights.D.shape[0], weights.groups
        inner, width = heads * self.head_dim, groups * self.state
        xBC, dt = block.split([inner + 2 * width, heads], dim=-1)
        if causal_conv1d_fn is None or xBC.shape[-1] % 8:  # channels last the kernel wants multiples of 8
            xBC = causal_conv_silu(xBC, weights.conv, weights.conv_bias)
        else:  # channels last: [S, C, L] with stride 1 over C
            channels_last = xBC.contiguous().transpose(1, 2)
            xBC = causal_conv1d_fn(channels_last, weights.conv, weights.conv_bias, activation="silu").transpose(1, 2)
        x, B, C = xBC.split([inner, width, width], dim=-1)
        y = mamba_chunk_scan_combined(
            x.reshape(S, L, heads, self.head_dim),
            dt.contiguous(),
            -torch.exp(weights.A_log),
            B.reshape(S, L, groups, self.state),
            C.reshape(S, L, groups, self.state),
            self.shape.chunk_size,
            D=weights.D,
            dt_bias=weights.dt_bias,
            dt_softplus=True,
        )
        return y.reshape(S, L, inner)
