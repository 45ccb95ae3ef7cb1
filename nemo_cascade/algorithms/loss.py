"""The three losses: policy gradient (equation 1), on-policy distillation (equations 2 to 4), cross-entropy.

Each is an `Objective`: a function that counts denominators over the whole step, and a function that turns one
micro-batch into a loss already divided by them. So the sum over micro-batches and ranks is the loss of the step,
whatever the packing. Metrics are means over the trained tokens of the step, except those named `_max`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from nemo_cascade.algorithms import kl, teaching
from nemo_cascade.algorithms.importance import Importance, agreement, clipped_ratio, log_ratio
from nemo_cascade.config.bounds import choose
from nemo_cascade.config.schema import DistillConfig, LossConfig
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Batch, UserError
from nemo_cascade.types import Sequence as TokenSequence

Metrics = dict[str, torch.Tensor]


def trained_tokens(sequence: TokenSequence) -> int:
    """Tokens of a sequence that enter the loss; the first one never does, nothing predicts it."""
    return sum(sequence.loss_mask[1:])


def count(sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """Trained tokens, sequences and groups of this rank, and the trained tokens of each group.

    Only what has at least one trained token counts. A group stays whole on one rank (its key is `local:`, never added
    over ranks), because its index is that rank's own.
    """
    tokens = [trained_tokens(sequence) for sequence in sequences]
    per_group: Counter[int] = Counter()
    for sequence, number in zip(sequences, tokens, strict=True):
        per_group[sequence.group] += number
    totals = {
        "tokens": float(sum(tokens)),
        "sequences": float(sum(number > 0 for number in tokens)),
        "groups": float(sum(number > 0 for number in per_group.values())),
    }
    return totals | {group_key(group): float(number) for group, number in per_group.items()}


def count_by_domain(sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """`count`, and the sequences and trained tokens of each domain."""
    totals = count(sequences)
    for sequence in sequences:
        if number := trained_tokens(sequence):
            domain = sequence.domain
            for key, more in ((teaching.sequences_key(domain), 1.0), (teaching.tokens_key(domain), number)):
                totals[key] = totals.get(key, 0.0) + more
    return totals


def group_key(group: int) -> str:
    """The key under which `count` keeps the trained tokens of one group."""
    return f"local:group {group}"


def token_weights(
    normalize: str, batch: Batch, denominators: Mapping[str, float], constant: float | None = None
) -> torch.Tensor:
    """Weight [T] of each trained token, 0 elsewhere; over the step the weights sum to 1, except with `constant`.

    `batch_tokens`: 1 / tokens of the step. `group_tokens`: equation 1 as printed, 1 / tokens of its group, then the
    mean over groups. `sequence`: 1 / tokens of its sequence, then the mean over sequences (equation 4). `constant`:
    1 / `loss.constant`, so that a token weighs the same in short and long answers and in every step (Dr. GRPO, arXiv
    2503.20783, with longest answer x rollouts of the step).
    """
    mask_T = batch.loss_mask_T
    if normalize == "constant":
        assert constant is not None, "the config was checked"
        return mask_T / constant
    if normalize == "batch_tokens":
        return mask_T / max(denominators["tokens"], 1.0)
    if normalize == "group_tokens":
        sizes = [denominators.get(group_key(group), 1.0) for group in batch.group_S.tolist()]
        tokens_S = torch.tensor(sizes, dtype=mask_T.dtype).to(mask_T.device, non_blocking=True)
        number = denominators["groups"]
    else:
        tokens_S = mask_T.new_zeros(batch.group_S.shape[0]).index_add_(0, batch.sequence_T, mask_T)
        number = denominators["sequences"]
    return mask_T / (tokens_S.clamp_min(1.0)[batch.sequence_T] * max(number, 1.0))


def policy_gradient(cfg: LossConfig) -> Objective:
    """REINFORCE with group-relative advantages (equation 1).

    loss = - sum_t c_t w_t (A_t log pi(y_t) - kl * KL_t), gradient through log pi and KL only. c_t is the normaliser
    (`token_weights`), w_t the importance weight between Learner and Sampler. Strictly on-policy there is no ratio
    clipping: exactly one update follows each batch, so pi is the policy that sampled, up to the engines' rounding.

    `kl_in: reward` takes kl * KL_t out of the advantage instead: A_t - kl * sg[KL_t], with no gradient through KL.

    `clip_low`, `clip_high` are for rollouts of an older policy (mode train_only): A_t log pi becomes
    min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) with rho_t = pi(y_t) / pi_old(y_t), gradient through
    rho_t. pi_old are the log-probabilities that the Sampler recorded with the rollout. KL is then averaged over the
    older policy's tokens, which is not its expectation under pi. `dual_clip` bounds the same by dual_clip A_t from
    below where A_t < 0.

    Tokens of importance weight 0 are out of the loss whatever their log-probability, infinite ones too (and these out
    of KL); a NaN makes the loss NaN, which the Learner refuses.
    """
    importance = Importance(cfg.importance, cfg.importance_low, cfg.importance_high)

    def loss(logprobs_T: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
        advantages_T = needed(batch.advantages_T, "advantages", "group_relative gives them")
        weights_T = token_weights(cfg.normalize, batch, denominators, cfg.constant)
        mean_T = token_weights("batch_tokens", batch, denominators)
        metrics: Metrics = {}
        if batch.sampler_logprobs_T is not None:
            correction_T, metrics = correct(logprobs_T, batch, importance, mean_T, denominators)
            weights_T = weights_T * correction_T
        elif cfg.importance != "none" or cfg.clip_low is not None:
            key = "clip_low" if cfg.importance == "none" else f"importance: {cfg.importance}"
            raise UserError(f"loss.{key} needs the sampler's log-probabilities; set it to none (null)")
        lost_T = (weights_T == 0.0) & logprobs_T.isinf()
        logprobs_T = logprobs_T.masked_fill(lost_T, 0.0)
        metrics["advantage_abs"] = (mean_T * advantages_T.abs()).sum()
        penalty: torch.Tensor | float = 0.0
        if cfg.kl > 0.0 or batch.reference_logprobs_T is not None:
            reference_T = needed(batch.reference_logprobs_T, "reference log-probabilities", "loss.kl asks for them")
            kl_T = kl.estimate(cfg.kl_type, logprobs_T, reference_T.masked_fill(lost_T, 0.0))
            metrics["kl"] = (mean_T * kl_T.detach()).sum()
            if cfg.kl_in == "reward":
                advantages_T = advantages_T - cfg.kl * kl_T.detach()
            elif cfg.kl > 0.0:
                penalty = cfg.kl * (weights_T * kl_T).sum()
        if cfg.clip_low is None or cfg.clip_high is None:
            total = -(weights_T * advantages_T * logprobs_T).sum()
        else:
            old_T = needed(batch.sampler_logprobs_T, "sampler log-probabilities", "they are those of the old policy")
            old_T = old_T.masked_fill(lost_T, 0.0)
            surrogate_T, held_T = clipped_ratio(
                logprobs_T, old_T, advantages_T, cfg.clip_low, cfg.clip_high, cfg.dual_clip
            )
            metrics["clipped_share"] = (mean_T * held_T).sum()
            total = -(weights_T * surrogate_T).sum()
        total = total + penalty
        metrics["loss"] = total.detach()
        return total, metrics

    return Objective("policy_gradient", loss, count, check=masked_share_below(cfg.max_masked_share, "loss"))


def distillation(
    cfg: DistillConfig, domains: Sequence[str] = (), teachers: Mapping[str, str] | None = None
) -> Objective:
    """Multi-domain on-policy distillation: each sampled token is pulled towards its teacher (equations 2 to 4).

    a_t = log pi_teacher(y_t) - log pi_train(y_t) (2); r_t = pi_train(y_t) / pi_inf(y_t), w_t = r_t inside
    [importance_low, importance_high] and 0 outside (3); loss = - mean over sequences of
    1 / |V(y)| sum_{t in V(y)} w_t sg[a_t] log pi_train(y_t) (4). w_t and a_t carry no gradient.
    The paper leaves open whether V(y) counts response tokens before or after the mask of (3). Here it is before:
    |V(y)| is the number of trained tokens of the sequence, so a masked token does not raise the weight of the others.

    `advantage: power` bounds a_t by 1 / alpha: (pi_teacher^alpha - pi_train^alpha) / alpha, of the same sign
    (PowerOPD, arXiv 2606.17199, whose code leaves out the constant 1 / alpha).
    `full_vocab` replaces -a_t by the exact reverse KL over the vocabulary at each position, `topk` by that over the
    student's `top_k` tokens and one bucket for the rest. These expectations need no ratio, so w_t is then 1 inside the
    bounds and 0 outside. Not valid when sampling cuts the vocabulary (top-p, top-k) and log-probabilities are those of
    the kept set.
    `domain_weights` replaces the mean over sequences: `teaching.domain_factors`.

    `domains` are the names that `Sequence.domain` counts, `teachers` maps each to its teacher's; both name metrics.
    """
    importance = Importance("icepop", cfg.importance_low, cfg.importance_high)
    exact = cfg.kind != "sampled"
    shares = [cfg.domain_weights[name] for name in domains] if cfg.domain_weights else []
    assert bool(shares) == bool(cfg.domain_weights), "weights are given to domains that have names"

    def loss(scores: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
        weights_T = token_weights("sequence", batch, denominators)
        if shares:
            weights_T = weights_T * teaching.domain_factors(shares, batch, denominators)
        mean_T = token_weights("batch_tokens", batch, denominators)
        logprobs_T = scores.gather(-1, batch.targets_T[:, None])[:, 0] if exact else scores
        correction_T, metrics = correct(logprobs_T, batch, importance, mean_T, denominators)
        parts_T = {"masked_share": correction_T == 0.0}
        if exact:
            reverse_kl_T = teaching.teacher_kl(cfg.kind, scores, batch)
            total = (weights_T * (correction_T != 0.0) * reverse_kl_T).sum()
        else:
            teacher_T = needed(batch.teacher_logprobs_T, "teacher log-probabilities", "equation 2 needs them")
            reverse_kl_T = logprobs_T.detach() - teacher_T
            advantage_T = teaching.pull(cfg, logprobs_T.detach(), teacher_T)
            metrics["advantage_abs"] = (mean_T * advantage_T.abs()).sum()
            parts_T["teacher_gap"] = reverse_kl_T.abs()
            if cfg.clip_advantage is not None:
                advantage_T = advantage_T.clamp(-cfg.clip_advantage, cfg.clip_advantage)
            outside_T = correction_T == 0.0
            advantage_T, logprobs_T = advantage_T.masked_fill(outside_T, 0.0), logprobs_T.masked_fill(outside_T, 0.0)
            total = -(weights_T * correction_T * advantage_T * logprobs_T).sum()
        metrics["reverse_kl"] = (mean_T * reverse_kl_T.detach()).sum()
        parts_T["reverse_kl"] = reverse_kl_T.detach()
        metrics |= teaching.by_domain(parts_T, batch, denominators, domains, teachers or {})
        metrics["loss"] = total.detach()
        return total, metrics

    return Objective(
        f"distillation_{cfg.kind}", loss, count_by_domain if domains else count, needs_logits=exact,
        needs_teacher_vocabulary=exact, top_k=cfg.top_k if cfg.kind == "topk" else 0,
        check=masked_share_below(cfg.max_masked_share, "distill"),
    )  # fmt: skip


def cross_entropy(reduction: str) -> Objective:
    """Next-token cross-entropy of supervised fine-tuning, in nats.

    `token`: the mean over the trained tokens of the step; `sequence`: the mean over sequences of each one's mean.
    """
    choose("reduction", reduction, ("token", "sequence"))
    normalize = "batch_tokens" if reduction == "token" else "sequence"

    def loss(logprobs_T: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
        total = -(token_weights(normalize, batch, denominators) * logprobs_T).sum()
        return total, {"loss": total.detach()}

    return Objective("cross_entropy", loss, count)


def correct(
    logprobs_T: torch.Tensor,
    batch: Batch,
    importance: Importance,
    mean_T: torch.Tensor,
    denominators: Mapping[str, float],
) -> tuple[torch.Tensor, Metrics]:
    """Importance weights [T], and what tells whether Learner and Sampler agree (`importance.agreement`)."""
    sampler_T = needed(batch.sampler_logprobs_T, "sampler log-probabilities", "equation 3 divides by them")
    log_ratio_T = log_ratio(logprobs_T, sampler_T, batch.loss_mask_T)
    weights_T = importance.weights(log_ratio_T, batch)
    return weights_T, agreement(log_ratio_T, weights_T, mean_T, batch, denominators)


def masked_share_below(limit: float, section: str):
    """A check that aborts the step when importance weighting takes too many tokens or sequences out of the loss."""

    def check(metrics: Mapping[str, float]) -> None:
        for name, what in (("masked_share", "trained tokens"), ("masked_sequence_share", "sequences")):
            share = metrics.get(name, 0.0)
            if share > limit:
                raise UserError(
                    f"{section}.max_masked_share: the importance mask takes out {share:.0%} of the {what}, more than "
                    f"{limit:.0%}; Sampler and Learner disagree by {metrics['gap_abs']:.3g} nats: check the refit, the "
                    "sampling distribution and the precision, or raise the limit"
                )

    return check


def needed(tensor: torch.Tensor | None, what: str, why: str) -> torch.Tensor:
    """The tensor, or an error that says what the batch lacks."""
    if tensor is None:
        raise ValueError(f"the batch has no {what}: {why}")
    return tensor
