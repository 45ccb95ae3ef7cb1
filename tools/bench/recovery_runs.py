"""The runs behind `tools.bench.algorithms`: a nano model that has lost something, and two ways back to its teachers."""

from __future__ import annotations

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
LIMITS = {"mopd": 60, "grpo": 180}  # steps after which a run that is not back counts as never back
KINDS = tuple(LIMITS)


@dataclass(frozen=True)
class Regression:
    """How the model lost what its teachers have: the stage both start from, and the domains that they train.

    `stage` is the YAML of the stage that does the damage, None where the cascade itself does it.
    """

    start: str
    domains: tuple[str, ...]
    eps: float  # of GRPO's advantage: large where a judge's graded rewards of converged groups would be blown up
    stage: str | None = None


REGRESSIONS = {
    "cascade": Regression("multi_domain_rl", ("math", "preference"), 0.3),
    "sft": Regression(
        "forgotten", ("instruction_following", "mcqa", "tool_use", "structured_output"), 1.0e-6,
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
evaluation: {{select: {select}, report: {report}, domains: [instruction_following, mcqa, tool_use, structured_output, \
math, preference], max_new_tokens: 64}}
judge: {{serve: "hf:nano_judge", strategy: all_pairs, length_weight: 0.1, conciseness_bonus: 0.1}}  # nano.yaml's
"""
SHARED = """init: {start}
num_steps: {steps}
data: {{domains: {{{domains}}}}}
sampling: {{max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}}
optimizer: {{lr: {rate}, betas: [0.9, 0.95], warmup_steps: 5, warmup_from: {warmup}}}
keep_steps: [{kept}]
evaluation: {{select: {select}, report: {report}, domains: [{measured}], steps: [{kept}]}}
"""
STAGES = {
    "mopd": """kind: mopd
prompts_per_step: 64
group_size: 1
teachers: {{candidates: [sft, rlhf_teacher, if_rl, multi_domain_rl]}}
distill: {{kind: sampled, importance_low: 0.5, importance_high: 2.0, clip_advantage: 5.0}}  # nano/mopd's
""",
    "grpo": """kind: grpo
prompts_per_step: 8
group_size: 8
filters: {{overlong: filter}}
advantage: {{baseline: mean, scale: std, eps: {eps}}}
loss: {{normalize: batch_tokens, kl: 0.0}}
""",
}


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
    """One algorithm on one seed."""

    kind: str
    rate: float
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
class Measured:
    """Both algorithms on one seed, with the teachers and what training them took beyond the common start."""

    seed: int
    start: Mapping[str, float]
    teachers: Mapping[str, Choice]
    taught: Mapping[str, float]  # domain -> its teacher's score
    teaching: Cost
    curves: Mapping[str, Curve]

    def ratio(self, what: str) -> float:
        """MOPD's steps or rollouts by GRPO's; a bound where one is never back: upper for GRPO, lower for MOPD."""
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


def write_stage(setting: Setting, kind: str, rate: float, split: Split) -> Path:
    """The stage file of one algorithm at one rate, measured on one split."""
    lost, limit = setting.regression, setting.steps(LIMITS[kind])
    counts = {"select": 0, "report": 0, split: setting.tasks(getattr(setting, split))}
    text = STAGES[kind].format(eps=lost.eps) + SHARED.format(
        start=lost.start, steps=limit, domains=", ".join(f"{name}: 1" for name in lost.domains), rate=rate,
        warmup=rate / 10, kept=", ".join(map(str, checkpoints(limit, split))), measured=", ".join(lost.domains),
        **counts,
    )  # fmt: skip
    path = setting.out / f"{split}-{stage_name(kind, rate)}" / f"{stage_name(kind, rate)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def train(setting: Setting, seed: int, rates: Mapping[str, Sequence[float]], split: Split) -> Manifest:
    """Run the cascade to the start and a stage of each algorithm at each of its rates, those not done yet."""
    files = [write_stage(setting, kind, rate, split) for kind, values in rates.items() for rate in values]
    if setting.regression.stage is not None:
        damage = setting.out / f"{setting.regression.start}.yaml"
        damage.write_text(setting.regression.stage.format(steps=setting.steps(DAMAGE)))
        files.insert(0, damage)
    stages = [*(f"nano/{name}" for name in PREPARED), *(str(file.resolve()) for file in files)]
    path = setting.out / f"seed-{seed}.yaml"
    path.write_text(
        CASCADE.format(
            hardware=setting.hardware, seed=seed, output=(setting.out / f"seed-{seed}").resolve(),
            stages=", ".join(stages), select=setting.tasks(setting.select), report=setting.tasks(setting.report),
        )
    )  # fmt: skip
    shorter = [f"stages.{name}.num_steps={setting.steps(steps)}" for name, steps in PREPARED.items()]
    loaded = load_cascade(str(path), shorter if setting.scale < 1.0 else [])
    return read_manifest(run(loaded, Options(), lambda line: say(f"seed {seed}: {line}")))


def say(line: str) -> None:
    """Progress, beside what is printed."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def scores_of(folder: StageFolder, label: str, split: Split) -> dict[str, float]:
    """Mean score of each domain at one checkpoint; each is measured in its own mode only."""
    cells, _ = read_evaluation(folder.evaluation(label))
    return {domain: statistics.fmean(tasks.values()) for (domain, which, _), tasks in cells.items() if which == split}


def curve_of(folder: StageFolder, kind: str, rate: float, split: Split, taught: Mapping[str, float]) -> Curve:
    """Every evaluated checkpoint of a stage, in order."""
    result = folder.result()
    assert result is not None, "the runner has brought the stage to its end"
    points = []
    for step in [*checkpoints(result.num_steps, split), result.num_steps]:
        label = FINAL if step == result.num_steps else f"step_{step:06d}"
        scores = scores_of(folder, label, split)
        share = min(scores[domain] / taught[domain] for domain in taught)
        points.append(Point(cost_of(folder, step), scores, share))
    return Curve(kind, rate, points)


def read(
    setting: Setting, seed: int, manifest: Manifest, rates: Mapping[str, Sequence[float]], split: Split
) -> list[Measured]:
    """The curves of a seed, one entry per rate (the i-th of both algorithms together)."""
    folders, lost = manifest.folders, setting.regression
    start = {
        name: score for name, score in scores_of(folders[lost.start], FINAL, split).items() if name in lost.domains
    }
    found = []
    for mopd, grpo in zip(rates["mopd"], rates["grpo"], strict=True):
        teachers = read_teachers(folders[stage_name("mopd", mopd)])
        taught = {name: scores_of(folders[teachers[name].stage], FINAL, split)[name] for name in lost.domains}
        if not all(taught.values()):
            raise UserError(f"seed {seed}: a teacher scores 0, so there is nothing to come back to; train longer")
        used = {name for choice in teachers.values() for name in lineage(manifest, choice.stage)}
        teaching = total(cost_of(folders[name]) for name in sorted(used - lineage(manifest, lost.start)))
        curves = {
            kind: curve_of(folders[stage_name(kind, rate)], kind, rate, split, taught)
            for kind, rate in (("mopd", mopd), ("grpo", grpo))
        }
        found.append(Measured(seed, start, teachers, taught, teaching, curves))
    return found


def lineage(manifest: Manifest, name: str) -> set[str]:
    """A stage and all it starts from."""
    sources, found = manifest.sources, set[str]()
    while name:
        found.add(name)
        name = sources[name].stage
    return found


def tune(setting: Setting, seed: int, rates: Sequence[float]) -> tuple[dict[str, float], list[Measured]]:
    """The rate of each algorithm that is back in the fewest steps on the tuning seed, and all that was tried."""
    grid = dict.fromkeys(KINDS, tuple(rates))
    tried = read(setting, seed, train(setting, seed, grid, "select"), grid, "select")
    best = {}
    for kind in KINDS:
        curves = [item.curves[kind] for item in tried]
        ranked = sorted(curves, key=lambda curve: (curve.back is None, curve.reached.steps, -curve.points[-1].share))
        best[kind] = ranked[0].rate
    return best, tried


def measure(setting: Setting, seed: int, best: Mapping[str, float]) -> Measured:
    """Both algorithms at their best rates on one seed, on `report` tasks."""
    rates = {kind: (rate,) for kind, rate in best.items()}
    (found,) = read(setting, seed, train(setting, seed, rates, "report"), rates, "report")
    return found
