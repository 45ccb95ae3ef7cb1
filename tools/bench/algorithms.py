"""How many steps and rollouts bring a regressed model back: distillation (MOPD) against GRPO from the same start.

    python -m tools.bench.algorithms [--regression sft] [--seeds 11 12 13] [--tune-seed 10] [--json] [--write]

Two regressions, `--regression`: `sft` (default) goes on from the nano cascade's multi_domain_rl with SFT on mostly
faulty demonstrations, on purpose, until most of what RL had taught in four domains is gone; `cascade` takes
multi_domain_rl itself, which has lost preference and some math. From there one stage of MOPD and one of GRPO train on
the lost domains with the same rollouts per step; both are exported and evaluated at the same steps. A run is back at
the first of them at which every domain scores at least 90 % of its own teacher (the checkpoint that MOPD chose on
`select` tasks), on `report` tasks, and still does at the next.

Tuning is the same for both: every learning rate of RATES on a seed of its own, judged on `select` tasks; the rate
that is back in the fewest steps is used on all measured seeds. Stages run by the ordinary runner; what is done in
`--out` is not run again. `--write` renews docs/algorithms_compared.md and its figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.runner import StageFailed
from nemo_cascade.types import UserError
from tools.bench.recovery_runs import KINDS, REGRESSIONS, TARGET, Curve, Measured, Setting, measure, tune
from tools.line_chart import Line, Panel, draw
from tools.precision_table import replace_part
from tools.stage_costs import Cost

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms_compared.md"
RATES = (2.0e-4, 4.0e-4, 8.0e-4)
RATIOS = (("mopd_steps_vs_grpo", "steps"), ("mopd_samples_vs_grpo", "rollouts"))


def summary(seeds: Sequence[Measured], tried: Sequence[Measured]) -> dict[str, Any]:
    """Everything as plain data: the two ratios first, then each seed's numbers and curves."""
    content: dict[str, Any] = {}
    for key, what in RATIOS:
        per_seed = [item.ratio(what) for item in seeds]
        content[key] = {"per_seed": per_seed, "median": statistics.median(per_seed)}
    content["never_back"] = [
        f"{kind} with seed {item.seed}" for item in seeds for kind in KINDS if item.curves[kind].back is None
    ]
    content["tuned"] = [
        {"kind": kind, "rate": item.curves[kind].rate, "back_after": _back_after(item.curves[kind])}
        for kind in KINDS for item in tried
    ]  # fmt: skip
    content["seeds"] = [_as_json(item) for item in seeds]
    return content


def _back_after(curve: Curve) -> int | None:
    return curve.back.cost.steps if curve.back else None


def _as_json(item: Measured) -> dict[str, Any]:
    curves = {
        kind: {
            "rate": curve.rate,
            "back_after": _back_after(curve),
            "curve": [
                {"step": point.cost.steps, "rollouts": point.cost.rollouts, "sampled": point.cost.sampled,
                 "tokens": point.cost.tokens, "scores": dict(point.scores), "share": point.share}
                for point in curve.points
            ],
        }
        for kind, curve in item.curves.items()
    }  # fmt: skip
    teachers = {domain: choice.checkpoint for domain, choice in item.teachers.items()}
    return {
        "seed": item.seed, "start": dict(item.start), "teachers": teachers, "taught": dict(item.taught),
        "teaching_tokens": item.teaching.tokens, **curves,
    }  # fmt: skip


