"""One rank and one tiny random model for the comparisons with independent implementations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_cascade.learner import parallel
from nemo_cascade.models import nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers


@pytest.fixture(scope="session")
def layout() -> Iterator[parallel.ParallelLayout]:
    yield parallel.start(seed=3)
    parallel.stop()


@pytest.fixture(scope="session")
def config() -> NemotronHConfig:
    return NemotronHConfig.preset("nano")


@pytest.fixture
def model(config: NemotronHConfig, layout: parallel.ParallelLayout) -> nemotron_h.NemotronH:
    """Nano with weights far from their start, so that a wrong layout or a forgotten norm weight shows."""
    torch.manual_seed(7)
    built = nemotron_h.build(config, layout)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] > 4:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for router in routers(built):
            router.expert_bias.copy_(0.2 * torch.randn_like(router.expert_bias))
    return built
