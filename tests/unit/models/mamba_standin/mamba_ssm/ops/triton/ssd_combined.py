"""mamba-ssm's scan kernel as a recurrence in fp32, under its own name and arguments (2.2 and later).

What its Triton kernels take for granted is asserted, and results have its dtypes: y that of x, sums in fp32.
"""

import torch
import torch.nn.functional as F

CALLS: list[tuple[int, ...]] = []
"""The shape of x, once for each call."""


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """x [b, l, heads, p], dt [b, l, heads], A [heads], B and C [b, l, groups, n] -> y [b, l, heads, p]."""
    assert z is None and initial_states is None and seq_idx is None and not return_final_states
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
        decay = torch.exp(step[:, t] * A)
        drive = (step[:, t, :, None] * wide[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[..., None, None] * state + drive
        rows.append((state * C[:, t, :, None, :]).sum(-1))
    return (torch.stack(rows, dim=1) + D[:, None] * wide).to(x.dtype)
