"""One rank, one tiny random model for all tests of the models package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.nano_model import config, layout, model

__all__ = ["config", "layout", "model"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What the parts in C want."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
