"""How many steps and rollouts bring a regressed model back: distillation (MOPD) against GRPO from the same start.

    python -m tools.bench.algorithms [--seeds 11 12 13] [--tune-seed 10] [--json] [--write] [--out FOLDER]

The nano cascade up to multi_domain_rl has lost what its earlier stages had in the DOMAINS below. From there one stage
of MOPD and one of GRPO train on these domains with the same rollouts per step; both are exported and evaluated at the
same steps. A run is back at the first of these steps at which every domain scores at least 90 % of its own teacher
(the checkpoint that MOPD chose on `select` tasks), on `report` tasks.

Tuning is the same for both: every learning rate of RATES on a seed of its own, judged on `select` tasks; the rate
that is back in the fewest steps is used on all measured seeds. Stages run by the ordinary runner; what is done in
`--out` is not run again. `--write` renews docs/algorithms_compared.md and its figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.ledger import FINAL, read_evaluation
from nemo_cascade.cascade.manifest import Manifest, read_manifest
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.cascade.teachers import Choice, read_teachers
from nemo_cascade.config.load import load_cascade
from nemo_cascade.types import Split, UserError
from tools.line_chart import Line, Panel, draw
from tools.precision_table import replace_part
from tools.stage_costs import Cost, cost_of, total

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms_compared.md"
FIGURE = PAGE.with_name("algorithms_compared.svg")
PART = "mopd against grpo"
PREPARED = {"sft": 320, "rlhf_teacher": 8, "if_rl": 120, "multi_domain_rl": 120}  # nano's stages and their steps
START = "multi_domain_rl"
DOMAINS = ("math", "preference")  # what the start has lost against its own ancestors and side branch
RATES = (2.0e-4, 4.0e-4, 8.0e-4)
TARGET = 0.9
LIMITS = {"mopd": 60, "grpo": 180}  # steps after which a run that is not back counts as never back
KINDS = tuple(LIMITS)

CASCADE = """name: algorithms
model: nano
base: hf:nano
hardware: {hardware}
seed: {seed}
output: {output}
stages: [{stages}]
evaluation: {{select: {select}, report: {report}, domains: [instruction_following, mcqa, tool_use, structured_output, \
math, preference], max_new_tokens: 64}}
judge: {{serve: "hf:nano_judge", strategy: all_pairs, length_weight: 0.1, conciseness_bonus: 0.1}}  # nano.yaml's
"""
SHARED = """init: multi_domain_rl
num_steps: {steps}
data: {{domains: {{math: 1, preference: 1}}}}
optimizer: {{lr: {rate}, betas: [0.9, 0.95], warmup_steps: 5, warmup_from: {warmup}}}
keep_steps: [{kept}]
evaluation: {{select: {select}, report: {report}, domains: [math, preference], steps: [{kept}]}}
"""
STAGES = {
    "mopd": """kind: mopd
prompts_per_step: 64
group_size: 1
sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}
teachers: {candidates: [sft, rlhf_teacher, if_rl, multi_domain_rl]}
distill: {kind: sampled, importance_low: 0.5, importance_high: 2.0, clip_advantage: 5.0}  # nano/mopd's
""",
    "grpo": """kind: grpo
prompts_per_step: 8
group_size: 8
sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}
filters: {overlong: filter}
advantage: {baseline: mean, scale: std, eps: 0.3}  # nano/rlhf's; its KL to the start would hold GRPO back
loss: {normalize: batch_tokens, kl: 0.0}
""",
}


@dataclass(frozen=True)
class Sizes:
    """How long the stages are and how many tasks are measured; `scale` shortens everything for a trial."""

    scale: float = 1.0
    select: int = 96
    report: int = 256

    def of(self, full: int, least: int = 2) -> int:
        """A full size, shortened."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint: what it cost so far, each domain's score, and the worst share of a teacher's."""

    cost: Cost
    scores: Mapping[str, float]
    share: float


@dataclass(frozen=True)
class Curve:
    """One algorithm on one seed. `back`: the first point at the target, None when its last step still is not."""

    kind: str
    rate: float
    points: Sequence[Point]

    @property
    def back(self) -> Point | None:
        """Where the run is back."""
        return next((point for point in self.points if point.share >= TARGET), None)

    @property
    def reached(self) -> Cost:
        """The cost of being back, or of the whole run, which then is a lower bound."""
        return (self.back or self.points[-1]).cost


