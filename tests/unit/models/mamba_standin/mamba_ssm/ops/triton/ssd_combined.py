"""mamba-ssm's two scan functions as a recurrence in fp32, under its own name and arguments (2.2 and later).

What its Triton kernels take for granted is asserted, and results have its dtypes: y that of x, sums in fp32.
"""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn

CALLS: list[tuple[int, ...]] = []
"""The shape of x, once for each call."""


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """x [b, l, heads, p], dt [b, l, heads], A [heads], B and C [b, l, groups, n] -> y [b, l, heads, p]."""
    assert z is None and initial_states is None and not return_final_states
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    assert heads % groups == 0 and chunk_size > 0 and chunk_size & (chunk_size - 1) == 0
    assert dt.shape == (batch, length, heads) and B.shape == C.shape == (batch, length, groups, states)
    assert A.shape == D.shape == dt_bias.shape == (heads,) and x.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == dt_bias.dtype == torch.float32
    CALLS.append(tuple(x.shape))
    step = dt.float() + dt_bias
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    wide, ahead = x.float(), heads // groups
    B, C = (part.float().repeat_interleave(ahead, dim=2) for part in (B, C))
    state, rows = x.new_zeros(batch, heads, width, states, dtype=torch.float32), []
    for t in range(length):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(step[:, t] * A)
        drive = (step[:, t, :, None] * wide[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[..., None, None] * state + drive
        rows.append((state * C[:, t, :, None, :]).sum(-1))
    return (torch.stack(rows, dim=1) + D[:, None] * wide).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
    outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
):  # fmt: skip
    """zxbcdt [b, l, z | x B C dt] -> [b, l, heads * p]: convolution, scan, and RMSNorm by group of y silu(z)."""
    assert outproj_weight is None and outproj_bias is None and initial_states is None and not return_final_states
    assert rmsnorm_weight is not None and not norm_before_gate and activation == "silu"
    (batch, length, width), heads = zxbcdt.shape, D.shape[0]
    inner = heads * headdim
    states = (conv1d_weight.shape[0] - inner) // ngroups // 2
    assert width == 2 * inner + 2 * ngroups * states + heads and seq_idx.shape == (batch, length)
    assert seq_idx.dtype == torch.int32 and rmsnorm_weight.shape == (inner,) and inner % ngroups == 0
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * ngroups * states, heads], dim=-1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xBC.transpose(1, 2).split([inner, ngroups * states, ngroups * states], dim=-1)
    x, B, C = x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (ngroups, states)), C.unflatten(-1, (ngroups, states))
    y = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit
    )
    gated = (y.flatten(2).float() * F.silu(z.float())).unflatten(-1, (ngroups, inner // ngroups))
    unit = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + rmsnorm_eps)
    return (unit.flatten(2) * rmsnorm_weight.float()).to(y.dtype)
