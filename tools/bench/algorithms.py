"""How many steps and rollouts bring a regressed model back: distillation (MOPD) against GRPO from the same start.

    python -m tools.bench.algorithms [--regression sft] [--seeds 11 12 13] [--tune-seeds 10 14] [--json] [--write]

Two regressions, `--regression`: `sft` (default) goes on from the nano cascade's multi_domain_rl with SFT on mostly
faulty demonstrations, on purpose, until most of what RL had taught in four domains is gone; `cascade` takes
multi_domain_rl itself, which has lost preference and some math. From there one stage of MOPD and one of GRPO train on
the lost domains with the same number of rollouts per step, and are evaluated at the same steps. A run is back at the
first of them at which every domain scores at least 90 % of its own teacher (the checkpoint that MOPD chose on
`select` tasks), on `report` tasks, and still does at the next.

Each side has variants: what MOPD minimises (`--distill`), GRPO's group size (`--groups`). Tuning is the same for both:
every variant with every `--rates` and `--warmups` on the first seed of `--tune-seeds`, the best `--keep` settings of
each variant on the others, judged on `select` tasks. The best setting of each variant of MOPD is measured against the
best of GRPO's on all measured seeds. The ratios that count are those of the variant of MOPD that tuning put first.
Stages run by the ordinary runner; what is done in `--out` is not run again. `--write` renews
docs/algorithms_compared.md and its figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.runner import StageFailed
from nemo_cascade.types import UserError
from tools.bench.recovery_runs import (
    DISTILL,
    GROUPS,
    REGRESSIONS,
    SIDES,
    TARGET,
    WAYS,
    Curve,
    Measured,
    Ratio,
    Setting,
    Try,
    measure,
    median,
    ratio,
    tune,
)
from tools.line_chart import Line, Panel, draw
from tools.precision_table import replace_part
from tools.stage_costs import Cost

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms_compared.md"
RATES = (2.0e-4, 4.0e-4, 8.0e-4)
WARMUPS = (0,)
RATIOS = (("mopd_steps_vs_grpo", "steps"), ("mopd_samples_vs_grpo", "rollouts"))


@dataclass(frozen=True)
class Comparison:
    """All that was measured. `chosen`: the settings on the measured seeds, those of MOPD in the order of tuning, then
    GRPO's.
    """

    seeds: Sequence[Measured]
    tuned: Sequence[Measured]
    chosen: Sequence[Try]

    @property
    def variants(self) -> list[Try]:
        """MOPD's settings, the one that counts first."""
        return [tried for tried in self.chosen if tried.side == "mopd"]

    def ratios(self, tried: Try, what: str) -> list[Ratio]:
        """One ratio per measured seed."""
        found = []
        for item in self.seeds:
            (mopd,) = (curve for curve in item.curves if curve.tried == tried)
            (grpo,) = item.of("grpo")
            found.append(ratio(mopd, grpo, what))
        return found


def summary(made: Comparison) -> dict[str, Any]:
    """Everything as plain data: the two ratios first, then those of each variant, each seed's numbers and curves."""
    first = made.variants[0]
    content: dict[str, Any] = {key: _ratios(made.ratios(first, what)) for key, what in RATIOS}
    content["variants"] = {
        tried.way: {key: _ratios(made.ratios(tried, what)) for key, what in RATIOS} for tried in made.variants
    }
    content["chosen"] = [_setting(tried) for tried in made.chosen]
    content["never_back"] = [
        f"{curve.tried.way} with seed {item.seed}" for item in made.seeds for curve in item.curves if curve.back is None
    ]
    content["tuned"] = [
        {"seed": item.seed, **_setting(curve.tried), "back_after": _back_after(curve)}
        for item in made.tuned for curve in item.curves
    ]  # fmt: skip
    content["seeds"] = [_as_json(item) for item in made.seeds]
    return content


def _ratios(found: Sequence[Ratio]) -> dict[str, Any]:
    """Numbers where both sides are back; else what bounds them, also for the median."""
    return {"per_seed": [_number(item) for item in found], "median": _number(median(found))}


def _number(item: Ratio) -> float | dict[str, float | None]:
    if item.low == item.high:
        return item.low
    return {"at_least": item.low, "at_most": None if math.isinf(item.high) else item.high}


def _setting(tried: Try) -> dict[str, Any]:
    return {"kind": tried.side, "way": tried.way, "rate": tried.rate, "warmup": tried.warmup}


