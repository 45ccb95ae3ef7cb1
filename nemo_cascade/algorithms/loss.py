"""The three losses: policy gradient (equation 1), on-policy distillation (equations 2 to 4), cross-entropy.

Each is an `Objective`: a function that counts denominators over the whole step, and a function that turns one
micro-batch into a loss already divided by them. So the sum over micro-batches and ranks is the loss of the step,
whatever the packing. Metrics are means over the trained tokens of the step, except those named `_max`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from nemo_cascade.algorithms import kl
from nemo_cascade.algorithms.importance import Importance, ratio
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


def group_key(group: int) -> str:
    """The key under which `count` keeps the trained tokens of one group."""
    return f"local:group {group}"


def token_weights(normalize: str, batch: Batch, denominators: Mapping[str, float]) -> torch.Tensor:
    """Weight [T] of each trained token, 0 elsewhere; over the step the weights sum to 1.

    `batch_tokens`: 1 / tokens of the step. `group_tokens`: equation 1 as printed, 1 / tokens of its group, then the
    mean over groups. `sequence`: 1 / tokens of its sequence, then the mean over sequences (equation 4).
    """
    mask_T = batch.loss_mask_T
    if normalize == "batch_tokens":
        return mask_T / max(denominators["tokens"], 1.0)
    if normalize == "group_tokens":
        sizes = [denominators.get(group_key(group), 1.0) for group in batch.group_S.tolist()]
        tokens_S = mask_T.new_tensor(sizes)
        number = denominators["groups"]
    else:
        tokens_S = mask_T.new_zeros(batch.group_S.shape[0]).index_add_(0, batch.sequence_T, mask_T)
        number = denominators["sequences"]
    return mask_T / (tokens_S.clamp_min(1.0)[batch.sequence_T] * max(number, 1.0))


def policy_gradient(cfg: LossConfig) -> Objective:
    """REINFORCE with group-relative advantages, strictly on-policy (equation 1).

    loss = - sum_t c_t w_t (A_t log pi(y_t) - kl * KL_t), gradient through log pi and KL only. c_t is the normaliser
    (`token_weights`), w_t the importance weight between Learner and Sampler. There is no ratio clipping: exactly one
    update follows each batch, so pi is the policy that sampled, up to the engines' rounding. Not valid for a second
    update on the same rollouts.
    """
    importance = Importance(cfg.importance, cfg.importance_low, cfg.importance_high)

    def loss(logprobs_T: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
        advantages_T = needed(batch.advantages_T, "advantages", "group_relative gives them")
        weights_T = token_weights(cfg.normalize, batch, denominators)
        mean_T = token_weights("batch_tokens", batch, denominators)
        metrics: Metrics = {}
        if batch.sampler_logprobs_T is not None:
            correction_T, metrics = correct(logprobs_T, batch.sampler_logprobs_T, importance, mean_T)
            weights_T = weights_T * correction_T
        elif cfg.importance != "none":
            raise UserError(f"loss.importance: {cfg.importance} needs the sampler's log-probabilities; set it to none")
        total = -(weights_T * advantages_T * logprobs_T).sum()
        metrics["advantage_abs"] = (mean_T * advantages_T.abs()).sum()
        if cfg.kl > 0.0 or batch.reference_logprobs_T is not None:
            reference_T = needed(batch.reference_logprobs_T, "reference log-probabilities", "loss.kl asks for them")
            kl_T = kl.estimate(cfg.kl_type, logprobs_T, reference_T)
            metrics["kl"] = (mean_T * kl_T.detach()).sum()
            if cfg.kl > 0.0:
                total = total + cfg.kl * (weights_T * kl_T).sum()
        metrics["loss"] = total.detach()
        return total, metrics

    return Objective("policy_gradient", loss, count, check=masked_share_below(cfg.max_masked_share, "loss"))


def distillation(cfg: DistillConfig) -> Objective:
    """Multi-domain on-policy distillation: each sampled token is pulled towards its teacher (equations 2 to 4).

    a_t = log pi_teacher(y_t) - log pi_train(y_t) (2); r_t = pi_train(y_t) / pi_inf(y_t), w_t = r_t inside
    [importance_low, importance_high] and 0 outside (3); loss = - mean over sequences of
    1 / |V(y)| sum_{t in V(y)} w_t sg[a_t] log pi_train(y_t) (4). w_t and a_t carry no gradient.
    The paper leaves open whether V(y) counts response tokens before or after the mask of (3). Here it is before:
    |V(y)| is the number of trained tokens of the sequence, so a masked token does not raise the weight of the others.

    `full_vocab` replaces -a_t by the exact reverse KL over the vocabulary at each position. That expectation needs no
    ratio, so w_t is then 1 inside the bounds and 0 outside. Not valid when sampling cuts the vocabulary (top-p, top-k)
    and log-probabilities are those of the kept set.
    """
    importance = Importance("icepop", cfg.importance_low, cfg.importance_high)
    full = cfg.kind == "full_vocab"

    def loss(scores: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
        sampler_T = needed(batch.sampler_logprobs_T, "sampler log-probabilities", "equation 3 divides by them")
        weights_T = token_weights("sequence", batch, denominators)
        mean_T = token_weights("batch_tokens", batch, denominators)
        logprobs_T = scores.gather(-1, batch.targets_T[:, None])[:, 0] if full else scores
        correction_T, metrics = correct(logprobs_T, sampler_T, importance, mean_T)
        if full:
            teacher_TV = needed(batch.teacher_logprobs_TV, "teacher log-probabilities [T, V]", "the Learner fills them")
            kl_T = kl.exact_reverse(scores, teacher_TV)
            total = (weights_T * (correction_T > 0.0) * kl_T).sum()
            metrics["reverse_kl"] = (mean_T * kl_T.detach()).sum()
        else:
            teacher_T = needed(batch.teacher_logprobs_T, "teacher log-probabilities", "equation 2 needs them")
            advantage_T = (teacher_T - logprobs_T).detach()
            metrics["reverse_kl"] = -(mean_T * advantage_T).sum()
            metrics["advantage_abs"] = (mean_T * advantage_T.abs()).sum()
            if cfg.clip_advantage is not None:
                advantage_T = advantage_T.clamp(-cfg.clip_advantage, cfg.clip_advantage)
            total = -(weights_T * correction_T * advantage_T * logprobs_T).sum()
        metrics["loss"] = total.detach()
        return total, metrics

    return Objective(
        f"distillation_{cfg.kind}", loss, count, needs_logits=full, needs_teacher_vocabulary=full,
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
    logprobs_T: torch.Tensor, sampler_T: torch.Tensor, importance: Importance, mean_T: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    """Importance weights [T], and what tells whether Learner and Sampler agree.

    `gap` = Learner minus Sampler log-probability (mean; `gap_abs_max` is the worst token), `ratio` = its exponential,
    `masked_share` = trained tokens that the weight takes out of the loss.
    """
    mask_T = (mean_T > 0.0).to(mean_T.dtype)
    ratio_T = ratio(logprobs_T, sampler_T)
    gap_T = logprobs_T.detach() - sampler_T
    weights_T = importance.weights(ratio_T)
    return weights_T, {
        "ratio": (mean_T * ratio_T).sum(),
        "ratio_max": (mask_T * ratio_T).max(),
        "gap": (mean_T * gap_T).sum(),
        "gap_abs": (mean_T * gap_T.abs()).sum(),
        "gap_abs_max": (mask_T * gap_T.abs()).max(),
        "masked_share": (mean_T * (weights_T == 0.0)).sum(),
    }


def masked_share_below(limit: float, section: str):
    """A check that aborts the step when importance weighting takes too many tokens out of the loss."""

    def check(metrics: Mapping[str, float]) -> None:
        share = metrics.get("masked_share", 0.0)
        if share > limit:
            raise UserError(
                f"{section}.max_masked_share: the importance mask takes out {share:.0%} of the trained tokens, more "
                f"than {limit:.0%}; Sampler and Learner disagree by {metrics['gap_abs']:.3g} nats: check the refit, "
                "the sampling distribution and the precision, or raise the limit"
            )

    return check


def needed(tensor: torch.Tensor | None, what: str, why: str) -> torch.Tensor:
    """The tensor, or an error that says what the batch lacks."""
    if tensor is None:
        raise ValueError(f"the batch has no {what}: {why}")
    return tensor
