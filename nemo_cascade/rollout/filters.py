"""Which groups and rollouts reach the loss: pure functions of rewards, used by `collect.py`.

Invalid rollouts (the infrastructure failed) never count as reward 0: they are left out of every comparison here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nemo_cascade.types import Group, Invalid, Outcome, Rollout, Scored, UserError


def valid_rewards(rollouts_G: Sequence[Rollout]) -> list[float]:
    """The rewards of the rollouts that have one."""
    return [rollout.outcome.reward for rollout in rollouts_G if isinstance(rollout.outcome, Scored)]


def overlong_penalty(outcome: Outcome, truncated: bool) -> Outcome:
    """IF-RL's penalty: a truncated rollout keeps its place and gets reward 0. An Invalid one stays Invalid."""
    if not truncated or isinstance(outcome, Invalid) or outcome.reason == "overlong":
        return outcome
    return dataclasses.replace(outcome, reward=0.0, reason="overlong")


def make_group(rollouts_G: Sequence[Rollout], overlong: str, mask_below: float | None) -> Group:
    """Apply `filters.overlong` and `filters.mask_groups_below_max` to the scored rollouts of one task.

    penalty: truncated rollouts get reward 0. filter: they leave the loss and stay in the baseline. A group whose best
    reward is not above `mask_below` leaves the loss as a whole (SWE agentless: no rollout above 0.5).
    """
    rollouts = tuple(rollouts_G)
    if overlong == "penalty":
        rollouts = tuple(
            item.with_outcome(overlong_penalty(item.outcome, item.transcript.truncated)) for item in rollouts
        )
    in_loss = tuple(
        isinstance(item.outcome, Scored) and not (overlong == "filter" and item.transcript.truncated)
        for item in rollouts
    )
    if mask_below is not None and max(valid_rewards(rollouts), default=mask_below) <= mask_below:
        in_loss = (False,) * len(rollouts)
    return Group(rollouts[0].task, rollouts, in_loss)


def why_dropped(group: Group, mask_below: float | None = None) -> str:
    """Why this group teaches nothing, or "" when it does: what dynamic filtering drops, and what metrics count.

    `invalid`: fewer than two rewards, nothing to compare with. `all_correct`: every reward is 1. `all_wrong`: every
    reward is 0. `all_equal`: they are equal otherwise. `below_max`: the best is not above `mask_below`
    (`filters.mask_groups_below_max`). `truncated`: overlong filtering left none of them in the loss.
    """
    rewards = valid_rewards(group.rollouts)
    if len(rewards) > 1 and min(rewards) == max(rewards):
        return {1.0: "all_correct", 0.0: "all_wrong"}.get(rewards[0], "all_equal")
    if rewards and not any(group.in_loss):
        return "below_max" if mask_below is not None and max(rewards) <= mask_below else "truncated"
    return "" if len(rewards) > 1 else "invalid"


def check_invalid_share(invalid_reasons: Mapping[str, int], total: int, limit: float) -> None:
    """Stop the step when too many rollouts have no verdict: training on the rest would be training on the failure's
    selection.
    """
    invalid = sum(invalid_reasons.values())
    if total and invalid / total > limit:
        common = max(invalid_reasons, key=lambda reason: invalid_reasons[reason])
        raise UserError(
            f"filters.max_invalid_share: {invalid} of {total} rollouts are invalid, above {limit:.0%}; most often: "
            f"{common}; repair what scores them (judge, sandbox, network) or raise the limit"
        )
