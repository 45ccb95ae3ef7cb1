"""Ways to post-train one model, at equal tokens and with equal tuning: which ends where.

    python -m tools.compare_strategies --seeds 11 12 13 14 15 --out runs/strategies --write

Strategies, all from the same SFT stage: the paper's cascade (conf/cascade/nano.yaml); one RL stage on all domains mixed
(nano_mixed.yaml); one RL expert per domain and one distillation (nano_experts_mopd.yaml); the mean of these experts'
weights; SFT on these experts' rollouts. The budget is what the cascade samples and trains after SFT; the others stop
where they have taken as much, but for averaging, which takes nothing after its experts.

Tuning is the same for all: on a seed of its own every learning rate after SFT is multiplied by each of `--factors`, and
a strategy keeps the factor with the best mean score on `select` tasks; the cascade at its own sets the budget. The
table is of `report` tasks; its intervals are 95 % bootstraps that draw seeds as well as tasks. What is done in `--out`
is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import write_json
from nemo_cascade.cascade.runner import StageFailed
from nemo_cascade.evaluation.intervals import difference_over_runs, excludes_zero
from nemo_cascade.types import Interval, UserError
from tools.precision_table import replace_part
from tools.strategy_runs import STRATEGIES, Result, Scores, Seed, Setting

PAGE = Path(__file__).resolve().parents[1] / "docs" / "strategies_compared.md"
PART = "strategies"
REFERENCE = "cascade"
FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Row:
    """One strategy over all seeds."""

    strategy: str
    results: Sequence[Result]

    def mean(self) -> Interval:
        """The mean over domains and seeds."""
        return difference_over_runs([_lists(result.report, result.report) for result in self.results])

    def against(self, reference: Row) -> Interval:
        """The mean difference to another strategy, task by task and seed by seed."""
        runs = []
        for ours, theirs in zip(self.results, reference.results, strict=True):
            shared = {name: [t for t in tasks if t in theirs.report[name]] for name, tasks in ours.report.items()}
            runs.append({
                name: [ours.report[name][task] - theirs.report[name][task] for task in tasks]
                for name, tasks in shared.items()
            })  # fmt: skip
        return difference_over_runs(runs)

    def domain(self, name: str) -> float:
        """A domain's mean score over seeds."""
        return _mean([_mean(list(result.report[name].values())) for result in self.results])

    def average(self, what: str) -> float:
        """A cost's mean over seeds."""
        return _mean([getattr(result.cost, what) for result in self.results])


