"""No refit: a stage that trains on recorded rollouts has no Sampler to bring weights to."""

from __future__ import annotations

from nemo_cascade.protocols import Learner, Sampler


class NoRefit:
    """Takes the place of a Refit in mode train_only; `sampler` is None there."""

    def refit(self, learner: Learner, sampler: Sampler | None, version: int) -> str:
        """Do nothing; there is no checksum that two sides could agree on."""
        if sampler is not None:
            raise ValueError("a Sampler that gets no weights would sample from old ones")
        return ""
