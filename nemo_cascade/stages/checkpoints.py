"""When a stage saves, what it keeps, and where it goes on after a kill."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.protocols import Learner

LOG = logging.getLogger(__name__)
STEP_FORMAT = "step_{:06d}"


@dataclass
class Checkpoints:
    """Resumable checkpoints every `save_every` steps (the newest one stays) and exported weights at `keep_steps`.

    A folder counts only when the Learner has written it whole (it appears by a rename), so the newest one is always
    usable. Where the Learner writes while training goes on, the one before stays until the new one has appeared; the
    last one of the stage is waited for. Only the first rank deletes.
    """

    resumable: Path  # <stage>/checkpoints
    exported: Path  # <stage>/weights
    save_every: int
    keep_steps: frozenset[int]
    num_steps: int
    first_rank: bool

    def resume(self, learner: Learner) -> int:
        """Load the newest checkpoint; returns the number of finished steps, 0 for a fresh stage."""
        if self.first_rank:
            for unfinished in self.resumable.glob(".step_*"):  # of a killed run
                shutil.rmtree(unfinished)
        newest = max(self.resumable.glob("step_[0-9]*"), default=None)
        if newest is None:
            return 0
        step = learner.load(str(newest))
        LOG.info("resumed at step %d from %s", step, newest.name)
        return step

    def after(self, step: int, learner: Learner) -> None:
        """Called when `step` steps are finished."""
        if step in self.keep_steps:
            learner.export(str(self.exported / STEP_FORMAT.format(step)))
        if step % self.save_every == 0 or step == self.num_steps:
            learner.save(str(self.resumable / STEP_FORMAT.format(step)), step)
            if step == self.num_steps:
                learner.finish_saving()
            if self.first_rank:
                for older in sorted(self.resumable.glob("step_[0-9]*"))[:-1]:
                    shutil.rmtree(older)
