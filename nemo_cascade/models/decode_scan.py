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
    """x [B, T, G, K, P] (K heads per group), dt [B, T, G, K] (after softplus; 0 leaves the state alone), decay [G, K]
    (negative), b and c [B, T, G, S].

    Returns y [B, T, G, K, P] without the skip term, and the state [B, G, K, P, S] after the last position. B and C are
    never repeated over the heads of a group: their product is taken once per group.
    """
    length = x.shape[1]
    size = min(chunk, length)
    log_decay = _chunks((dt * decay).unsqueeze(-1), size).squeeze(-1).cumsum(-1)  # [N, B, G, K, L]
    input_ = _chunks(x * dt.unsqueeze(-1), size)  # [N, B, G, K, L, P]
    b_chunks, c_chunks = _chunks(b, size), _chunks(c, size)  # [N, B, G, L, S]
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    weights = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill_(future, float("-inf")).exp_()
    y = weights.mul_((c_chunks @ b_chunks.transpose(-1, -2)).unsqueeze(3)) @ input_
    to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    added = (input_ * to_end).transpose(-1, -2).flatten(3, 4) @ b_chunks  # [N, B, G, K * P, S]
    added = added.unflatten(3, x.shape[3:])
    through = log_decay[..., -1].exp()[..., None, None]
    from_start = log_decay.exp().unsqueeze(-1)
    state = added[0]
    for index in range(1, added.shape[0]):
        carried = c_chunks[index] @ state.flatten(2, 3).transpose(-1, -2)  # [B, G, L, K * P]
        carried = carried.unflatten(-1, x.shape[3:]).transpose(2, 3)
        y[index].addcmul_(carried, from_start[index])
        state = torch.addcmul(added[index], state, through[index])
    flat = y.permute(1, 0, 4, 2, 3, 5).flatten(1, 2)
    return flat[:, :length], state


def _chunks(part: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, ..., D] to [chunks, B, ..., L, D], zeros after the end."""
    short = -part.shape[1] % size
    if short:
        part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, short))
    return part.unflatten(1, (-1, size)).transpose(0, 1).movedim(2, -2)
