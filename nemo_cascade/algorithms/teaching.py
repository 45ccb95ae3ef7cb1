"""What a teacher says about a token or a position, and how the domains of a step share the distillation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nemo_cascade.algorithms import kl
from nemo_cascade.config.schema import DistillConfig
from nemo_cascade.types import Batch


def pull(cfg: DistillConfig, logprobs_T: torch.Tensor, teacher_T: torch.Tensor) -> torch.Tensor:
    """a_t [T]: how much more probable the teacher finds the sampled token; no gradient flows through it.

    log_ratio: log pi_teacher - log pi_train, unbounded (equation 2). power: the difference of Box-Cox transforms,
    (pi_teacher^alpha - pi_train^alpha) / alpha: same sign, within +-1 / alpha, the log-ratio for alpha towards 0.
    """
    if cfg.advantage == "log_ratio":
        return (teacher_T - logprobs_T).detach()
    alpha = cfg.power_alpha
    return ((torch.expm1(alpha * teacher_T) - torch.expm1(alpha * logprobs_T)) / alpha).detach()


def teacher_kl(kind: str, logprobs_TV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Reverse KL of the student to its teacher at each position [T], differentiable: over all tokens, or the top k."""
    if kind == "full_vocab":
        teacher_TV = batch.teacher_logprobs_TV
        if teacher_TV is None:
            raise ValueError("the batch has no teacher log-probabilities [T, V]: the Learner fills them")
        if teacher_TV.shape != logprobs_TV.shape:
            raise ValueError(f"vocabularies differ: teacher {teacher_TV.shape[-1]}, student {logprobs_TV.shape[-1]}")
        return kl.exact_reverse(logprobs_TV, teacher_TV)
    if batch.teacher_logprobs_TK is None or batch.top_tokens_TK is None:
        raise ValueError("the batch has no teacher log-probabilities [T, K]: the Learner fills them")
    return kl.topk_reverse(logprobs_TV.gather(-1, batch.top_tokens_TK), batch.teacher_logprobs_TK)


def sequences_key(domain: int) -> str:
    """The denominator that counts the sequences of a domain with a trained token."""
    return f"sequences of domain {domain}"


def tokens_key(domain: int) -> str:
    """The denominator that counts the trained tokens of a domain."""
    return f"tokens of domain {domain}"


def domain_factors(shares: Sequence[float], batch: Batch, denominators: Mapping[str, float]) -> torch.Tensor:
    """What turns the mean over sequences into `distill.domain_weights`, per position [T].

    The mean gives every sequence 1 / N. Domain d with n_d of the N sequences and weight lambda_d gets
    lambda_d / (n_d Lambda), Lambda the sum of the lambdas of the domains in the step: factor N lambda_d / (n_d Lambda).
    """
    counts = [denominators.get(sequences_key(domain), 0.0) for domain in range(len(shares))]
    total = sum(share for share, count in zip(shares, counts, strict=True) if count > 0.0)
    everything = denominators["sequences"]
    factors_D = [
        everything * share / (count * total) if count > 0.0 else 0.0
        for share, count in zip(shares, counts, strict=True)
    ]
    return batch.loss_mask_T.new_tensor(factors_D)[domain_of(batch)]


def domain_of(batch: Batch) -> torch.Tensor:
    """The domain's number of each position, int64 [T]."""
    if batch.domain_S is None:
        raise ValueError("the batch does not say which domains its sequences are of")
    return batch.domain_S[batch.sequence_T]


def by_domain(
    values_T: Mapping[str, torch.Tensor],
    batch: Batch,
    denominators: Mapping[str, float],
    domains: Sequence[str],
    teachers: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Means over the trained tokens of each domain, `NAME/DOMAIN`, and of each teacher, `NAME/teacher_STAGE`.

    What the step has no token of is left out, so that nothing is averaged with a 0 that nobody measured.
    """
    if not domains:
        return {}
    domain_T, mask_T = domain_of(batch), batch.loss_mask_T
    tokens_D = [denominators.get(tokens_key(domain), 0.0) for domain in range(len(domains))]
    taught: dict[str, list[int]] = {name: [index] for index, name in enumerate(domains)}
    for index, name in enumerate(domains):
        if name in teachers:
            taught.setdefault(f"teacher_{teachers[name]}", []).append(index)
    metrics = {}
    for name, value_T in values_T.items():
        sums_D = mask_T.new_zeros(len(domains)).index_add_(0, domain_T, mask_T * value_T)
        for label, members in taught.items():
            if tokens := sum(tokens_D[member] for member in members):
                metrics[f"{name}/{label}"] = sums_D[members].sum() / tokens
    return metrics
