"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

SLOW_S = 1500  # a hang is ended in the end; a slow test on a machine that is busy with other work is not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take longer than pyproject's limit, which is that of the fast ones."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


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
