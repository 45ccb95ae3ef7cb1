"""Where released data lies on this machine, for tests that read it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def released_data() -> Path:
    """The folder that NEMO_CASCADE_DATA names; without it the test is skipped."""
    folder = os.environ.get("NEMO_CASCADE_DATA")
    if not folder:
        pytest.skip("NEMO_CASCADE_DATA is not set: no released rows")
    return Path(folder)
