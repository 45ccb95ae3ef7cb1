"""Multi-domain on-policy distillation (section 4.4, equations 2 to 4): each domain's strongest checkpoint scores its
tokens.

The loop is `grpo.py` with one visible difference: teachers' log-probabilities instead of rewards and advantages.
Left out on purpose: outcome rewards, a group baseline, a KL term; so one rollout per prompt is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from nemo_cascade.algorithms.loss import distillation
from nemo_cascade.config.schema import MopdConfig
from nemo_cascade.data.tasks import TaskStream
from nemo_cascade.observe.record import RunRecord
from nemo_cascade.protocols import Learner, Refit, Sampler
from nemo_cascade.rollout.source import RolloutSource
from nemo_cascade.stages.checkpoints import Checkpoints
from nemo_cascade.stages.sequences import as_sequences, domains, with_routing, with_teachers


def train(  # noqa: PLR0913 - the seams of the loop, each named once
    cfg: MopdConfig,
    tasks: TaskStream,
    source: RolloutSource,
    learner: Learner,
    sampler: Sampler,
    refit: Refit,
    record: RunRecord,
    checkpoints: Checkpoints,
    teachers: Mapping[str, str],
    names: Mapping[str, str] | None = None,
) -> None:
    """Run the remaining steps. `teachers` maps each domain to the Hugging Face folder that scores its tokens, `names`
    to the stage that made it, as metrics call it.
    """
    objective = distillation(cfg.distill, domains(teachers), names)
    first = checkpoints.resume(learner)
    record.refitted(refit.refit(learner, sampler, version=first))
    for step in record.remaining(first):
        collected = source.groups(step, partial(tasks.take, step))
        if cfg.mode != "sample_only":
            with record.timer("training"):
                sequences = as_sequences(collected.groups, teachers=teachers)
                if not objective.needs_teacher_vocabulary:
                    sequences = with_teachers(sequences, teachers.values(), learner)
                sequences = with_routing(sequences, learner, cfg.distill.routing_replay)
                metrics = learner.update(sequences, objective)
            with record.timer("refit"):
                refit.refit(learner, sampler, version=step + 1)
        else:
            metrics = {}
        record.rollouts(step, collected.groups)
        record.step(step, metrics, collected)
        checkpoints.after(step + 1, learner)
