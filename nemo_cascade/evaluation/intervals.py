"""How sure a number is: bootstrap intervals over tasks, paired differences, and what distillation recovered.

Every interval is the percentile bootstrap: tasks are drawn again with replacement, RESAMPLES times, from a seeded
stream, so the same scores always give the same interval. Not valid below a handful of tasks; with one task low = value
= high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from nemo_cascade.types import Interval, UserError

LEVEL = 0.95
RESAMPLES = 2000

Scores = Sequence[float]


@lru_cache(maxsize=8)
def _counts_R_N(tasks: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `tasks` tasks is drawn in each resample, float64 [resamples, tasks]; rows sum to `tasks`."""
    drawn = np.random.default_rng([seed, tasks]).integers(0, tasks, size=(resamples, tasks))
    drawn += np.arange(resamples)[:, None] * tasks
    return np.bincount(drawn.ravel(), minlength=resamples * tasks).reshape(resamples, tasks).astype(np.float64)


def bootstrap_mean(values: Scores, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """The mean of per-task scores with its interval; the denominator is the number of tasks given."""
    array = _vector(values, "values")
    means_R = _counts_R_N(len(array), resamples, seed) @ array / len(array)
    low, high = _percentiles(means_R, level)
    return Interval(float(array.mean()), low, high, len(array))


def paired_difference(
    after: Scores, before: Scores, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """mean(after - before) over the same tasks in the same order; pairing takes the tasks' difficulty out of the
    interval.
    """
    left, right = _vector(after, "after"), _vector(before, "before")
    if len(left) != len(right):
        raise UserError(f"paired difference: {len(left)} scores against {len(right)}; both need the same tasks")
    return bootstrap_mean(left - right, seed, resamples, level)


def difference_over_runs(
    runs: Sequence[Mapping[str, Scores]], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean change over training seeds, with an interval that draws seeds as well as tasks.

    `runs` holds one table per seed: domain -> after - before of each task. A run's change is the mean of its domain
    means, the result the mean over runs; `n` counts differences of all runs. Tasks are drawn once per domain, for a
    benchmark's tasks are the same in every run. With one run only tasks are drawn: the interval says nothing of other
    seeds then, and with two or three seeds it says little.
    """
    if not runs or not runs[0]:
        raise UserError("difference over runs: no scores")
    names = list(runs[0])
    if any(list(run) != names for run in runs):
        raise UserError("difference over runs: every run needs the same domains in the same order")
    stream = np.random.default_rng([seed, len(runs), resamples])
    chosen_R_S = stream.integers(0, len(runs), size=(resamples, len(runs)))
    means_S_R = np.zeros((len(runs), resamples))
    for name in names:
        draws: dict[int, np.ndarray] = {}
        for index, run in enumerate(runs):
            changes_N = _vector(run[name], name)
            tasks = len(changes_N)
            if tasks not in draws:
                draws[tasks] = stream.integers(0, tasks, size=(resamples, tasks))
            means_S_R[index] += changes_N[draws[tasks]].mean(axis=1) / len(names)
    low, high = _percentiles(np.take_along_axis(means_S_R.T, chosen_R_S, axis=1).mean(axis=1), level)
    value = float(np.mean([[np.mean(run[name]) for name in names] for run in runs]))
    return Interval(value, low, high, sum(len(run[name]) for run in runs for name in names))


def excludes_zero(interval: Interval) -> bool:
    """Whether 0 lies outside the interval."""
    return interval.low > 0.0 or interval.high < 0.0


@dataclass(frozen=True)
class Triple:
    """One domain's per-task scores by student, teacher and distilled model, over the same tasks in the same order."""

    student: Scores
    teacher: Scores
    mopd: Scores


@dataclass(frozen=True)
class Recovery:
    """The share of the teachers' lead that distillation won back: 1 is all of it, above 1 more than the teacher has.

    `overall` is None when no domain has a lead to win back. `domains` holds the ratio of each counted domain,
    `gaps` the teacher's lead in every domain, counted or not.
    """

    overall: Interval | None
    domains: Mapping[str, float] = field(default_factory=dict)
    gaps: Mapping[str, Interval] = field(default_factory=dict)


def recovery(
    runs: Sequence[Mapping[str, Triple]], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Recovery:
    """sum(mopd - student) / sum(teacher - student) over the domains whose gap's interval lies above 0.

    `runs` holds one table per training seed. The numerator and denominator add domain means (each domain counts once,
    however many tasks it has), averaged over seeds. The interval draws seeds and tasks; student, teacher and mopd share
    the draw of tasks, for they answered the same ones. A teacher behind the student has nothing to recover and is left
    out.
    """
    if not runs:
        raise UserError("recovery: no runs")
    names = [name for name in runs[0] if all(name in run for run in runs)]
    gaps = {name: _pooled_gap([run[name] for run in runs], seed, resamples, level) for name in names}
    counted = [name for name in names if gaps[name].low > 0.0]
    if not counted:
        return Recovery(None, {}, gaps)
    points = np.array([[_means(run[name]) for name in counted] for run in runs]).mean(axis=0)  # [domains, 3]
    gained, lead = points[:, 2] - points[:, 0], points[:, 1] - points[:, 0]
    ratio_R = _resampled_ratio(runs, counted, seed, resamples)
    low, high = _percentiles(ratio_R, level)
    tasks = sum(len(run[name].student) for run in runs for name in counted)
    ratios = {name: float(gained[index] / lead[index]) for index, name in enumerate(counted)}
    return Recovery(Interval(float(gained.sum() / lead.sum()), low, high, tasks), ratios, gaps)


def _resampled_ratio(
    runs: Sequence[Mapping[str, Triple]], counted: Sequence[str], seed: int, resamples: int
) -> np.ndarray:
    """Recovery in each resample, [R]. Seeds are drawn once; tasks once per domain, for a benchmark's tasks are the same
    in every run (runs with another number of tasks get a draw of their own).
    """
    stream = np.random.default_rng([seed, len(runs), resamples])
    chosen_R_S = stream.integers(0, len(runs), size=(resamples, len(runs)))
    times_S_R = np.stack([(chosen_R_S == index).sum(axis=1) for index in range(len(runs))])
    gained_R, lead_R = np.zeros(resamples), np.zeros(resamples)
    for domain in counted:
        draws: dict[int, np.ndarray] = {}
        for times_R, run in zip(times_S_R, runs, strict=True):
            triple = run[domain]
            student, teacher, mopd = (_vector(part, domain) for part in (triple.student, triple.teacher, triple.mopd))
            tasks = len(student)
            if tasks not in draws:
                draws[tasks] = stream.integers(0, tasks, size=(resamples, tasks))
            gained_R += times_R * (mopd - student)[draws[tasks]].mean(axis=1)
            lead_R += times_R * (teacher - student)[draws[tasks]].mean(axis=1)
    return gained_R / np.where(np.abs(lead_R) < 1e-12, np.nan, lead_R)


def _pooled_gap(triples: Sequence[Triple], seed: int, resamples: int, level: float) -> Interval:
    """The teacher's lead over the student, over the tasks of all seeds."""
    for triple in triples:
        if not len(triple.student) == len(triple.teacher) == len(triple.mopd):
            raise UserError("recovery: student, teacher and mopd need the same tasks")
    teacher = np.concatenate([_vector(triple.teacher, "teacher") for triple in triples])
    student = np.concatenate([_vector(triple.student, "student") for triple in triples])
    return paired_difference(teacher.tolist(), student.tolist(), seed, resamples, level)


def _means(triple: Triple) -> tuple[float, float, float]:
    return float(np.mean(triple.student)), float(np.mean(triple.teacher)), float(np.mean(triple.mopd))


def _percentiles(values_R: np.ndarray, level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise UserError(f"level: {level} is outside (0, 1)")
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(values_R, [tail, 100.0 - tail])
    return float(low), float(high)


def _vector(values: Scores, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise UserError(f"{name}: at least one score is needed")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: a score is not a finite number")
    return array