@dataclass(frozen=True)
class Measured:
    """Both algorithms on one seed, with the teachers and what training them took beyond the common start."""

    seed: int
    start: Mapping[str, float]
    teachers: Mapping[str, Choice]
    taught: Mapping[str, float]  # domain -> its teacher's score
    teaching: Cost
    curves: Mapping[str, Curve]

    def ratio(self, what: str) -> float:
        """MOPD's steps or rollouts by GRPO's; an upper bound where only GRPO is never back."""
        return getattr(self.curves["mopd"].reached, what) / getattr(self.curves["grpo"].reached, what)


def checkpoints(limit: int, split: Split) -> list[int]:
    """The evaluated steps before the last: every second to 40 (every fourth in tuning), every fourth to 100, then every
    tenth.
    """
    steps = [*range(2, 41, 2), *range(44, 101, 4), *range(110, limit, 10)]
    return [step for step in steps if step < limit and (split == "report" or step > 100 or step % 4 == 0)]


def stage_name(kind: str, rate: float) -> str:
    """A stage's name has no dot, so the rate is told in millionths."""
    return f"{kind}_{round(rate * 1e6)}"


def train(seed: int, rates: Mapping[str, Sequence[float]], split: Split, given: argparse.Namespace) -> Manifest:
    """Run the cascade to the start and a stage of each algorithm at each of its rates; measured on one split."""
    sizes, out = given.sizes, given.out
    out.mkdir(parents=True, exist_ok=True)
    counts = {"select": 0, "report": 0, split: sizes.of(getattr(sizes, split))}
    files = []
    for kind, values in rates.items():
        limit = sizes.of(LIMITS[kind])
        kept = ", ".join(map(str, checkpoints(limit, split)))
        for rate in values:
            shared = SHARED.format(steps=limit, rate=rate, warmup=rate / 10, kept=kept, **counts)
            files.append(out / f"{split}-{stage_name(kind, rate)}" / f"{stage_name(kind, rate)}.yaml")
            files[-1].parent.mkdir(exist_ok=True)
            files[-1].write_text(STAGES[kind] + shared)
    stages = [*(f"nano/{name}" for name in PREPARED), *(str(file.resolve()) for file in files)]
    path = out / f"seed-{seed}.yaml"
    path.write_text(
        CASCADE.format(
            hardware=given.hardware, seed=seed, output=(out / f"seed-{seed}").resolve(), stages=", ".join(stages),
            select=sizes.of(sizes.select), report=sizes.of(sizes.report),
        )
    )  # fmt: skip
    shorter = [f"stages.{name}.num_steps={sizes.of(steps)}" for name, steps in PREPARED.items() if sizes.scale < 1.0]
    folder = run(load_cascade(str(path), shorter), Options(), lambda line: _say(f"seed {seed}: {line}"))
    return read_manifest(folder)


def scores_of(folder: StageFolder, label: str, split: Split) -> dict[str, float]:
    """Mean score of each regressed domain at one checkpoint."""
    cells, _ = read_evaluation(folder.evaluation(label))
    means = {}
    for (domain, which, _), tasks in cells.items():
        if which == split and domain in DOMAINS:
            means[domain] = statistics.fmean(tasks.values())
    return means


def curve_of(folder: StageFolder, kind: str, rate: float, split: Split, taught: Mapping[str, float]) -> Curve:
    """Every evaluated checkpoint of a stage, in order."""
    result = folder.result()
    assert result is not None, "the runner has brought the stage to its end"
    points = []
    for step in [*checkpoints(result.num_steps, split), result.num_steps]:
        label = FINAL if step == result.num_steps else f"step_{step:06d}"
        scores = scores_of(folder, label, split)
        share = min(scores[domain] / taught[domain] for domain in DOMAINS)
        points.append(Point(cost_of(folder, step), scores, share))
    return Curve(kind, rate, points)