def table(seeds: Sequence[Measured], tried: Sequence[Measured]) -> str:
    """The measurement as Markdown."""
    domains = list(seeds[0].taught)
    head = ["seed", *(f"{name}: start, teacher" for name in domains)]
    head += [f"{kind} {what}" for kind in KINDS for what in ("steps", "rollouts", "sampled tokens", "tokens")]
    head += ["teachers' tokens", "steps ratio", "rollouts ratio"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for item in seeds:
        cells = [str(item.seed)]
        for name in domains:
            taught = f"{100 * item.taught[name]:.1f} ({item.teachers[name].checkpoint})"
            cells.append(f"{100 * item.start[name]:.1f}, {taught}")
        for kind in KINDS:
            curve = item.curves[kind]
            never, cost = "" if curve.back else "over ", curve.reached
            cells += [f"{never}{number:,}" for number in (cost.steps, cost.rollouts, cost.sampled, cost.tokens)]
        cells.append(f"{item.teaching.tokens:,}")
        bound = {(True, False): "under ", (False, True): "over "}.get(
            (bool(item.curves["mopd"].back), bool(item.curves["grpo"].back)), ""
        )
        cells += [f"{bound}{item.ratio(what):.2f}" for what in ("steps", "rollouts")]
        rows.append("| " + " | ".join(cells) + " |")
    medians = [f"{statistics.median(item.ratio(what) for item in seeds):.2f}" for what in ("steps", "rollouts")]
    rows.append("")
    rows.append(f"Medians over {len(seeds)} seed(s): steps {medians[0]}, rollouts {medians[1]}.")
    if tried:
        rows += ["", f"Tuning, seed {tried[0].seed}, steps until back on `select` tasks at each learning rate:", ""]
        rows += ["| | " + " | ".join(f"{item.curves['mopd'].rate:g}" for item in tried) + " |"]
        rows += ["|" + "---|" * (len(tried) + 1)]
        for kind in KINDS:
            steps = [str(_back_after(item.curves[kind]) or "never") for item in tried]
            rows.append(f"| {kind} | " + " | ".join(steps) + " |")
    return "\n".join(rows)


def figure(seeds: Sequence[Measured]) -> str:
    """The worst domain's share of its teacher against steps, sampled tokens, and all tokens with the teachers'."""
    panels = []
    for title, label in (("steps", "optimizer steps"), ("sampled tokens", "tokens sampled by the policy"),
                         ("all tokens, the teachers' included", "tokens sampled and trained")):  # fmt: skip
        lines = []
        for item in seeds:
            for kind, curve in item.curves.items():
                before = item.teaching.tokens if kind == "mopd" and title.startswith("all") else 0
                across = [_across(point.cost, title, before) for point in curve.points]
                lines.append(Line(kind, [(x, p.share) for x, p in zip(across, curve.points, strict=True)]))
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
    parser.add_argument("--tune-seed", type=int, default=10, help="whose `select` scores choose the learning rates")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates tried for both")
    parser.add_argument("--hardware", default="cpu", help="conf/hardware/NAME.yaml (default cpu)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten stages and evaluations, for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"), help="runs lie in OUT/REGRESSION")
    parser.add_argument("--json", action="store_true", help="print every number as JSON instead of the table")
    parser.add_argument("--figure", type=Path, help="where to draw the curves (SVG)")
    parser.add_argument("--write", action="store_true", help=f"put table and figure into docs/{PAGE.name}")
    given = parser.parse_args(arguments)
    if not 0.0 < given.scale <= 1.0:
        parser.error("--scale must be above 0 and at most 1")
    if given.tune_seed in given.seeds:
        parser.error(f"--tune-seed {given.tune_seed} is one of --seeds: what chose the rates is not measured")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, measure, print, and write where asked."""
    given = parse(arguments)
    setting = Setting(given.out / given.regression, REGRESSIONS[given.regression], given.hardware, given.scale)
    try:
        best, tried = tune(setting, given.tune_seed, given.rates)
        seeds = [measure(setting, seed, best) for seed in given.seeds]
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(seeds, tried)
    print(json.dumps(summary(seeds, tried), indent=1) if given.json else text)
    if given.figure is not None:
        given.figure.write_text(figure(seeds), encoding="utf-8")
    if given.write:
        picture = f"algorithms_compared_{given.regression}.svg"
        PAGE.with_name(picture).write_text(figure(seeds), encoding="utf-8")
        named = " ".join(map(str, given.seeds))
        where = f" --hardware {given.hardware}" if given.hardware != "cpu" else ""
        command = f"python -m tools.bench.algorithms --regression {given.regression} --seeds {named}{where} --write"
        shown = f"![The worst domain's share of its teacher's score]({picture})"
        replace_part(given.regression, f"Printed by `{command}`:\n\n{text}\n\n{shown}", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
