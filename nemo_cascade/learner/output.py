"""Output layer and log-softmax in one node, chunked over tokens: the logits of a long row never exist at once.

For 8,192 tokens and a vocabulary of 131,072 they are 4.3 GB in fp32, and as much again for the log-probabilities, the
probabilities and the gradient. A chunk's logits are made, reduced to three numbers per token and dropped; backward
makes them again. Price: the output layer's product is computed once more. On a card two kernels (output_kernels.py)
read the logits once each way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_cascade.algorithms.kept import RAW, Distribution, keep_mask, logprobs_and_entropy
from nemo_cascade.models.onednn import linear, multiply_rows

CHUNK_LOGITS = 2**26
"""Logits that a rank holds at once: 256 MiB in fp32, the row of 512 tokens over a vocabulary of 131,072."""
KERNEL_CHUNK_LOGITS = 2**28
"""The same where the kernels run: 512 MiB in bf16, of which no copy is made. Every chunk adds to the gradient of the
whole weight, so that few of them are faster."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

Last = tuple[torch.Tensor, ...]
"""Score and id of the least token that is kept, both [N, 1]; empty where nothing is cut."""


def output_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    distribution: Distribution = RAW,
    group: dist.ProcessGroup | None = None,
    chunk_logits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [N] (differentiable) and the entropy of each position [N] (not), in nats.

    log p_t = s_t[y_t] - log sum_{v kept} exp s_t[v], with s = hidden weight^T / temperature.

    `weight_VH` is this rank's part of the vocabulary, in rank order over `group`, whose ranks all hold the same
    `hidden_NH`; its gradient is then the part that this rank's vocabulary gives, to be summed over the group. Without
    the kernels up to `chunk_logits` logits on one rank take a single pass that keeps the probabilities for backward.
    """
    group = None if group is None or group.size() == 1 else group
    vocabulary = _Vocabulary(weight_VH.detach(), distribution, group)
    if chunk_logits is None:
        chunk_logits = KERNEL_CHUNK_LOGITS if vocabulary.kernels else CHUNK_LOGITS
    if group is None and not vocabulary.kernels and targets_N.shape[0] * weight_VH.shape[0] <= chunk_logits:
        logits_NV = linear(hidden_NH, weight_VH)
        return logprobs_and_entropy(logits_NV.to(_precise(logits_NV.dtype)), targets_N, distribution)
    # where tokens are cut, each rank sees the scores of all of them
    columns = weight_VH.shape[0] * (group.size() if group is not None and distribution.cuts else 1)
    rows = max(1, chunk_logits // columns)
    return _ChunkedLogprobs.apply(hidden_NH, weight_VH, targets_N, vocabulary, rows)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """What softmax is computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _minus(scores_NV: torch.Tensor, level_N1: torch.Tensor) -> torch.Tensor:
    """The scores, which may be overwritten, minus a number per row in its dtype: one pass, also from bf16."""
    return scores_NV.sub_(level_N1) if scores_NV.dtype == level_N1.dtype else scores_NV - level_N1