def _back_after(curve: Curve) -> int | None:
    return curve.back.cost.steps if curve.back else None


def _as_json(item: Measured) -> dict[str, Any]:
    curves = {
        curve.tried.way: {
            **_setting(curve.tried),
            "back_after": _back_after(curve),
            "curve": [
                {"step": point.cost.steps, "rollouts": point.cost.rollouts, "sampled": point.cost.sampled,
                 "tokens": point.cost.tokens, "scores": dict(point.scores), "share": point.share}
                for point in curve.points
            ],
        }
        for curve in item.curves
    }  # fmt: skip
    teachers = {domain: choice.checkpoint for domain, choice in item.teachers.items()}
    return {
        "seed": item.seed, "start": dict(item.start), "teachers": teachers, "taught": dict(item.taught),
        "teaching_tokens": item.teaching.tokens, "curves": curves,
    }  # fmt: skip


def _rows(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---|" * len(cells[0]), *rest]


def table(made: Comparison) -> str:
    """The measurement as Markdown: scores of start and teachers, costs and ratios, medians, tuning."""
    domains = list(made.seeds[0].taught)
    scores = [["seed", *(f"{name}: start, teacher" for name in domains), "teachers' tokens"]]
    for item in made.seeds:
        cells = [
            f"{100 * item.start[name]:.1f}, {100 * item.taught[name]:.1f} ({item.teachers[name].checkpoint})"
            for name in domains
        ]
        scores.append([str(item.seed), *cells, f"{item.teaching.tokens:,}"])
    costs = [["seed", "variant", "steps", "rollouts", "sampled tokens", "tokens", "steps ratio", "rollouts ratio"]]
    for index, item in enumerate(made.seeds):
        for curve in item.curves:
            cost, never = curve.reached, "" if curve.back else "over "
            spent = [f"{never}{number:,}" for number in (cost.steps, cost.rollouts, cost.sampled, cost.tokens)]
            shares = ["", ""]
            if curve.tried.side == "mopd":
                shares = [str(made.ratios(curve.tried, what)[index]) for _, what in RATIOS]
            costs.append([str(item.seed), curve.tried.way, *spent, *shares])
    medians = [["variant", "learning rate", "warm-up", "steps ratio", "rollouts ratio"]]
    for tried in made.chosen:
        shares = [str(median(made.ratios(tried, what))) for _, what in RATIOS] if tried.side == "mopd" else ["", ""]
        medians.append([tried.way, f"{tried.rate:g}", str(tried.warmup), *shares])
    lines = [*_rows(scores), "", *_rows(costs), "", f"Medians over {len(made.seeds)} seed(s):", "", *_rows(medians)]
    if made.tuned:
        said = "Tuning: steps until back on `select` tasks, and the worst share at the end."
        lines += ["", said, "", *_rows(_tuning(made.tuned))]
    return "\n".join(lines)


def _tuning(tuned: Sequence[Measured]) -> list[list[str]]:
    cells = [["variant", "learning rate", "warm-up", *(f"seed {item.seed}" for item in tuned)]]
    for tried in [curve.tried for side in SIDES for curve in tuned[0].of(side)]:
        row = [tried.way, f"{tried.rate:g}", str(tried.warmup)]
        for item in tuned:
            own = [curve for curve in item.curves if curve.tried == tried]
            row.append("".join(_back_and_end(curve) for curve in own))
        cells.append(row)
    return cells


def _back_and_end(curve: Curve) -> str:
    """Steps until back, and what became of it: the worst domain's share at the end of the run."""
    steps = _back_after(curve)
    return f"{steps or f'over {curve.reached.steps}'}, at the end {curve.points[-1].share:.2f}"


def figure(seeds: Sequence[Measured]) -> str:
    """The worst domain's share of its teacher against steps, sampled tokens, and all tokens with the teachers'."""
    panels = []
    for title, label in (("steps", "optimizer steps"), ("sampled tokens", "tokens sampled by the policy"),
                         ("all tokens, the teachers' included", "tokens sampled and trained")):  # fmt: skip
        lines = []
        for item in seeds:
            for curve in item.curves:
                before = item.teaching.tokens if curve.tried.side == "mopd" and title.startswith("all") else 0
                across = [_across(point.cost, title, before) for point in curve.points]
                name = "grpo" if curve.tried.side == "grpo" else curve.tried.way
                lines.append(Line(name, [(x, p.share) for x, p in zip(across, curve.points, strict=True)]))
        panels.append(Panel(title, label, lines, TARGET))
    return draw(panels)


def _across(cost: Cost, title: str, before: int) -> float:
    return {"steps": cost.steps, "sampled tokens": cost.sampled}.get(title, cost.tokens + before)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--regression", choices=list(REGRESSIONS), default="sft", help="what the model has lost, and how"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tune-seeds", type=int, nargs="+", default=[10, 14], help="whose `select` scores choose")
    parser.add_argument("--distill", nargs="+", choices=list(DISTILL), default=["sampled", "full_vocab"], help="MOPD's")
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS, default=[4, 8], help="variants of GRPO")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates tried")
    parser.add_argument("--grpo-rates", type=float, nargs="+", help="as many others for GRPO (default: the same)")
    parser.add_argument("--warmups", type=int, nargs="+", default=list(WARMUPS), help="steps of warm-up tried for both")
    parser.add_argument("--keep", type=int, default=2, help="settings of a variant that the later tuning seeds try")
    parser.add_argument("--hardware", default="cpu", help="conf/hardware/NAME.yaml (default cpu)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten stages and evaluations, for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"), help="runs lie in OUT/REGRESSION")
    parser.add_argument("--json", action="store_true", help="print every number as JSON instead of the table")
    parser.add_argument("--figure", type=Path, help="where to draw the curves (SVG)")
    parser.add_argument("--write", action="store_true", help=f"put table and figure into docs/{PAGE.name}")
    given = parser.parse_args(arguments)
    if not 0.0 < given.scale <= 1.0:
        parser.error("--scale must be above 0 and at most 1")
    for seed in sorted({*given.tune_seeds} & {*given.seeds}):
        parser.error(f"--tune-seeds {seed} is one of --seeds: what chose the settings is not measured")
    if len(given.distill) != len(given.groups):
        parser.error("--distill and --groups must name as many variants, so that both sides try as many settings")
    if given.grpo_rates is not None and len(given.grpo_rates) != len(given.rates):
        parser.error("--rates and --grpo-rates must be as many, so that both sides try as many settings")
    return given


