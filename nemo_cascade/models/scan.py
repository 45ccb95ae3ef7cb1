"""The Mamba-2 state-space scan in chunks (state-space duality), in plain PyTorch with its own gradients.

Per head: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T and y_t = C_t h_t. Inside a chunk of Q tokens this is a masked
matrix product, between chunks the state is carried; the cost is linear in the length. No clamp on dt: transformers'
`time_step_min` clamp exists in neither Megatron nor the published kernels.
"""

from __future__ import annotations

from typing import Any

import torch


class _ChunkedScan(torch.autograd.Function):
    """Shapes: x [S, L, H, P], dt [S, L, H], A [H], B and C [S, L, G, N]; H = G * K heads, L = c * Q."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        S, L, H, P = x.shape
        G, N = B.shape[2:]
        c, K = L // chunk, H // G
        cum = (
            (dt * A).view(S * c, chunk, H).transpose(1, 2).cumsum(-1)
        )  # [Sc, H, Q], log of the decay since the chunk began
        xd = (x * dt[..., None]).view(S * c, chunk, H, P).transpose(1, 2).contiguous()  # [Sc, H, Q, P]
        Bc = B.reshape(S * c, chunk, G, N).transpose(1, 2).contiguous()  # [Sc, G, Q, N]
        Cc = C.reshape(S * c, chunk, G, N).transpose(1, 2).contiguous()
        decay = _decay_matrix(cum)  # [Sc, H, Q, Q]
        scores = (Cc.flatten(0, 1) @ Bc.flatten(0, 1).transpose(1, 2)).view(S * c, G, 1, chunk, chunk)
        weights = (decay.view(S * c, G, K, chunk, chunk) * scores).view(S * c * H, chunk, chunk)
        y = torch.bmm(weights, xd.view(S * c * H, chunk, P)).view(S * c, H, chunk, P)
        states = None
        if c > 1:
            to_end = torch.exp(cum[..., -1:] - cum)  # [Sc, H, Q]
            local = _heads_to_group(xd * to_end[..., None], G)  # [Sc, G, Q, K * P]
            made = torch.matmul(Bc.transpose(2, 3), local).view(S, c, G, N, K, P)
            states = _carry(made, torch.exp(cum[..., -1]).view(S, c, G, 1, K, 1))  # state entering each chunk
            carried = torch.matmul(Cc, states.view(S * c, G, N, K * P))
            y += _group_to_heads(carried, K) * torch.exp(cum)[..., None]
        ctx.save_for_backward(x, dt, A, cum, xd, Bc, Cc, decay, scores, states)
        ctx.chunk = chunk
        return y.transpose(1, 2).reshape(S, L, H, P)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dt, A, cum, xd, Bc, Cc, decay, scores, states = ctx.saved_tensors
        S, L, H, P = x.shape
        chunk, (G, N) = ctx.chunk, (Bc.shape[1], Bc.shape[3])
        c, K = L // chunk, H // G
        dy = grad.view(S * c, chunk, H, P).transpose(1, 2).contiguous()  # [Sc, H, Q, P]
        # inside the chunk: y_i = sum_j decay_ij scores_ij xd_j
        dw = torch.bmm(dy.view(-1, chunk, P), xd.view(-1, chunk, P).transpose(1, 2)).view_as(decay)
        dw *= decay  # gradient of scores, per head
        dscores = dw.view(S * c, G, K, chunk, chunk).sum(2)
        dlog = (dw.view(S * c, G, K, chunk, chunk) * scores).view(S * c, H, chunk, chunk)  # gradient of log decay_ij
        dcum = dlog.sum(-1) - dlog.sum(-2)
        weights = (decay.view(S * c, G, K, chunk, chunk) * scores).view(-1, chunk, chunk)
        dxd = torch.bmm(weights.transpose(1, 2), dy.view(-1, chunk, P)).view_as(xd)
        dC = torch.matmul(dscores, Bc)
        dB = torch.matmul(dscores.transpose(2, 3), Cc)
        if states is not None:
            # between chunks: y_i += exp(cum_i) C_i h, h' = exp(cum_end) h + sum_j exp(cum_end - cum_j) B_j xd_j
            begin = torch.exp(cum)
            into = _heads_to_group(dy * begin[..., None], G)  # [Sc, G, Q, K * P]
            flat_states = states.view(S * c, G, N, K * P)
            dC += torch.matmul(into, flat_states.transpose(2, 3))
            carried = _group_to_heads(torch.matmul(Cc, flat_states), K)
            dcum += (carried * dy).sum(-1) * begin
            dread = torch.matmul(Cc.transpose(2, 3), into).view(S, c, G, N, K, P)
            keep = torch.exp(cum[..., -1]).view(S, c, G, 1, K, 1)
            dmade = _carry_back(dread, keep)  # gradient of the state that each chunk made
            dend = ((dmade * states).sum((3, 5)) * keep.view(S, c, G, K)).view(S * c, H)
            to_end = torch.exp(cum[..., -1:] - cum)
            flat_made = dmade.view(S * c, G, N, K * P)
            local = _heads_to_group(xd * to_end[..., None], G)
            dB += torch.matmul(local, flat_made.transpose(2, 3))
            dlocal = _group_to_heads(torch.matmul(Bc, flat_made), K) * to_end[..., None]
            dxd += dlocal
            pull = (dlocal * xd).sum(-1)
            dcum -= pull
            dcum[..., -1] += dend + pull.sum(-1)
        da = dcum.flip(-1).cumsum(-1).flip(-1).transpose(1, 2).reshape(S, L, H)
        dxd = dxd.transpose(1, 2).reshape(S, L, H, P)
        ddt = da * A + (dxd * x).sum(-1)
        dA = (da * dt).sum((0, 1))
        dB = dB.transpose(1, 2).reshape(S, L, G, N)
        dC = dC.transpose(1, 2).reshape(S, L, G, N)
        return dxd.mul_(dt[..., None]), ddt, dA, dB, dC, None


def _decay_matrix(cum: torch.Tensor) -> torch.Tensor:
    """exp(cum_i - cum_j) for i >= j, else 0. Masked before exp, which may overflow above the diagonal."""
    length = cum.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=cum.device).triu_(1)
    return (cum[..., :, None] - cum[..., None, :]).masked_fill_(future, -torch.inf).exp_()


def _heads_to_group(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[Sc, G * K, Q, P] -> [Sc, G, Q, K * P]: the heads of a group share B and C, so they share one product."""
    rows, H, Q, P = heads.shape
    return heads.view(rows, groups, H // groups, Q, P).transpose(2, 3).reshape(rows, groups, Q, -1)


def _group_to_heads(grouped: torch.Tensor, per_group: int) -> torch.Tensor:
    """[Sc, G, Q, K * P] -> [Sc, G * K, Q, P]."""
    rows, G, Q, width = grouped.shape
    return grouped.view(rows, G, Q, per_group, -1).transpose(2, 3).reshape(rows, G * per_group, Q, width // per_group)


def _carry(made: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The state entering each chunk, given what each chunk makes and the share it keeps; [S, c, ...]."""
    entering = torch.zeros_like(made)
    for index in range(1, made.shape[1]):
        torch.addcmul(made[:, index - 1], keep[:, index - 1], entering[:, index - 1], out=entering[:, index])
    return entering


def _carry_back(dread: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Gradient of what each chunk made, from the gradient of the states that each chunk read; [S, c, ...]."""
    dmade = torch.zeros_like(dread)
    for index in range(dread.shape[1] - 2, -1, -1):
        torch.addcmul(dread[:, index + 1], keep[:, index + 1], dmade[:, index + 1], out=dmade[:, index])
    return dmade


def chunked_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk: int
) -> torch.Tensor:
    """y of the recurrence from a zero state: x [S, L, H, P], dt [S, L, H] after softplus, A [H] < 0, B, C [S, L, G, N].

    The length must split into equal chunks of at most `chunk` (models/packed.py pads so). Returns [S, L, H, P] without
    the skip term D x. Valid for float32 and float64.
    """
    length = x.shape[1]
    chunks = -(-length // chunk)
    if length % chunks:
        raise ValueError(f"a length of {length} does not split into {chunks} equal chunks of at most {chunk}")
    y: torch.Tensor = _ChunkedScan.apply(x, dt, A, B, C, length // chunks)
    return y


class _CausalConvSilu(torch.autograd.Function):
    """silu(bias + depthwise causal convolution) over [S, L, C]; weight [C, K], the last tap meets the current token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        taps = weight.shape[1]
        before = torch.addcmul(bias, x, weight[:, taps - 1])
        for shift in range(1, min(taps, x.shape[1])):
            before[:, shift:].addcmul_(x[:, :-shift], weight[:, taps - 1 - shift])
        ctx.save_for_backward(x, weight, before)
        return torch.nn.functional.silu(before)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight, before = ctx.saved_tensors
        taps = weight.shape[1]
        grad = torch.ops.aten.silu_backward(grad, before)
        grad_x = grad * weight[:, taps - 1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, taps - 1] = (grad * x).sum((0, 1))
        for shift in range(1, min(taps, x.shape[1])):
            grad_x[:, :-shift].addcmul_(grad[:, shift:], weight[:, taps - 1 - shift])
            grad_weight[:, taps - 1 - shift] = (grad[:, shift:] * x[:, :-shift]).sum((0, 1))
        return grad_x, grad_weight, grad.sum((0, 1))


def causal_conv_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mamba's short convolution and its SiLU on right-padded sequences: x [S, L, C], weight [C, taps], bias [C]."""
    y: torch.Tensor = _CausalConvSilu.apply(x, weight, bias)
    return y
