"""The Mamba-2 scan over whole prompts, in chunks (state space duality).

Inside a chunk the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t is a masked product like
attention; between chunks only the state is carried. Cost is linear in T, and only T / chunk steps are sequential.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def chunked_scan(
    x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, H, P], dt [B, T, H] (after softplus; 0 leaves the state alone), decay [H] (negative), b and c [B, T, G,
    S].

    Returns y [B, T, H, P] without the skip term, and the state [B, H, P, S] after the last position.
    """
    rows, length, heads, width = x.shape
    per_group = heads // b.shape[2]
    size = min(chunk, length)
    short = -length % size

    def chunks(part: torch.Tensor) -> torch.Tensor:  # [B, T, H, ...] to [chunks, B, H, L, ...]
        padded = F.pad(part, (0, 0) * (part.dim() - 2) + (0, short))
        return padded.unflatten(1, (-1, size)).transpose(2, 3).transpose(0, 1)

    log_decay = chunks((dt * decay).unsqueeze(-1)).squeeze(-1).cumsum(-1)  # [N, B, H, L]
    input_ = chunks(x * dt.unsqueeze(-1))
    b_chunks = chunks(b).repeat_interleave(per_group, dim=2)
    c_chunks = chunks(c).repeat_interleave(per_group, dim=2)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    between = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    attention = (c_chunks @ b_chunks.transpose(-1, -2)) * between.masked_fill(~causal, float("-inf")).exp()
    y = attention @ input_
    to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    added = (input_ * to_end).transpose(-1, -2) @ b_chunks  # [N, B, H, P, S]
    through = log_decay[..., -1].exp()[..., None, None]
    from_start = c_chunks * log_decay.exp().unsqueeze(-1)
    state = x.new_zeros(rows, heads, width, b.shape[-1])
    for index in range(added.shape[0]):
        y[index] += from_start[index] @ state.transpose(-1, -2)
        state = state * through[index] + added[index]
    flat = y.transpose(0, 1).transpose(2, 3).flatten(1, 2)
    return flat[:, :length], state
