"""Kullback-Leibler divergence of the policy from a reference, per token: three estimators, exact, and top-k."""

from __future__ import annotations

import math

import torch

from nemo_cascade.algorithms.importance import MAX_LOG_RATIO
from nemo_cascade.config.bounds import choose
from nemo_cascade.config.schema import KL_TYPES


def estimate(kind: str, logprobs_T: torch.Tensor, reference_T: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) [T] estimated from the sampled token, for tokens drawn from the policy; nats per token.

    With d = log policy - log reference (Schulman, "Approximating KL divergence"):
    k1 = d: unbiased, high variance, may be negative. Its own derivative averages to zero over samples, so as a loss
    it would do nothing; here its gradient is the score-function one, d * grad log policy, which is KL's true gradient.
    k2 = d^2 / 2: biased value, the same gradient as k1.
    k3 = exp(-d) - 1 + d: unbiased and never negative; its gradient, (1 - exp(-d)) * grad log policy, agrees with the
    true one to first order in d, and is on average that of KL(reference || policy), the other direction.

    As a penalty on the advantage (`loss.kl_in: reward`) only values count: k1 then has the true gradient on average;
    k2 and k3 do not. Where the policy lies more than 20 nats below the reference k3 goes on as a straight line, so that
    no exp overflows.
    """
    choose("loss.kl_type", kind, KL_TYPES)
    difference_T = logprobs_T - reference_T
    if kind == "k1":
        fixed_T = difference_T.detach()
        return fixed_T + fixed_T * (logprobs_T - logprobs_T.detach())
    if kind == "k2":
        return 0.5 * difference_T.square()
    curved_T = torch.expm1((-difference_T).clamp(max=MAX_LOG_RATIO))
    straight_T = math.expm1(MAX_LOG_RATIO) + math.exp(MAX_LOG_RATIO) * (-difference_T - MAX_LOG_RATIO)
    return torch.where(difference_T < -MAX_LOG_RATIO, straight_T, curved_T) + difference_T


def exact_reverse(logprobs_TV: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) [T] over the whole vocabulary, in nats; both arguments are normalised log-probabilities.

    Differentiable in the first argument. The reference must give every token a probability (no cut to a kept set).
    """
    return (logprobs_TV.exp() * (logprobs_TV - reference_TV)).sum(dim=-1)


def topk_reverse(logprobs_TK: torch.Tensor, reference_TK: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) [T] over K named tokens and one bucket for all others, in nats.

    sum_k p_k log(p_k / q_k) + P log(P / Q), P = 1 - sum_k p_k and Q = 1 - sum_k q_k the mass of the rest. Never above
    the exact KL (the bucket hides differences inside it), equal to it when the others differ by one factor, or K is
    the vocabulary. Masses below the precision of the dtype count as that precision.
    """
    smallest = torch.finfo(logprobs_TK.dtype).eps
    rest_T = (1.0 - logprobs_TK.exp().sum(dim=-1)).clamp_min(smallest)
    reference_rest_T = (1.0 - reference_TK.exp().sum(dim=-1)).clamp_min(smallest)
    return exact_reverse(logprobs_TK, reference_TK) + rest_T * (rest_T.log() - reference_rest_T.log())
