"""causal_conv1d's kernel as a sum over taps in fp32, under its own name and arguments (1.4 and later)."""

import torch
import torch.nn.functional as F

CALLS: list[tuple[int, ...]] = []
"""The shape of x, once for each call."""


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """x [b, channels, l], weight [channels, taps] -> [b, channels, l], each token of its own and the ones before.

    With `seq_idx` [b, l] a token sees those of its own sequence only. Channels last (a stride of 1 over channels) asks
    the kernels for channels and strides in multiples of 8.
    """
    assert initial_states is None and not return_final_states and activation in (None, "silu", "swish")
    (channels, taps), length = weight.shape, x.shape[2]
    assert x.shape[1] == channels and 2 <= taps <= 4 and (bias is None or bias.shape == (channels,))
    assert x.stride(1) == 1 or x.stride(2) == 1
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    CALLS.append(tuple(x.shape))
    wide, total = x.float(), torch.zeros_like(x, dtype=torch.float32)
    for back in range(taps):
        moved = F.pad(wide, (back, 0))[..., :length]
        if seq_idx is not None:
            before = F.pad(seq_idx, (back, 0), value=-1)[..., :length]
            moved = moved * (before == seq_idx)[:, None]
        total = total + weight[:, taps - 1 - back, None].float() * moved
    if bias is not None:
        total = total + bias[:, None].float()
    return (F.silu(total) if activation else total).to(x.dtype)
