"""Start and stop the ranks of the Learner.

The code lies in models/parallel.py, below the Learner, because a NeMo model restored alone starts its own rank.
"""

from __future__ import annotations

from nemo_cascade.models.parallel import ParallelLayout, is_started, set_seed, start, stop

__all__ = ["ParallelLayout", "is_started", "set_seed", "start", "stop"]
