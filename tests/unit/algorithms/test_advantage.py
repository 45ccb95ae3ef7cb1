import math

import pytest

from nemo_cascade.algorithms.advantage import group_relative, relative
from nemo_cascade.config.schema import AdvantageConfig
from nemo_cascade.types import Group, Invalid, Outcome, Rollout, Scored, Task, Transcript

TASK = Task(id="math-1", domain="math", messages=())


def group(*outcomes: Outcome, in_loss: tuple[bool, ...] = ()) -> Group:
    rollouts = tuple(
        Rollout(TASK, index, (1, 2), (0, 1), (0.0, -0.5), (-1, 0), Transcript(()), outcome)
        for index, outcome in enumerate(outcomes)
    )
    return Group(TASK, rollouts, in_loss or (True,) * len(rollouts))


def test_equation_1_with_numbers_by_hand():
    # mean 0.25, population std sqrt(3)/4
    values = relative([1.0, 0.0, 0.0, 0.0], AdvantageConfig(eps=0.0))
    assert values == pytest.approx([math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)])


def test_sample_std_divides_by_n_minus_1():
    values = relative([1.0, 0.0, 0.0, 0.0], AdvantageConfig(scale="sample_std", eps=0.0))
    assert values == pytest.approx([1.5, -0.5, -0.5, -0.5])  # sample std is 1/2


def test_leave_one_out_is_the_mean_of_the_others():
    values = relative([3.0, 1.0, 2.0], AdvantageConfig(baseline="leave_one_out", scale="none"))
    assert values == pytest.approx([1.5, -1.5, 0.0])


def test_eps_is_added_to_the_std():
    assert relative([1.0, 0.0], AdvantageConfig(eps=0.5)) == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize("scale", ["std", "sample_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_all_equal_rewards_teach_exactly_nothing(scale: str, baseline: str):
    # 0.1 * 3 is not 0.3 in floating point: a computed std would be tiny, not zero
    assert relative([0.1, 0.1, 0.1], AdvantageConfig(baseline=baseline, scale=scale, eps=0.0)) == [0.0, 0.0, 0.0]


def test_invalid_leaves_mean_and_std_and_gets_nothing():
    cfg = AdvantageConfig(eps=0.0)
    advantages = group_relative(
        [group(Scored(1.0), Invalid("judge down"), Scored(0.0)), group(Invalid("x"), Scored(1.0))], cfg
    )
    assert advantages == [[1.0, None, -1.0], [None, 0.0]]


def test_rollouts_outside_the_loss_stay_in_the_baseline():
    cfg = AdvantageConfig(scale="none")
    filtered = group(Scored(1.0), Scored(0.0), in_loss=(True, False))
    assert group_relative([filtered], cfg) == [[0.5, -0.5]]
