"""The runs behind `tools.bench.algorithms`: a nano model that has lost something, and two ways back to its teachers."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.ledger import FINAL, read_evaluation
from nemo_cascade.cascade.manifest import Manifest, read_manifest
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.cascade.teachers import Choice, read_teachers
from nemo_cascade.config.load import load_cascade
from nemo_cascade.types import Split, UserError
from tools.stage_costs import Cost, cost_of, total

PREPARED = {"sft": 320, "rlhf_teacher": 8, "if_rl": 120, "multi_domain_rl": 120}  # nano's stages and their steps
TARGET = 0.9
SIDES = ("mopd", "grpo")


@dataclass(frozen=True)
class Regression:
    """How the model lost what its teachers have: the stage both start from, and the domains that they train.

    `stage` is the YAML of the stage that does the damage, None where the cascade itself does it. `limits`: steps of
    each side after which a run that is not back counts as never back, `tuning`: the same in tuning, where who needs
    more does not win.
    """

    start: str
    domains: tuple[str, ...]
    limits: Mapping[str, int]
    tuning: Mapping[str, int]
    eps: float  # of GRPO's advantage: large where a judge's graded rewards of converged groups would be blown up
    stage: str | None = None


REGRESSIONS = {
    "cascade": Regression(
        "multi_domain_rl", ("math", "preference"), {"mopd": 16, "grpo": 40}, {"mopd": 14, "grpo": 30}, 0.3
    ),
    "sft": Regression(
        "forgotten", ("instruction_following", "mcqa", "tool_use", "structured_output"),
        {"mopd": 60, "grpo": 180}, {"mopd": 36, "grpo": 108}, 1.0e-6,
        """kind: sft
init: multi_domain_rl
num_steps: {steps}
tokens_per_step: 6144
max_sequence_tokens: 320
data:
  domains: {{instruction_following: 1.5, mcqa: 1, tool_use: 1, structured_output: 1, math: 1, preference: 1}}
  flaw_rate: 0.9
  thinking_share: 0.6
