"""Random models with weights far from their start, so that a wrong layout or a forgotten norm weight shows."""

from __future__ import annotations

import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers


@torch.no_grad()
def shaken(
    config: NemotronHConfig, layout: ParallelLayout, scale: float = 4.0, bias: float = 0.2
) -> nemotron_h.NemotronH:
    """A policy with matrices of `scale` times their random start; norms, biases and per-head values moved by noise.

    `bias` is the spread of the experts' bias: large enough to change who is chosen.
    """
    torch.manual_seed(7)
    built = nemotron_h.build(config, layout)
    for parameter in built.parameters():
        if parameter.dim() > 1 and parameter.shape[-1] > 4:
            parameter.mul_(scale)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for router in routers(built):
        router.expert_bias.copy_(bias * torch.randn_like(router.expert_bias))
    return built


def packed_tokens(vocabulary: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of sequences with these lengths, and their boundaries."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()
