"""What reaches the loss: penalty, filter, mask, and the reasons for which a group is dropped."""

from __future__ import annotations

import pytest

from nemo_cascade.rollout.filters import check_invalid_share, make_group, valid_rewards, why_dropped
from nemo_cascade.types import Invalid, Message, Outcome, Rollout, Scored, Task, Transcript, UserError

TASK = Task("echo-1", "echo", (Message("user", "say a"),))


def rollout(sample: int, outcome: Outcome, truncated: bool = False) -> Rollout:
    transcript = Transcript((Message("assistant", "a"),), truncated)
    return Rollout(TASK, sample, (1, 2), (0, 1), (0.0, -0.1), (-1, 0), transcript, outcome)


def group_of(
    *outcomes: Outcome, truncated: tuple[int, ...] = (), overlong: str = "neither", below: float | None = None
):
    rollouts = [rollout(index, outcome, index in truncated) for index, outcome in enumerate(outcomes)]
    return make_group(rollouts, overlong, below)


def test_penalty_zeroes_truncated_rollouts_and_keeps_them_in_the_loss() -> None:
    group = group_of(Scored(1.0), Scored(0.7, {"a": 1.0}), Invalid("down"), truncated=(1, 2), overlong="penalty")
    assert valid_rewards(group.rollouts) == [1.0, 0.0]
    assert group.rollouts[1].outcome == Scored(0.0, {"a": 1.0}, group.rollouts[1].outcome.reason)
    assert isinstance(group.rollouts[2].outcome, Invalid)
    assert group.in_loss == (True, True, False)


def test_filter_leaves_the_loss_but_not_the_baseline() -> None:
    group = group_of(Scored(1.0), Scored(0.7), truncated=(1,), overlong="filter")
    assert valid_rewards(group.rollouts) == [1.0, 0.7]
    assert group.in_loss == (True, False)


@pytest.mark.parametrize(("best", "kept"), [(0.5, False), (0.6, True)])
def test_groups_whose_best_is_not_above_the_bound_leave_the_loss(best: float, kept: bool) -> None:
    group = group_of(Scored(0.1), Scored(best), Invalid("x"), below=0.5)
    assert group.in_loss == (kept, kept, False)


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ((Scored(1.0), Scored(1.0), Invalid("x")), "all_correct"),
        ((Scored(0.0), Scored(0.0)), "all_wrong"),
        ((Scored(0.25), Scored(0.25)), "all_equal"),
        ((Scored(1.0), Invalid("x"), Invalid("x")), "invalid"),
        ((Scored(1.0),), "invalid"),  # a group of one: nothing to compare with
        ((Invalid("x"), Invalid("x")), "invalid"),
        ((Scored(1.0), Scored(0.0)), ""),
    ],
)
def test_why_a_group_is_dropped(outcomes: tuple[Outcome, ...], reason: str) -> None:
    assert why_dropped(group_of(*outcomes)) == reason


def test_a_group_outside_the_loss_says_which_filter_took_it_out() -> None:
    assert why_dropped(group_of(Scored(0.1), Scored(0.2), below=0.5), 0.5) == "below_max"
    assert why_dropped(group_of(Scored(0.1), Scored(0.9), truncated=(0, 1), overlong="filter"), 0.5) == "truncated"
    assert why_dropped(group_of(Scored(0.1), truncated=(0,), overlong="filter")) == "truncated"


def test_too_many_invalid_rollouts_stop_the_step() -> None:
    check_invalid_share({"judge down": 2}, 10, 0.2)
    with pytest.raises(UserError, match=r"3 of 10 rollouts are invalid, above 20%; most often: judge down"):
        check_invalid_share({"judge down": 2, "clock": 1}, 10, 0.2)
