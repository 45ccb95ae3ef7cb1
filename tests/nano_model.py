"""Fixtures of one rank and one nano model, for the conftest.py of folders whose tests want them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_cascade.learner import parallel
from nemo_cascade.models import nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from tests.numerics.shaken import shaken


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
    return shaken(config, layout)
