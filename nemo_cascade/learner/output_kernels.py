"""Two Triton kernels over a chunk of logits on a card: what its softmax gives a token, and the gradient in its place.

In PyTorch each is some ten passes over memory. Here the first reads the chunk once and the second reads and overwrites
it once; both compute in fp32, whatever the logits' dtype. Imported only where there is a card: torch's CUDA builds
bring Triton. Without one, `TRITON_INTERPRET=1` runs them on CPU tensors (tests/unit/learner/test_output_kernels.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # columns that a program holds at once
ELSEWHERE = -1  # the column of a target that another rank has


@triton.jit
def _reduce(logits, columns, out, temperature, count, width: tl.constexpr, BLOCK: tl.constexpr):
    """One token: over its row of logits s / temperature the maximum m, sum w, sum w (s - m) and the score of the
    target (0 where `columns` says ELSEWHERE), with w = exp(s - m); out [4, count].
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), -3.0e38, tl.float32)  # not -inf: -inf minus -inf is no number
    total, inner = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for begin in range(0, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        scores = tl.load(logits + row * width + place, mask=place < width, other=-float("inf")).to(tl.float32)
        scores = scores / temperature
        higher = tl.maximum(top, tl.max(scores, axis=0))
        kept = tl.exp(top - higher)  # of what was summed below the old maximum
        inner = kept * (inner + total * (top - higher))
        weights = tl.exp(scores - higher)
        total = kept * total + tl.sum(weights, axis=0)
        inner += tl.sum(tl.where(weights > 0.0, weights * (scores - higher), 0.0), axis=0)
        top = higher
    column = tl.load(columns + row)
    chosen = tl.load(logits + row * width + column, mask=column >= 0, other=0.0).to(tl.float32) / temperature
    tl.store(out + row, top)
    tl.store(out + count + row, total)
    tl.store(out + 2 * count + row, inner)
    tl.store(out + 3 * count + row, chosen)


@triton.jit
def _differentiate(logits, columns, totals, grads, temperature, width: tl.constexpr, BLOCK: tl.constexpr):
    """Over one block of one token's logits s: grad / temperature ([v = target] - exp(s_v / temperature - total))."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grads + row) / temperature
    scores = tl.load(logits + row * width + place, mask=place < width, other=0.0).to(tl.float32) / temperature
    probability = tl.exp(scores - tl.load(totals + row))
    target = tl.where(place == tl.load(columns + row), 1.0, 0.0)
    grad = scale * (target - probability)
    tl.store(logits + row * width + place, grad.to(logits.dtype.element_ty), mask=place < width)


def reduced(logits_NV: torch.Tensor, columns_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Per token [4, N] in fp32: maximum m of the scores s = logits / temperature, sum w, sum w (s - m), and the score
    of its column, 0 where that is ELSEWHERE; w = exp(s - m).

    A NaN among the logits is one in the sums.
    """
    count, width = logits_NV.shape
    assert logits_NV.is_contiguous() and logits_NV.dtype in (torch.float32, torch.bfloat16, torch.float16)
    columns_N, out = columns_N.contiguous(), logits_NV.new_empty((4, count), dtype=torch.float32)
    if count:
        _reduce[(count,)](logits_NV, columns_N, out, temperature, count, width, BLOCK=BLOCK, num_warps=8)
    return out


def differentiate_(
    logits_NV: torch.Tensor, columns_N: torch.Tensor, totals_N: torch.Tensor, grads_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The logits, overwritten by the gradient of sum_n grads_n log p_n[columns_n], with log p = s - total.

    The target's entry is a difference taken in fp32, before it is rounded to the logits' dtype.
    """
    count, width = logits_NV.shape
    assert logits_NV.is_contiguous()
    columns_N, totals_N, grads_N = columns_N.contiguous(), totals_N.contiguous(), grads_N.contiguous()
    if count:
        grid = (count, triton.cdiv(width, BLOCK))
        _differentiate[grid](logits_NV, columns_N, totals_N, grads_N, temperature, width, BLOCK=BLOCK, num_warps=8)
    return logits_NV
