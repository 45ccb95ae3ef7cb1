"""Drawing tokens: one uniform number per token, from a stream that belongs to the request alone.

`torch.multinomial` takes its randomness from one global stream, so a completion would depend on who else is in the
batch. Here token t of a request uses the t-th number of a counter-based generator (splitmix64) keyed by the request's
seed, and the inverse of the cumulative distribution in token-id order.
"""

from __future__ import annotations

import numpy as np
import torch

from nemo_cascade.algorithms.kept import keep_mask
from nemo_cascade.config.bounds import choose
from nemo_cascade.config.schema import LOGPROBS
from nemo_cascade.types import SamplingParams, UserError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MASK_64 = (1 << 64) - 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) with 24 random bits, the t-th one a function of (seed, t) only; float32 [count]."""
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & MASK_64], dtype=np.uint64)) + GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
        return (_mix(state) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def check_params(params: SamplingParams) -> None:
    """Refuse what cannot be drawn from, naming the key."""
    if params.temperature < 0:
        raise UserError(f"sampling.temperature: {params.temperature} is below 0; use 0 for greedy")
    if not 0 < params.top_p <= 1:
        raise UserError(f"sampling.top_p: {params.top_p} is outside (0, 1]; use 1 to keep every token")
    if params.top_k < 0:
        raise UserError(f"sampling.top_k: {params.top_k} is below 0; use 0 to keep every token")
    choose("sampling.logprobs", params.logprobs, LOGPROBS)


def draw(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability under the distribution that sampled it: logits / temperature on the
    kept set. With `logprobs: raw` it is the model's own instead; the draw is the same.

    Greedy decoding (temperature 0) is a point mass, which has no useful log-probability; it reports the model's own
    (temperature 1, every token kept), as inference servers do. The first of equal logits wins.
    """
    if params.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        logprobs_BV = torch.log_softmax(logits_BV, -1)
    else:
        scaled_BV = logits_BV / params.temperature
        if params.top_k > 0 or params.top_p < 1:
            scaled_BV = scaled_BV.masked_fill(~keep_mask(scaled_BV, params.top_k, params.top_p), -torch.inf)
        logprobs_BV = torch.log_softmax(scaled_BV, -1)
        cumulative_BV = logprobs_BV.exp().cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        # Kept strictly below the total: rounding must never select a token of probability 0 at the end of the
        # vocabulary.
        target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
        if params.logprobs == "raw":
            logprobs_BV = torch.log_softmax(logits_BV, -1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)
