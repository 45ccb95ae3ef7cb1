"""What a finished rollout on a repository is worth: the rules of NeMo-Gym's `swe_agents`, as one function.

Reward 1 iff the tests say resolved, else 0. Four things take the rollout out of baseline and loss instead (NeMo-Gym's
`mask_sample`, our Invalid), because then neither number says anything about the answer: a resolved rollout that was cut
off (its success is an accident), a grading that ran out of time, an agent that ran out of time, and a container of
either that ran out of memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_cascade.types import Invalid, Outcome, Scored


@dataclass(frozen=True)
class Ending:
    """How a rollout ended. `resolved` is what the tests said, False where they were not asked.

    `cut_off`: the model was stopped by the limit on turns or by the context window, not by itself.
    """

    resolved: bool
    cut_off: bool = False
    agent_timed_out: bool = False
    agent_out_of_memory: bool = False
    grading_timed_out: bool = False
    grading_out_of_memory: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def verdict(ending: Ending) -> Outcome:
    """Reward 1, reward 0 or Invalid.

    | ended by itself | cut off | agent out of time or memory | grading out of time or memory |
    |---|---|---|---|
    | resolved: 1, else 0 | resolved: Invalid, else 0 | Invalid | Invalid |
    """
    for failed, reason in (
        (ending.agent_timed_out, "the rollout ran out of its wall-clock time"),
        (ending.agent_out_of_memory, "the rollout's container ran out of memory"),
        (ending.grading_timed_out, "the tests ran out of their wall-clock time"),
        (ending.grading_out_of_memory, "the tests ran out of memory"),
        (ending.resolved and ending.cut_off, "resolved, but cut off by the limit on turns or context"),
    ):
        if failed:
            return Invalid(reason)
    return Scored(float(ending.resolved), dict(ending.parts), ending.reason)
