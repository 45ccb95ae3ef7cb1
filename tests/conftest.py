"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    """One rank for the tests of a module, where no other fixture holds one: `pytest.mark.usefixtures("ranks")`."""
    from nemo_cascade.learner import parallel  # here: most tests need neither torch nor Megatron

    started = parallel.is_started()
    if not started:
        parallel.start()
    yield
    if not started:
        parallel.stop()
