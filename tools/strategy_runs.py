"""How each strategy of `tools.compare_strategies` is trained for one seed, by the ordinary runner.

All strategies start from the same SFT stage and share one folder, so that what two of them need is trained once. The
cascade sets the budget: tokens sampled and trained after SFT. The others end where theirs is nearest to it: their last
stage runs at a constant learning rate, keeps weights on the way, and the kept step whose total is nearest counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_cascade.cascade.artifacts import StageFolder, read_lines
from nemo_cascade.cascade.ledger import FINAL, Cell, read_evaluation
from nemo_cascade.cascade.manifest import Manifest, read_manifest
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.cascade.teachers import read_teachers
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.strict import read_yaml
from nemo_cascade.evaluation.benchmark import Benchmark
from nemo_cascade.evaluation.checkpoint import benchmark_rows
from nemo_cascade.models.hf_average import average_folders
from nemo_cascade.types import UserError
from tools.rollout_conversations import write_conversations
from tools.stage_costs import Cost, cost_of, cost_of_step, total

START = "sft"
CASCADE, MIXED, EXPERTS = "nano", "nano_mixed", "nano_experts_mopd"
MIXED_STAGE, MOPD_STAGE, SFT_STAGE = "mixed_rl", "experts_mopd", "sft_on_rollouts"
RESERVE = 1.25  # a last stage runs this much longer than its file says, should its answers be shorter than foreseen
KEPT = 40  # weights kept on the way
SFT_TOKENS = 2048  # tokens of one step of SFT on rollouts
ROLLOUTS = """kind: grpo
init: {teacher}
mode: sample_only
num_steps: {steps}
prompts_per_step: {prompts}
group_size: 4
data: {data}
sampling: {{max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}}
optimizer: {{lr: 0.0}}
evaluation: {{select: 0, report: 0}}
"""
SFT = """kind: sft
init: sft
num_steps: {steps}
tokens_per_step: {tokens}
max_sequence_tokens: 320
data: {{conversations: ["{rows}"]}}
optimizer: {{lr: 3.0e-4, betas: [0.9, 0.98], weight_decay: 0.1, warmup_steps: 5, warmup_from: 3.0e-5}}
save_every: 50
"""
Scores = Mapping[str, Mapping[str, float]]  # domain -> task -> score


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison share. `factor` multiplies the learning rates after SFT; `scale` shortens every
    stage after SFT and `sft_scale` SFT itself; `select` and `report` are tasks per domain. The budget is what the
    cascade takes at `budget_factor`.
    """

    out: Path
    hardware: str
    factor: float
    budget_factor: float
    scale: float
    sft_scale: float
    select: int
    report: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One strategy on one seed. `cost` counts everything after SFT that the strategy needed."""

    strategy: str
    seed: int
    factor: float
    select: Scores
    report: Scores
    cost: Cost


class Seed:
    """All strategies on one seed at one factor; asking for a result trains what is missing."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.folder = setting.out / f"seed-{seed}"

    def result(self, strategy: str) -> Result:
        """Train a strategy and read its scores."""
        file, cost = STRATEGIES[strategy](self)
        cells, _ = read_evaluation(file)
        select, report = _of(cells, "select"), _of(cells, "report")
        return Result(strategy, self.seed, self.setting.factor, select, report, cost)

    def run(self, cascade: str, *extra: str) -> Manifest:
        """Bring a cascade to its end in the common folder."""
        folder = run(
            load_cascade(cascade, [*self.overrides(cascade), *extra]),
            Options(),
            lambda line: self.setting.say(f"seed {self.seed}: {line}"),
        )
        return read_manifest(folder)

    def overrides(self, cascade: str) -> list[str]:
        """The seed, where it lies, how it is measured, and every learning rate after SFT times the factor. Only a
        cascade's last stage is measured on `report` tasks: `select` tasks choose teachers and factors.
        """
        setting = self.setting
        found = [
            f"seed={self.seed}", f"output={self.folder}", "name=strategies", f"hardware={setting.hardware}",
            f"evaluation.select={setting.select}", f"evaluation.report={setting.report}", "evaluation.other_mode=0",
        ]  # fmt: skip
        stages = load_cascade(cascade).stages
        found += [f"stages.{name}.evaluation.report=0" for name in list(stages)[:-1]]
        for name, stage in stages.items():
            steps = self.steps(stage.num_steps, name)
            if steps != stage.num_steps:
                found.append(f"stages.{name}.num_steps={steps}")
            if setting.factor != 1.0 and name != START:
                optimizer = stage.optimizer
                found.append(f"stages.{name}.optimizer.lr={optimizer.lr * setting.factor}")
                found.append(f"stages.{name}.optimizer.warmup_from={optimizer.warmup_from * setting.factor}")
        return found

    def steps(self, full: int, stage: str = "") -> int:
        """A number of steps, shortened as its stage is."""
        return max(2, round(full * (self.setting.sft_scale if stage == START else self.setting.scale)))

    def cascade(self) -> tuple[Path, Cost]:
        """The paper's cascade; its last checkpoint."""
        manifest = self.run(CASCADE)
        names = [entry.name for entry in manifest.stages]
        return manifest.folders[names[-1]].evaluation(FINAL), after_start(manifest, names)

    def budget(self) -> int:
        """The tokens that every strategy may take after SFT."""
        setting = dataclasses.replace(self.setting, factor=self.setting.budget_factor)
        return Seed(setting, self.seed).cascade()[1].tokens

    def mixed(self) -> tuple[Path, Cost]:
        """One RL stage on all domains."""
        return self.until_budget(MIXED, MIXED_STAGE, self.length(MIXED, MIXED_STAGE), Cost())

    def experts(self) -> Manifest:
        """All experts and their distillation, trained; its cascade's manifest."""
        longest = self.length(EXPERTS, MOPD_STAGE)
        return self.run(EXPERTS, *kept(MOPD_STAGE, longest))

    def experts_cost(self, manifest: Manifest) -> Cost:
        """What the experts alone took."""
        return after_start(manifest, [name for name in manifest.folders if name != MOPD_STAGE])

    def experts_mopd(self) -> tuple[Path, Cost]:
        """One distillation of all experts."""
        spent = self.experts_cost(self.experts())
        return self.until_budget(EXPERTS, MOPD_STAGE, self.length(EXPERTS, MOPD_STAGE), spent)

    def average(self) -> tuple[Path, Cost]:
        """The mean of the experts' weights. What distillation would have taken is not spent."""
        manifest = self.experts()
        entries = [entry for entry in manifest.stages if entry.name not in (START, MOPD_STAGE)]
        target = self.folder / f"average-{'-'.join(entry.key[:4] for entry in entries)}"
        file = target / "evaluation.jsonl"
        if not file.is_file():
            folders = manifest.folders
            average_folders([folders[entry.name].hf for entry in entries], target / "hf")
            config = load_cascade(EXPERTS, self.overrides(EXPERTS)).cascade.evaluation
            self.setting.say(f"seed {self.seed}: evaluating the mean of {len(entries)} experts")
            Benchmark.write(file, benchmark_rows(f"hf:{target / 'hf'}", config))
        return file, self.experts_cost(manifest)

    def sft_on_rollouts(self) -> tuple[Path, Cost]:
        """SFT on answers of the teachers that distillation chose, the best of four where it earned anything."""
        spent = self.experts_cost(self.experts())
        files = self.sampling_stages()
        sampled = self.run(str(self.expert_cascade("rollouts", files)))
        folders = {file.stem: sampled.folders[file.stem] for file in files}
        rows = self.folder / f"rows-{'-'.join(folder.path.name[-4:] for folder in folders.values())}.jsonl"
        if not rows.is_file():
            counts = write_conversations([folder.path for folder in folders.values()], rows)
            self.setting.say(f"seed {self.seed}: rows for SFT: {dict(counts)}")
        spent += total(cost_of(folder) for folder in folders.values())
        left = max(self.budget() - spent.tokens, 4 * SFT_TOKENS)
        steps = math.ceil(RESERVE * left / SFT_TOKENS)
        stage = self.written(SFT_STAGE, SFT.format(steps=steps, tokens=SFT_TOKENS, rows=rows.resolve()))
        path = self.expert_cascade("sft", [*files, stage])
        return self.until_budget(str(path), SFT_STAGE, steps, spent)

    def sampling_stages(self) -> list[Path]:
        """One stage file per teacher, over the domains that it teaches; 96 prompts of each."""
        folders = self.experts().folders
        mixture = load_cascade(EXPERTS).stages[MOPD_STAGE].data
        taught: dict[str, list[str]] = {}
        for domain, choice in read_teachers(folders[MOPD_STAGE]).items():
            taught.setdefault(choice.checkpoint, []).append(domain)
        files = []
        for teacher, domains in sorted(taught.items()):
            options = {name: mixture.options[name] for name in domains if name in mixture.options}
            data = yaml.safe_dump({"domains": dict.fromkeys(domains, 1), "options": options}, default_flow_style=True)
            text = ROLLOUTS.format(
                teacher=teacher, steps=self.steps(6), prompts=16 * len(domains), data=" ".join(data.split())
            )
            files.append(self.written(f"rollouts_of_{teacher}", text))
        return files

    def expert_cascade(self, name: str, files: Sequence[Path]) -> Path:
        """The experts' cascade with other stages in place of the distillation."""
        raw: dict[str, Any] = read_yaml(load_cascade(EXPERTS).path)
        experts = [stage for stage in raw["stages"] if Path(stage).name != MOPD_STAGE]
        raw["stages"] = [*experts, *(str(file.resolve()) for file in files)]
        return self.written(f"cascade_{name}", yaml.safe_dump(raw, sort_keys=False))

    def written(self, name: str, text: str) -> Path:
        """A generated YAML file of this seed and factor."""
        path = self.folder / f"factor-{self.setting.factor:g}" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def length(self, cascade: str, stage: str) -> int:
        """How long a last stage runs: its own steps and the reserve."""
        return self.steps(math.ceil(RESERVE * load_cascade(cascade).stages[stage].num_steps))

    def until_budget(self, cascade: str, stage: str, longest: int, spent: Cost) -> tuple[Path, Cost]:
        """Run the last stage with its reserve and evaluate the kept step at which the budget is best met."""
        budget = self.budget()
        words = kept(stage, longest)
        folder = self.run(cascade, *words).folders[stage]
        step = nearest_step(folder, budget - spent.tokens, [*kept_steps(longest), longest])
        if step == longest:
            if spent.tokens + cost_of(folder).tokens < 0.97 * budget:
                self.setting.say(f"seed {self.seed}: {stage} ends below its budget of {budget} tokens")
            return folder.evaluation(FINAL), spent + cost_of(folder)
        self.run(cascade, *words, f"stages.{stage}.evaluation.steps=[{step}]")
        return folder.evaluation(f"step_{step:06d}"), spent + cost_of(folder, step)


