"""Where a stage's groups come from: sampled now, or read from the rollouts that an earlier run recorded.

In a distributed stage the leader of each data-parallel replica collects; `share` hands what it got (or why it failed)
to the other ranks of the replica, so that every rank goes on, or stops, together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nemo_cascade.observe.rollouts import read_groups, recorded_replicas
from nemo_cascade.rollout.collect import Collected, Collector, TakeTasks
from nemo_cascade.types import Invalid, UserError

Share = Callable[[Collected | UserError | None], Collected | UserError]
"""Leader: give what was collected; others: give None. Every rank gets the leader's."""


class RolloutSource(Protocol):
    """What the loops of `stages/` ask for groups."""

    def groups(self, step: int, take: TakeTasks) -> Collected:
        """The groups of this replica for one step."""


class SampledRollouts:
    """Groups sampled from the current policy. `prompts` is this replica's share of the step's prompts.

    `collector` is None on ranks that do not lead their replica; they need `share`.
    """

    def __init__(
        self, collector: Collector | None, prompts: int, group_size: int, seed: int, share: Share | None = None
    ) -> None:
        if collector is None and share is None:
            raise ValueError("a rank without a collector needs `share` to get its groups from")
        self.collector, self.share = collector, share
        self.prompts, self.group_size, self.seed = prompts, group_size, seed

    def groups(self, step: int, take: TakeTasks) -> Collected:
        """Collect, or wait for the leader to."""
        found: Collected | UserError | None = None
        if self.collector is not None:
            try:
                found = self.collector.collect(take, self.prompts, self.group_size, self.seed, step)
            except UserError as error:
                found = error
        if self.share is not None:
            found = self.share(found)
        if isinstance(found, UserError):
            raise found
        assert found is not None
        return found


class RecordedRollouts:
    """Groups of a recorded run, read from its stage folder: trains without any sampler (mode train_only).

    Replica r of as many as recorded gets the groups that replica r had; with another number of replicas the groups of
    all of them are dealt out in turn. With `experts` the rollouts bring those by which they were sampled.
    """

    def __init__(self, stage_folder: Path, replica: int = 0, replicas: int = 1, experts: bool = False) -> None:
        self.stage_folder, self.replica, self.replicas = stage_folder, replica, replicas
        self.experts = experts

    def groups(self, step: int, take: TakeTasks) -> Collected:
        """The step's groups as they were recorded; UserError names the steps that are there when this one is not."""
        if recorded_replicas(self.stage_folder, step) == self.replicas:
            groups = tuple(read_groups(self.stage_folder, step, self.replica, self.experts))
        else:
            everyone = read_groups(self.stage_folder, step, experts=self.experts)
            groups = tuple(everyone[self.replica :: self.replicas])
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return Collected(
            groups=groups,
            dropped={},
            tokens=sum(rollout.num_sampled for rollout in rollouts),
            rollouts=len(rollouts),
            invalid=sum(isinstance(rollout.outcome, Invalid) for rollout in rollouts),
            refills=0,
            sampling_seconds=0.0,
            reward_seconds=0.0,
        )