@dataclass(frozen=True)
class _Vocabulary:
    """This rank's columns of the vocabulary and how a row of all of them becomes a distribution."""

    weight_VH: torch.Tensor
    distribution: Distribution
    group: dist.ProcessGroup | None

    @property
    def first(self) -> int:
        """The token id of this rank's first column."""
        return 0 if self.group is None else self.group.rank() * self.weight_VH.shape[0]

    @property
    def kernels(self) -> bool:
        """Whether the kernels for a card compute it; they cut no tokens and know no float64."""
        weight = self.weight_VH
        return weight.is_cuda and weight.dtype != torch.float64 and not self.distribution.cuts and HAS_TRITON

    def reduced_row(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, Last]:
        """What is kept of a chunk: log-probability, entropy and log-sum-exp of its scores [3, N], and `last_kept`."""
        if self.kernels:
            return self._reduced_by_kernel(hidden_NH, targets_N), ()
        scores_NV, last = self.scores(hidden_NH), ()
        if self.distribution.cuts:
            last = self.last_kept(scores_NV)
            self.cut(scores_NV, last, targets_N)
        top_N1 = self.over_ranks(scores_NV.amax(-1, keepdim=True).to(_precise(scores_NV.dtype)), dist.ReduceOp.MAX)
        columns_N1, here_N1 = self.own(targets_N)
        scores_NV = _minus(scores_NV, top_N1)
        chosen_N1 = scores_NV.gather(-1, columns_N1).masked_fill_(~here_N1, 0.0)
        weights_NV = scores_NV.exp()
        sum_N = weights_NV.sum(-1)
        del scores_NV  # before the next of its size
        inner_N = -torch.special.entr(weights_NV).sum(-1)  # w log w, and 0 where w is: a token that was cut
        return self._summed(top_N1[:, 0], sum_N, inner_N, chosen_N1[:, 0]), last

    def _reduced_by_kernel(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """The same three numbers; each rank's sums are below its own maximum and are moved below that of all."""
        from nemo_cascade.learner import output_kernels

        columns_N = self._columns(targets_N)
        logits_NV = F.linear(hidden_NH, self.weight_VH)
        own_N, sum_N, inner_N, chosen_N = output_kernels.reduced(logits_NV, columns_N, self.distribution.temperature)
        if self.group is None:
            return self._summed(own_N, sum_N, inner_N, chosen_N - own_N)
        top_N = self.over_ranks(own_N.clone(), dist.ReduceOp.MAX)
        below_N = own_N - top_N
        inner_N, sum_N = below_N.exp() * (inner_N + below_N * sum_N), below_N.exp() * sum_N
        return self._summed(top_N, sum_N, inner_N, torch.where(columns_N < 0, 0.0, chosen_N - top_N))

    def _columns(self, targets_N: torch.Tensor) -> torch.Tensor:
        """The column of each target [N] as the kernels want it."""
        from nemo_cascade.learner import output_kernels

        columns_N1, here_N1 = self.own(targets_N)
        return columns_N1.masked_fill(~here_N1, output_kernels.ELSEWHERE)[:, 0]

    def _summed(
        self, top_N: torch.Tensor, sum_N: torch.Tensor, inner_N: torch.Tensor, chosen_N: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability, entropy and log-sum-exp [3, N] from sums over this rank's columns below the maximum of all:
        of w, of w log w, and the target's score, with w = exp(score - maximum).
        """
        sum_N, inner_N, chosen_N = self.over_ranks(torch.stack([sum_N, inner_N, chosen_N]))
        log_N = sum_N.log()
        return torch.stack([chosen_N - log_N, log_N - inner_N / sum_N, top_N + log_N])

    def gradient(
        self,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        total_N: torch.Tensor,
        grad_N: torch.Tensor,
        last: Last,
    ) -> torch.Tensor:
        """Gradient of a chunk's logits [N, V] in the weight's dtype: d log p / d s_v = [v = y] - p_v."""
        if self.kernels:
            from nemo_cascade.learner import output_kernels

            columns_N, logits_NV = self._columns(targets_N), F.linear(hidden_NH, self.weight_VH)
            return output_kernels.differentiate_(logits_NV, columns_N, total_N, grad_N, self.distribution.temperature)
        columns_N1, here_N1 = self.own(targets_N)
        scores_NV = self.scores(hidden_NH)
        if last:
            self.cut(scores_NV, last, targets_N)
        scale_N1 = grad_N[:, None] / self.distribution.temperature
        grad_NV = _minus(scores_NV, total_N[:, None]).exp_()
        # The target's entry is a difference: taken before it is rounded to the weight's dtype.
        target_N1 = grad_NV.gather(-1, columns_N1).mul_(-scale_N1).add_(scale_N1 * here_N1).to(self.weight_VH.dtype)
        if grad_NV.dtype == self.weight_VH.dtype:
            return grad_NV.mul_(-scale_N1).scatter_(-1, columns_N1, target_N1)
        rounded_NV = torch.empty_like(grad_NV, dtype=self.weight_VH.dtype)
        return torch.mul(grad_NV, -scale_N1, out=rounded_NV).scatter_(-1, columns_N1, target_N1)

    def scores(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """This rank's logits over the temperature [N, V], a new tensor: at least fp32, but for `raw` as computed."""
        product_NV = linear(hidden_NH, self.weight_VH)
        if self.distribution == RAW:
            return product_NV
        scores_NV = product_NV.to(_precise(product_NV.dtype))
        return scores_NV if self.distribution.temperature == 1.0 else scores_NV.div_(self.distribution.temperature)

    def last_kept(self, scores_NV: torch.Tensor) -> Last:
        """The least token that top-k and top-p keep: its score and its id, both [N, 1].

        They stand for the whole kept set, which is the beginning of a stable sort: all larger scores, and of equal ones
        the smaller ids. So backward need not sort again.
        """
        if self.group is not None:
            parts = [torch.empty_like(scores_NV) for _ in range(self.group.size())]
            dist.all_gather(parts, scores_NV, group=self.group)
            scores_NV = torch.cat(parts, dim=-1)
        kept_NV = keep_mask(scores_NV, self.distribution.top_k, self.distribution.top_p)
        least_N1 = scores_NV.masked_fill(~kept_NV, torch.inf).amin(-1, keepdim=True)
        ids_V = torch.arange(scores_NV.shape[-1], device=scores_NV.device)
        return least_N1, (kept_NV & (scores_NV == least_N1)).mul(ids_V).amax(-1, keepdim=True)

    def cut(self, scores_NV: torch.Tensor, last: Last, targets_N: torch.Tensor) -> torch.Tensor:
        """The scores with -inf outside the kept set, in place; a target counts as kept (`logprobs_and_entropy`)."""
        least_N1, id_N1 = last
        ids_V = torch.arange(self.first, self.first + scores_NV.shape[-1], device=scores_NV.device)
        kept_NV = (scores_NV > least_N1) | ((scores_NV == least_N1) & (ids_V <= id_N1)) | (ids_V == targets_N[:, None])
        kept_NV |= scores_NV.isnan()  # it must be seen, and compares with nothing
        return scores_NV.masked_fill_(~kept_NV, -torch.inf)

    def own(self, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of each target [N, 1] (0 where another rank has it) and whether this rank has it [N, 1]."""
        columns_N1 = targets_N[:, None] - self.first
        here_N1 = (columns_N1 >= 0) & (columns_N1 < self.weight_VH.shape[0])
        return columns_N1.masked_fill(~here_N1, 0), here_N1

    def over_ranks(self, value: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """The value over all ranks' columns."""
        if self.group is not None:
            dist.all_reduce(value, op=op, group=self.group)
        return value


class _ChunkedLogprobs(torch.autograd.Function):
    """hidden [N, H], weight [V, H], targets [N] -> log-probabilities and entropies [N], `rows` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_N: torch.Tensor,
        vocabulary: _Vocabulary,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        precise = _precise(hidden_NH.dtype)
        logprobs_N, entropy_N, total_N = (hidden_NH.new_empty(targets_N.shape[0], dtype=precise) for _ in range(3))
        lasts: list[Last] = []
        for part in _parts(targets_N.shape[0], rows):
            columns, last = vocabulary.reduced_row(hidden_NH[part], targets_N[part])
            logprobs_N[part], entropy_N[part], total_N[part] = columns
            lasts.append(last)
        last_kept = [torch.cat(values) for values in zip(*lasts, strict=True)]
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, total_N, *last_kept)
        ctx.vocabulary, ctx.rows = vocabulary, rows
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, total_N, *last_kept = ctx.saved_tensors
        vocabulary: _Vocabulary = ctx.vocabulary
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        # a sum over chunks: in bf16 the later ones would vanish
        grad_weight = torch.zeros_like(weight_VH, dtype=_precise(weight_VH.dtype)) if wants_weight else None
        for part in _parts(targets_N.shape[0], ctx.rows):
            last = tuple(values[part] for values in last_kept)
            grad_NV = vocabulary.gradient(hidden_NH[part], targets_N[part], total_N[part], grad_N[part], last)
            if grad_hidden is not None:
                multiply_rows(grad_NV, weight_VH, grad_hidden[part])
            if grad_weight is not None and grad_weight.dtype == grad_NV.dtype:
                grad_weight.addmm_(grad_NV.t(), hidden_NH[part])
            elif grad_weight is not None:
                grad_weight.add_(grad_NV.t() @ hidden_NH[part])
            del grad_NV  # before the next chunk's
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None


def _parts(count: int, rows: int) -> Iterator[slice]:
    """0..count in slices of at most `rows`."""
    return (slice(begin, min(begin + rows, count)) for begin in range(0, count, rows))