STRATEGIES: dict[str, Callable[[Seed], tuple[Path, Cost]]] = {
    "cascade": Seed.cascade,
    "mixed": Seed.mixed,
    "experts_mopd": Seed.experts_mopd,
    "average": Seed.average,
    "sft_on_rollouts": Seed.sft_on_rollouts,
}


def _of(cells: Mapping[Cell, Mapping[str, float]], split: str) -> Scores:
    """The scores of one split; a domain's other mode is not measured here."""
    return {domain: tasks for (domain, which, _), tasks in cells.items() if which == split}


def after_start(manifest: Manifest, names: Sequence[str]) -> Cost:
    """What these stages took, SFT left out, which every strategy starts from."""
    return total(cost_of(manifest.folders[name]) for name in names if name != START)


def kept_steps(longest: int) -> list[int]:
    """The steps whose weights a last stage keeps."""
    every = max(1, longest // KEPT)
    return list(range(every, longest, every))


def kept(stage: str, longest: int) -> list[str]:
    """The same as an override, with the steps the stage runs."""
    steps = ", ".join(map(str, kept_steps(longest)))
    return [f"stages.{stage}.keep_steps=[{steps}]", f"stages.{stage}.num_steps={longest}"]


def nearest_step(folder: StageFolder, tokens: int, steps: Sequence[int]) -> int:
    """Of the given steps the one after which a stage has taken the number of tokens best."""
    taken, so_far = {}, 0
    for number, line in enumerate(read_lines(folder.metrics), start=1):
        so_far += cost_of_step(line).tokens
        taken[number] = so_far
    missing = [step for step in steps if step not in taken]
    if missing:
        raise UserError(f"{folder.metrics}: no line of step {missing[0]}; delete {folder.path} and run again")
    return min(steps, key=lambda step: abs(taken[step] - tokens))