def _lists(scores: Scores, order: Scores) -> dict[str, list[float]]:
    return {name: [scores[name][task] for task in tasks] for name, tasks in order.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def select_mean(result: Result) -> float:
    """What tuning looks at: the mean over domains of `select` scores."""
    return _mean([_mean(list(tasks.values())) for tasks in result.select.values()])


def tuned(given: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """(factor of each strategy, its select mean at every factor). One factor leaves nothing to tune."""
    if len(given.factors) == 1:
        return dict.fromkeys(given.strategies, given.factors[0]), {}
    tried: dict[str, dict[float, float]] = {name: {} for name in given.strategies}
    for factor in given.factors:
        seed = Seed(setting(given, factor), given.tune_seed)
        for name in given.strategies:
            tried[name][factor] = select_mean(seed.result(name))
    return {name: max(means, key=lambda factor: means[factor]) for name, means in tried.items()}, tried


def setting(given: argparse.Namespace, factor: float, budget_factor: float | None = None) -> Setting:
    """What the runs at one factor share; the budget is the cascade's at the same factor, or at another."""
    budget = factor if budget_factor is None else budget_factor
    tasks = [max(1, round(count * min(1.0, 4 * given.scale))) for count in (96, 256)]
    return Setting(given.out, given.hardware, factor, budget, given.scale, given.sft_scale, tasks[0], tasks[1], _say)


def measure(given: argparse.Namespace, factors: Mapping[str, float]) -> list[Row]:
    """Every strategy on every seed, seed by seed, so that an interrupted comparison has whole seeds."""
    found: dict[str, list[Result]] = {name: [] for name in given.strategies}
    budget = factors.get(REFERENCE)
    for seed in given.seeds:
        for name in given.strategies:
            found[name].append(Seed(setting(given, factors[name], budget), seed).result(name))
            _say(f"seed {seed}: {name} is done, {found[name][-1].cost.tokens:,} tokens after SFT")
    return [Row(name, results) for name, results in found.items()]


def table(rows: Sequence[Row], factors: Mapping[str, float], tried: Mapping[str, Mapping[float, float]]) -> str:
    """The comparison as Markdown."""
    reference = next((row for row in rows if row.strategy == REFERENCE), rows[0])
    domains = list(rows[0].results[0].report)
    head = ["strategy", "mean", f"against {reference.strategy}", *domains, "tokens after SFT", "of the budget",
            "sampled", "rollouts", "steps", "learning rates"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        mean = row.mean()
        cells = [row.strategy, f"{100 * mean.value:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})"]
        cells.append("" if row is reference else _difference(row.against(reference)))
        cells += [f"{100 * row.domain(name):.1f}" for name in domains]
        cells += [f"{row.average('tokens'):,.0f}", f"{row.average('tokens') / reference.average('tokens'):.0%}"]
        cells += [f"{row.average(what):,.0f}" for what in ("sampled", "rollouts", "steps")]
        cells.append(f"x {factors[row.strategy]:g}")
        lines.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(str(result.seed) for result in rows[0].results)
    lines += [
        "",
        f"Seeds {seeds}; `report` scores in %, 95 % intervals over seeds and tasks; costs are means over seeds.",
    ]
    if len(rows[0].results) == 1:
        lines.append("One seed: the intervals draw tasks only and say nothing of other seeds.")
    if tried:
        values = list(next(iter(tried.values())))
        lines += ["", "Tuning: mean `select` score in % at each factor of the learning rates:", ""]
        lines += ["| | " + " | ".join(f"x {value:g}" for value in values) + " |", "|" + "---|" * (len(values) + 1)]
        lines += [
            f"| {name} | " + " | ".join(f"{100 * means[value]:.1f}" for value in values) + " |"
            for name, means in tried.items()
        ]
    return "\n".join(lines)


def _difference(interval: Interval) -> str:
    shows = "" if excludes_zero(interval) else ", does not show"
    return f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f}{shows})"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--tune-seed", type=int, default=10)
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), help="one: no tuning")
    parser.add_argument("--hardware", default="cpu", help="conf/hardware/NAME.yaml (default cpu)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten stages and, below 0.25, evaluations")
    parser.add_argument("--sft-scale", type=float, help="shorten SFT by another factor (default: as --scale)")
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    given = parser.parse_args(arguments)
    given.sft_scale = given.scale if given.sft_scale is None else given.sft_scale
    if not (0.0 < given.scale <= 1.0 and 0.0 < given.sft_scale <= 1.0):
        parser.error("--scale and --sft-scale must be above 0 and at most 1")
    if len(given.factors) > 1 and given.tune_seed in given.seeds:
        parser.error(f"--tune-seed {given.tune_seed} is one of --seeds: what chose the rates is not measured")
    if min(given.factors) <= 0.0:
        parser.error("--factors must be above 0")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, train, print, and write where asked."""
    given = parse(arguments)
    try:
        factors, tried = tuned(given)
        rows = measure(given, factors)
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(rows, factors, tried)
    print(text)
    write_json(given.out / "scores.json", [
        {"strategy": result.strategy, "seed": result.seed, "factor": result.factor, "tokens": result.cost.tokens,
         "report": {name: _mean(list(tasks.values())) for name, tasks in result.report.items()}}
        for row in rows for result in row.results
    ])  # fmt: skip
    if given.write:
        words = ["--seeds", *map(str, given.seeds)]
        if given.scale < 1.0:
            words += [f"--scale {given.scale:g}", f"--sft-scale {given.sft_scale:g}"]
        if tuple(given.factors) != FACTORS:
            words += ["--factors", *(f"{factor:g}" for factor in given.factors)]
        command = f"python -m tools.compare_strategies {' '.join(words)} --write"
        replace_part(PART, f"Printed by `{command}`:\n\n{text}", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
