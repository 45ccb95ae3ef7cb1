"""Kullback-Leibler divergence of the policy from a reference, per token: three estimators and the exact value."""

from __future__ import annotations

import torch

from nemo_cascade.config.bounds import choose


def estimate(kind: str, logprobs_T: torch.Tensor, reference_T: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) [T] estimated from the sampled token, for tokens drawn from the policy; nats per token.

    With d = log policy - log reference (Schulman, "Approximating KL divergence"):
    k1 = d: unbiased, high variance, may be negative. Its own derivative averages to zero over samples, so as a loss
    it would do nothing; here its gradient is the score-function one, d * grad log policy, which is KL's true gradient.
    k2 = d^2 / 2: biased value, the same gradient as k1.
    k3 = exp(-d) - 1 + d: unbiased and never negative; its gradient, (1 - exp(-d)) * grad log policy, agrees with the
    true one to first order in d.
    """
    choose("loss.kl_type", kind, ("k1", "k2", "k3"))
    difference_T = logprobs_T - reference_T
    if kind == "k1":
        fixed_T = difference_T.detach()
        return fixed_T + fixed_T * (logprobs_T - logprobs_T.detach())
    if kind == "k2":
        return 0.5 * difference_T.square()
    return torch.expm1(-difference_T) + difference_T


def exact_reverse(logprobs_TV: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) [T] over the whole vocabulary, in nats; both arguments are normalised log-probabilities.

    Differentiable in the first argument. The reference must give every token a probability (no cut to a kept set).
    """
    return (logprobs_TV.exp() * (logprobs_TV - reference_TV)).sum(dim=-1)
