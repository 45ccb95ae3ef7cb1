"""Intervals against closed forms and brute force, and recovery by hand."""

import numpy as np
import pytest

from nemo_cascade.evaluation.intervals import (
    Triple,
    bootstrap_mean,
    difference_over_runs,
    excludes_zero,
    paired_difference,
    recovery,
)
from nemo_cascade.types import UserError


def test_a_share_has_the_binomial_interval():
    scores = [1.0] * 75 + [0.0] * 25
    interval = bootstrap_mean(scores)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 100)
    assert (interval.value, interval.n) == (0.75, 100)
    assert interval.low == pytest.approx(0.75 - half, abs=0.015)
    assert interval.high == pytest.approx(0.75 + half, abs=0.015)


def test_the_interval_covers_the_truth_95_times_in_100():
    stream = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        interval = bootstrap_mean((stream.random(80) < 0.4).astype(float).tolist(), resamples=500)
        covered += interval.low <= 0.4 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_it_is_the_percentile_bootstrap():
    values = np.array([0.0, 0.2, 0.9, 1.0, 0.4])
    drawn = np.random.default_rng([3, 5]).integers(0, 5, size=(200, 5))
    low, high = np.percentile(values[drawn].mean(axis=1), [5, 95])
    interval = bootstrap_mean(values.tolist(), seed=3, resamples=200, level=0.9)
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_equal_scores_have_no_width_and_seeds_repeat():
    assert bootstrap_mean([0.5, 0.5, 0.5]) == bootstrap_mean([0.5, 0.5, 0.5])
    interval = bootstrap_mean([1.0])
    assert (interval.low, interval.value, interval.high, interval.n) == (1.0, 1.0, 1.0, 1)


def test_pairing_takes_the_tasks_difficulty_out():
    difficulty = np.linspace(0, 1, 100)
    before, after = difficulty, difficulty + 0.05
    gain = paired_difference(after.tolist(), before.tolist())
    assert gain.value == pytest.approx(0.05)
    assert gain.high - gain.low < 1e-9
    assert excludes_zero(gain)
    apart = bootstrap_mean(after.tolist())
    assert apart.high - apart.low > 0.1


def test_a_difference_by_chance_includes_zero():
    after = [1.0, 0.0] * 50
    before = [0.0, 1.0] * 50
    gain = paired_difference(after, before)
    assert gain.value == 0.0
    assert gain.low < 0 < gain.high
    assert not excludes_zero(gain)


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0, 2.0]]])
def test_what_is_no_list_of_scores_is_refused(values):
    with pytest.raises(UserError):
        bootstrap_mean(values)


def test_unequal_pairs_are_refused():
    with pytest.raises(UserError, match="2 scores against 1"):
        paired_difference([1.0, 0.0], [1.0])


def scores(share: float, count: int) -> list[float]:
    """The first `share` of the tasks solved."""
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))


def test_recovery_by_hand():
    run = {
        "math": Triple(scores(0.4, 100), scores(0.8, 100), scores(0.7, 100)),  # gained 0.3 of 0.4
        "code": Triple(scores(0.2, 50), scores(0.4, 50), scores(0.4, 50)),  # gained 0.2 of 0.2
        "mcqa": Triple(scores(0.50, 100), scores(0.51, 100), scores(0.9, 100)),  # a lead of one task is chance
        "tools": Triple(scores(0.9, 100), scores(0.5, 100), scores(0.9, 100)),  # the teacher is behind
    }
    found = recovery([run])
    assert dict(found.domains) == pytest.approx({"math": 0.75, "code": 1.0})
    assert found.overall is not None
    assert found.overall.value == pytest.approx((0.3 + 0.2) / (0.4 + 0.2))
    assert found.overall.low < found.overall.value < found.overall.high
    assert found.gaps["mcqa"].low == 0.0
    assert found.gaps["tools"].value == pytest.approx(-0.4)


def test_each_domain_counts_once_however_many_tasks_it_has():
    few = Triple(scores(0.0, 20), scores(0.5, 20), scores(0.5, 20))
    many = Triple(scores(0.0, 400), scores(0.5, 400), scores(0.0, 400))
    found = recovery([{"few": few, "many": many}])
    assert found.overall is not None
    assert found.overall.value == pytest.approx(0.5)


def test_a_full_recovery_has_no_width():
    triple = Triple(scores(0.2, 60), scores(0.6, 60), scores(0.6, 60))
    overall = recovery([{"math": triple}]).overall
    assert overall is not None
    assert (overall.low, overall.value, overall.high) == pytest.approx((1.0, 1.0, 1.0))


def test_seeds_are_averaged_and_widen_the_interval():
    student, teacher = scores(0.2, 200), scores(0.6, 200)
    good, bad = Triple(student, teacher, scores(0.6, 200)), Triple(student, teacher, scores(0.2, 200))
    mixed = recovery([{"math": good}, {"math": bad}]).overall
    assert mixed is not None
    assert mixed.value == pytest.approx(0.5)
    assert (mixed.low, mixed.high) == pytest.approx((0.0, 1.0))  # both seeds drawn alike happens in half of the draws
    same = recovery([{"math": good}, {"math": good}]).overall
    assert same is not None
    assert (same.low, same.high) == pytest.approx((1.0, 1.0))


def test_nothing_to_recover():
    equal = Triple(scores(0.5, 40), scores(0.5, 40), scores(0.7, 40))
    found = recovery([{"math": equal}])
    assert found.overall is None
    assert found.domains == {}
    with pytest.raises(UserError, match="no runs"):
        recovery([])
    with pytest.raises(UserError, match="the same tasks"):
        recovery([{"math": Triple([1.0], [1.0, 0.0], [1.0])}])


def test_one_run_has_the_interval_of_its_tasks():
    changes = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10
    alone, tasks = difference_over_runs([{"math": changes}]), bootstrap_mean(changes)
    assert (alone.value, alone.n) == (pytest.approx(0.2), 100)
    assert (alone.low, alone.high) == pytest.approx((tasks.low, tasks.high), abs=0.02)


def test_seeds_that_differ_widen_the_interval_of_the_mean():
    same, other = [0.4] * 50, [0.0] * 50
    mixed = difference_over_runs([{"math": same}, {"math": other}])
    assert (mixed.low, mixed.value, mixed.high) == pytest.approx((0.0, 0.2, 0.4))
    equal = difference_over_runs([{"math": same}, {"math": same}])
    assert (equal.low, equal.value, equal.high) == pytest.approx((0.4, 0.4, 0.4))


def test_every_domain_and_every_run_counts_once():
    few, many = [1.0] * 10, [0.0] * 200
    found = difference_over_runs([{"a": few, "b": many}, {"a": few, "b": many[:50]}])
    assert (found.value, found.n) == (pytest.approx(0.5), 270)
    with pytest.raises(UserError, match="the same domains"):
        difference_over_runs([{"a": few}, {"b": few}])
    with pytest.raises(UserError, match="no scores"):
        difference_over_runs([])
