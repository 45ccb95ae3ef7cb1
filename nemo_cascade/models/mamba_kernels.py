"""The Mamba-2 mixer on mamba-ssm's Triton kernels; imported only where mamba_ssm is installed."""

from __future__ import annotations

import importlib.util

import torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.scan import causal_conv_silu

if importlib.util.find_spec("causal_conv1d") is not None:
    from causal_conv1d import causal_conv1d_fn
else:
    causal_conv1d_fn = None


class KernelMixer(Mamba2Mixer):
    """Our mixer with convolution and scan as single kernels; same parameters, same result up to rounding."""

    def _scan(self, block: torch.Tensor) -> torch.Tensor:
        """Convolution and state-space scan of one right-padded block [S, L, x B C dt] -> [S, L, inner]."""
        S, L, _ = block.shape
        xBC, dt = block.split([self.conv_dim, self.heads], dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if causal_conv1d_fn is None:
            xBC = causal_conv_silu(xBC, weight, bias)
        else:  # channels last: [S, C, L] with stride 1 over C
            xBC = causal_conv1d_fn(xBC.contiguous().transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
        width = self.groups * self.state
        x, B, C = xBC.split([self.inner, width, width], dim=-1)
        y = mamba_chunk_scan_combined(
            x.reshape(S, L, self.heads, self.head_dim),
            dt.contiguous(),
            -torch.exp(self.A_log),
            B.reshape(S, L, self.groups, self.state),
            C.reshape(S, L, self.groups, self.state),
            self.shape.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        return y.reshape(S, L, self.inner)