def read(seed: int, manifest: Manifest, rates: Mapping[str, Sequence[float]], split: Split) -> list[Measured]:
    """The curves of a seed, one entry per rate (the i-th of both algorithms together)."""
    folders = manifest.folders
    start = scores_of(folders[START], FINAL, split)
    found = []
    for mopd, grpo in zip(rates["mopd"], rates["grpo"], strict=True):
        teachers = read_teachers(folders[stage_name("mopd", mopd)])
        taught = {name: scores_of(folders[teachers[name].stage], FINAL, split)[name] for name in DOMAINS}
        if not all(taught.values()):
            raise UserError(f"seed {seed}: a teacher scores 0, so there is nothing to come back to; train longer")
        extra = set().union(*(lineage(manifest, choice.stage) for choice in teachers.values()))
        teaching = total(cost_of(folders[name]) for name in sorted(extra - lineage(manifest, START)))
        curves = {
            kind: curve_of(folders[stage_name(kind, rate)], kind, rate, split, taught)
            for kind, rate in (("mopd", mopd), ("grpo", grpo))
        }
        found.append(Measured(seed, start, teachers, taught, teaching, curves))
    return found


def lineage(manifest: Manifest, name: str) -> set[str]:
    """A stage and all it starts from."""
    sources = manifest.sources
    found = set()
    while name:
        found.add(name)
        name = sources[name].stage
    return found


def tune(given: argparse.Namespace) -> tuple[dict[str, float], list[Measured]]:
    """The rate of each algorithm that is back in the fewest steps on the tuning seed, and all that was tried."""
    rates = {kind: tuple(given.rates) for kind in KINDS}
    tried = read(given.tune_seed, train(given.tune_seed, rates, "select", given), rates, "select")
    best = {}
    for kind in KINDS:
        curves = [item.curves[kind] for item in tried]
        ranked = sorted(curves, key=lambda curve: (curve.back is None, curve.reached.steps, -curve.points[-1].share))
        best[kind] = ranked[0].rate
    return best, tried


def summary(seeds: Sequence[Measured], tried: Sequence[Measured]) -> dict[str, Any]:
    """Everything as plain data: the two ratios first, then each seed's numbers and curves."""
    content: dict[str, Any] = {}
    for key, what in (("mopd_steps_vs_grpo", "steps"), ("mopd_samples_vs_grpo", "rollouts")):
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
    head = ["seed", *(f"{name}: start, teacher" for name in DOMAINS)]
    head += [f"{kind} {what}" for kind in KINDS for what in ("steps", "rollouts", "sampled tokens", "tokens")]
    head += ["teachers' tokens", "steps ratio", "rollouts ratio"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for item in seeds:
        cells = [str(item.seed)]
        for name in DOMAINS:
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


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tune-seed", type=int, default=10, help="whose `select` scores choose the learning rates")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates tried for both")
    parser.add_argument("--hardware", default="cpu", help="conf/hardware/NAME.yaml (default cpu)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten stages and evaluations, for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--json", action="store_true", help="print every number as JSON instead of the table")
    parser.add_argument("--figure", type=Path, help="where to draw the curves (SVG)")
    parser.add_argument("--write", action="store_true", help=f"put table and figure into docs/{PAGE.name}")
    given = parser.parse_args(arguments)
    if not 0.0 < given.scale <= 1.0:
        parser.error("--scale must be above 0 and at most 1")
    given.sizes = Sizes(given.scale)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, measure, print, and write where asked."""
    given = parse(arguments)
    best, tried = tune(given)
    rates = {kind: (best[kind],) for kind in KINDS}
    seeds = [item for seed in given.seeds for item in read(seed, train(seed, rates, "report", given), rates, "report")]
    text = table(seeds, tried)
    print(json.dumps(summary(seeds, tried), indent=1) if given.json else text)
    if given.figure is not None:
        given.figure.write_text(figure(seeds), encoding="utf-8")
    if given.write:
        FIGURE.write_text(figure(seeds), encoding="utf-8")
        named = " ".join(map(str, given.seeds))
        command = f"python -m tools.bench.algorithms --seeds {named} --tune-seed {given.tune_seed} --write"
        replace_part(PART, f"Printed by `{command}`:\n\n{text}", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
