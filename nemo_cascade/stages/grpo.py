"""Group-relative policy optimisation, strictly on-policy (section 4.1.2, equation 1): one update per batch of rollouts.

Left out on purpose: a critic, ratio clipping (the importance ratio is 1 by construction), an entropy bonus, replay.
"""

from __future__ import annotations

from functools import partial

from nemo_cascade.algorithms.advantage import group_relative
from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.schema import GrpoConfig
from nemo_cascade.data.tasks import TaskStream
from nemo_cascade.observe.record import RunRecord
from nemo_cascade.protocols import Learner, Refit, Sampler
from nemo_cascade.rollout.source import RolloutSource
from nemo_cascade.stages.checkpoints import Checkpoints
from nemo_cascade.stages.sequences import as_sequences, with_reference, with_routing


def train(  # noqa: PLR0913 - the seams of the loop, each named once
    cfg: GrpoConfig,
    tasks: TaskStream,
    source: RolloutSource,
    learner: Learner,
    sampler: Sampler,
    refit: Refit,
    record: RunRecord,
    checkpoints: Checkpoints,
    reference: str | None,
) -> None:
    """Run the remaining steps. `reference`: the checkpoint entering the stage, for the KL term; None when kl is 0."""
    objective = policy_gradient(cfg.loss)
    first = checkpoints.resume(learner)
    record.refitted(refit.refit(learner, sampler, version=first))
    for step in record.remaining(first):
        collected = source.groups(step, partial(tasks.take, step))
        advantages_P_G = group_relative(collected.groups, cfg.advantage)
        sequences = as_sequences(collected.groups, advantages_P_G)
        if cfg.mode != "sample_only":
            with record.timer("training"):
                sequences = with_reference(sequences, learner, reference)
                sequences = with_routing(sequences, learner, cfg.loss.routing_replay)
                metrics = learner.update(sequences, objective)
            with record.timer("refit"):
                refit.refit(learner, sampler, version=step + 1)
        else:
            metrics = {}
        record.rollouts(step, collected.groups, advantages_P_G)
        record.step(step, metrics, collected)
        checkpoints.after(step + 1, learner)