optimizer: {{lr: 3.0e-4, betas: [0.9, 0.98], weight_decay: 0.1, warmup_steps: 10}}
save_every: 50
""",
    ),
}  # fmt: skip
DAMAGE = 50  # steps of such a stage

CASCADE = """name: algorithms
model: nano
base: hf:nano
hardware: {hardware}
seed: {seed}
output: {output}
stages: [{stages}]
evaluation: {{select: {select}, report: {report}, domains: [{domains}], max_new_tokens: 64}}
judge: {{serve: "hf:nano_judge", strategy: all_pairs, length_weight: 0.1, conciseness_bonus: 0.1}}  # nano.yaml's
"""
SHARED = """init: {start}
num_steps: {steps}
data: {{domains: {{{domains}}}}}
sampling: {{max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}}
optimizer: {{lr: {rate}, betas: [0.9, 0.95], warmup_steps: {warmup}, warmup_from: {from_rate}}}
keep_steps: [{kept}]
evaluation: {{select: {select}, report: {report}, domains: [{measured}], steps: [{kept}]}}
"""
MOPD = """kind: mopd
prompts_per_step: 64
group_size: 1
teachers: {{candidates: [sft, rlhf_teacher, if_rl, multi_domain_rl]}}
distill: {{{distill}, importance_low: 0.5, importance_high: 2.0}}  # nano/mopd's bounds
"""
GRPO = """kind: grpo
prompts_per_step: {prompts}
group_size: {group}
filters: {{overlong: filter}}
advantage: {{baseline: mean, scale: std, eps: {eps}}}
loss: {{normalize: batch_tokens, kl: 0.0}}
"""
DISTILL = {
    "sampled": "kind: sampled, clip_advantage: 5.0",  # nano/mopd's
    "full_vocab": "kind: full_vocab",
    "power": "kind: sampled, advantage: power, power_alpha: 1.0",
}
ROLLOUTS = 64  # of a step, on both sides
GROUPS = (2, 4, 8, 16)  # GRPO's group sizes to choose from
WAYS = {f"mopd_{name}": "mopd" for name in DISTILL} | {f"grpo_{group}": "grpo" for group in GROUPS}
"""Every variant and the side it is on; `grpo_8` has groups of 8."""


@dataclass(frozen=True)
class Try:
    """One setting: a variant, its learning rate, and the steps of warm-up to it from a tenth."""

    way: str
    rate: float
    warmup: int

    @property
    def side(self) -> str:
        """mopd or grpo."""
        return WAYS[self.way]

    @property
    def stage(self) -> str:
        """The stage's name. It has no dot, so the rate is told in millionths."""
        return f"{self.way}_{round(self.rate * 1e6)}_{self.warmup}"

    def text(self, eps: float) -> str:
        """What the stage file says of the algorithm."""
        kind, _, which = self.way.partition("_")
        if kind == "mopd":
            return MOPD.format(distill=DISTILL[which])
        return GRPO.format(prompts=ROLLOUTS // int(which), group=which, eps=eps)


@dataclass(frozen=True)
class Setting:
    """What all runs of one measurement share. `scale` shortens stages and evaluations, for a trial."""

    out: Path
    regression: Regression
    hardware: str = "cpu"
    scale: float = 1.0
    select: int = 96
    report: int = 256

    def steps(self, full: int) -> int:
        """A number of steps, shortened."""
        return max(2, round(full * self.scale))

    def tasks(self, full: int) -> int:
        """A number of tasks, shortened less: a mean needs some."""
        return max(8, round(full * min(1.0, 4 * self.scale)))


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint: what it cost so far, each domain's score, and the worst share of a teacher's."""

    cost: Cost
    scores: Mapping[str, float]
    share: float


@dataclass(frozen=True)
class Curve:
    """One setting on one seed."""

    tried: Try
    points: Sequence[Point]

    @property
    def back(self) -> Point | None:
        """The first point at the target that the next one confirms (the last needs none); None: never back."""
        for index, point in enumerate(self.points):
            if all(later.share >= TARGET for later in self.points[index : index + 2]):
                return point
        return None

    @property
    def reached(self) -> Cost:
        """The cost of being back, or of the whole run, which then is a lower bound."""
        return (self.back or self.points[-1]).cost


@dataclass(frozen=True)
class Ratio:
    """MOPD's cost by GRPO's: between `low` and `high`, which are equal when both are back."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.2f}"
        if math.isinf(self.high):
            return f"over {self.low:.2f}" if self.low else "unknown"
        return f"{self.low:.2f} to {self.high:.2f}" if self.low else f"under {self.high:.2f}"


def ratio(mopd: Curve, grpo: Curve, what: str) -> Ratio:
    """Steps or rollouts of both. A side that is never back costs at least its whole run, which makes a bound."""
    share = getattr(mopd.reached, what) / getattr(grpo.reached, what)
    return Ratio(share if grpo.back else 0.0, share if mopd.back else math.inf)


def median(ratios: Sequence[Ratio]) -> Ratio:
    """The median of all values that the bounds allow."""
    return Ratio(statistics.median(item.low for item in ratios), statistics.median(item.high for item in ratios))


@dataclass(frozen=True)
class Measured:
    """Several settings on one seed, with the teachers and what training them took beyond the common start."""

    seed: int
    start: Mapping[str, float]
    teachers: Mapping[str, Choice]
    taught: Mapping[str, float]  # domain -> its teacher's score
    teaching: Cost
    curves: Sequence[Curve]

    def of(self, side: str) -> list[Curve]:
        """The curves of one side."""
        return [curve for curve in self.curves if curve.tried.side == side]


def checkpoints(limit: int) -> list[int]:
    """The evaluated steps before the last: every one to 12, every second to 40, every fourth to 100, then every
    tenth.
    """
    steps = [*range(1, 13), *range(14, 41, 2), *range(44, 101, 4), *range(110, limit, 10)]
    return [step for step in steps if step < limit]


def limit(setting: Setting, side: str, split: Split) -> int:
    """The steps of a run, fewer in tuning."""
    lost = setting.regression
    return setting.steps((lost.limits if split == "report" else lost.tuning)[side])


def write_stage(setting: Setting, tried: Try, split: Split) -> Path:
    """The stage file of one setting, measured on one split."""
    lost, steps = setting.regression, limit(setting, tried.side, split)
    counts = {"select": 0, "report": 0, split: setting.tasks(getattr(setting, split))}
    text = tried.text(lost.eps) + SHARED.format(
        start=lost.start, steps=steps, domains=", ".join(f"{name}: 1" for name in lost.domains), rate=tried.rate,
        warmup=tried.warmup, from_rate=tried.rate / 10, kept=", ".join(map(str, checkpoints(steps))),
        measured=", ".join(lost.domains), **counts,
    )  # fmt: skip
    path = setting.out / f"{split}-{tried.stage}" / f"{tried.stage}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def train(setting: Setting, seed: int, tries: Sequence[Try], split: Split) -> Manifest:
    """Run the cascade to the start and a stage of each setting, those not done yet. In tuning nothing is measured on
    `report` tasks, and never a domain that was not lost, so gates on others are off.
    """
    lost, files = setting.regression, [write_stage(setting, tried, split) for tried in tries]
    if lost.stage is not None:
        damage = setting.out / f"{lost.start}.yaml"
        damage.write_text(lost.stage.format(steps=setting.steps(DAMAGE)))
        files.insert(0, damage)
    stages = [*(f"nano/{name}" for name in PREPARED), *(str(file.resolve()) for file in files)]
    path = setting.out / f"seed-{seed}.yaml"
    path.write_text(
        CASCADE.format(
            hardware=setting.hardware, seed=seed, output=(setting.out / f"seed-{seed}").resolve(),
            stages=", ".join(stages), domains=", ".join(lost.domains), select=setting.tasks(setting.select),
            report=setting.tasks(setting.report) if split == "report" else 0,
        )
    )  # fmt: skip
    shorter = [f"stages.{name}.num_steps={setting.steps(steps)}" for name, steps in PREPARED.items()]
    loaded = load_cascade(str(path), ["stages.*.gates=[]", *(shorter if setting.scale < 1.0 else [])])
    return read_manifest(run(loaded, Options(), lambda line: say(f"seed {seed}: {line}")))


def say(line: str) -> None:
    """Progress, beside what is printed."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def scores_of(folder: StageFolder, label: str, split: Split) -> dict[str, float]:
    """Mean score of each domain at one checkpoint; each is measured in its own mode only."""
    cells, _ = read_evaluation(folder.evaluation(label))
    return {domain: statistics.fmean(tasks.values()) for (domain, which, _), tasks in cells.items() if which == split}


def curve_of(folder: StageFolder, tried: Try, split: Split, taught: Mapping[str, float]) -> Curve:
    """Every evaluated checkpoint of a stage, in order."""
    result = folder.result()
    assert result is not None, "the runner has brought the stage to its end"
    points = []
    for step in [*checkpoints(result.num_steps), result.num_steps]:
        label = FINAL if step == result.num_steps else f"step_{step:06d}"
        scores = scores_of(folder, label, split)
        share = min(scores[domain] / taught[domain] for domain in taught)
        points.append(Point(cost_of(folder, step), scores, share))
    return Curve(tried, points)


def read(setting: Setting, seed: int, manifest: Manifest, tries: Sequence[Try], split: Split) -> Measured:
    """The curves of a seed. All stages of MOPD have the same candidates, so the same teachers."""
    folders, lost = manifest.folders, setting.regression
    start = scores_of(folders[lost.start], FINAL, split)
    teachers = read_teachers(folders[next(tried.stage for tried in tries if tried.side == "mopd")])
    taught = {name: scores_of(folders[teachers[name].stage], FINAL, split)[name] for name in lost.domains}
    if not all(taught.values()):
        raise UserError(f"seed {seed}: a teacher scores 0, so there is nothing to come back to; train longer")
    used = {name for choice in teachers.values() for name in lineage(manifest, choice.stage)}
    teaching = total(cost_of(folders[name]) for name in sorted(used - lineage(manifest, lost.start)))
    curves = [curve_of(folders[tried.stage], tried, split, taught) for tried in tries]
    return Measured(seed, {name: start[name] for name in lost.domains}, teachers, taught, teaching, curves)


def lineage(manifest: Manifest, name: str) -> set[str]:
    """A stage and all it starts from."""
    sources, found = manifest.sources, set[str]()
    while name:
        found.add(name)
        name = sources[name].stage
    return found


def ranked(curves: Sequence[Curve]) -> list[Try]:
    """Settings from best to worst: back, and so at the end of the run, on the most seeds; then in the fewest steps on
    average (a run that is never back counts with all its steps); then with the highest share at the end. Only settings
    that all seeds have tried.

    The first condition is against rates at the edge of what is stable: fast on one seed, gone on the next.
    """
    found: dict[Try, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.tried, []).append(curve)
    most = max(map(len, found.values()))

    def key(tried: Try) -> tuple[int, float, float]:
        own = found[tried]
        lost = sum(curve.back is None or curve.points[-1].share < TARGET for curve in own)
        ends = statistics.fmean(curve.points[-1].share for curve in own)
        return lost, statistics.fmean(curve.reached.steps for curve in own), -ends

    return sorted((tried for tried, own in found.items() if len(own) == most), key=key)


def tune(setting: Setting, seeds: Sequence[int], grid: Sequence[Try], kept: int) -> tuple[list[Try], list[Measured]]:
    """The best setting of each variant, best first, and all that was tried.

    The first seed tries everything; each later one the best `kept` settings of each variant.
    """
    tried: list[Measured] = []
    left = list(grid)
    for seed in seeds:
        tried.append(read(setting, seed, train(setting, seed, left, "select"), left, "select"))
        order = ranked([curve for item in tried for curve in item.curves])
        left = [item for way in WAYS for item in [one for one in order if one.way == way][:kept]]
    best = {item.way: item for item in reversed(order)}
    return [item for item in order if best[item.way] == item], tried


def measure(setting: Setting, seed: int, best: Sequence[Try]) -> Measured:
    """Chosen settings on one seed, on `report` tasks."""
    return read(setting, seed, train(setting, seed, best, "report"), best, "report")