def command_of(given: argparse.Namespace) -> str:
    """The command that prints the page's part, without what has its default."""
    words = ["python -m tools.bench.algorithms", "--regression", given.regression, "--seeds", *map(str, given.seeds)]
    defaults = parse([])
    for name in ("tune_seeds", "distill", "groups", "rates", "grpo_rates", "warmups"):
        if getattr(given, name) != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", *(f"{value:g}" if isinstance(value, float) else str(value)
                                                       for value in getattr(given, name))]  # fmt: skip
    if given.keep != defaults.keep:
        words += ["--keep", str(given.keep)]
    if given.hardware != defaults.hardware:
        words += ["--hardware", given.hardware]
    return " ".join([*words, "--write"])


def compare(given: argparse.Namespace) -> Comparison:
    """Tune, choose, measure."""
    setting = Setting(given.out / given.regression, REGRESSIONS[given.regression], given.hardware, given.scale)
    ways = [*(f"mopd_{name}" for name in given.distill), *(f"grpo_{group}" for group in given.groups)]
    rates = {"mopd": given.rates, "grpo": given.grpo_rates or given.rates}
    grid = [Try(way, rate, warmup) for way in ways for rate in rates[WAYS[way]] for warmup in given.warmups]
    best, tuned = tune(setting, given.tune_seeds, grid, given.keep)
    grpo = next(tried for tried in best if tried.side == "grpo")
    chosen = [*(tried for tried in best if tried.side == "mopd"), grpo]
    return Comparison([measure(setting, seed, chosen) for seed in given.seeds], tuned, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write where asked."""
    given = parse(arguments)
    try:
        made = compare(given)
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(made)
    print(json.dumps(summary(made), indent=1) if given.json else text)
    if given.figure is not None:
        given.figure.write_text(figure(made.seeds), encoding="utf-8")
    if given.write:
        picture = f"algorithms_compared_{given.regression}.svg"
        PAGE.with_name(picture).write_text(figure(made.seeds), encoding="utf-8")
        shown = f"![The worst domain's share of its teacher's score]({picture})"
        replace_part(given.regression, f"Printed by `{command_of(given)}`:\n\n{text}\n\n{shown}", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
