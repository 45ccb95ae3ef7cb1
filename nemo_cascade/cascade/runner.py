"""Run what is missing, in order, each stage as its own process; truth is in the markers, never in an exit code
alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nemo_cascade.cascade import checks, fingerprint, gates, teachers
from nemo_cascade.cascade.artifacts import read_json, write_json
from nemo_cascade.cascade.bar import StageBar
from nemo_cascade.cascade.graph import Source
from nemo_cascade.cascade.ledger import Ledger, read_ledger
from nemo_cascade.cascade.lock import locked
from nemo_cascade.cascade.manifest import Manifest, from_plan, write_manifest
from nemo_cascade.cascade.plan import Plan, make_plan
from nemo_cascade.cascade.process import last_error, run_process
from nemo_cascade.config.load import Loaded
from nemo_cascade.config.schema import MopdConfig, StageBase, StageRun
from nemo_cascade.config.stage_run import write_stage_run
from nemo_cascade.config.strict import nearest
from nemo_cascade.types import UserError

LAUNCH = "nemo_cascade.launch"
Say = Callable[[str], None]


class StageFailed(RuntimeError):
    """A stage did not finish, or a gate stopped the cascade: one line with the stage, the cause and what to do."""


@dataclass(frozen=True)
class Options:
    """Which part of a cascade to run, and with what.

    `module` is the program that runs one stage folder. `terminal` shows a bar of the running stage if it is one.
    """

    start: str | None = None
    until: str | None = None
    dry_run: bool = False
    module: str = LAUNCH
    terminal: TextIO | None = None


def run(loaded: Loaded, options: Options, say: Say) -> Path:
    """Bring every wanted stage to done; returns the cascade's folder. What is done under its key is not run again."""
    plan = make_plan(loaded)
    plan.refuse_missing()
    run = Run(plan, options, say)
    wanted = run.wanted()
    if options.dry_run:
        for name in wanted:
            say(f"{name}: {run.outlook(name)}")
        return loaded.folder
    run.refuse_missing_programs(wanted)
    write_manifest(run.manifest)
    for position, name in enumerate(wanted, start=1):
        run.bring(name, f"[{position}/{len(wanted)}] {name}")
    return loaded.folder


class Run:
    """One call of `run`: the plan with its keys and folders, and the ledger as it grows."""

    def __init__(self, plan: Plan, options: Options, say: Say) -> None:
        self.plan = plan
        self.options = options
        self.say = say
        self.keys = fingerprint.keys(plan)
        self.manifest: Manifest = from_plan(plan, self.keys)
        self.folders = self.manifest.folders

    def wanted(self) -> list[str]:
        """The stages between `--from` and `--until`; what lies before `--from` must be done."""
        order, graph = self.plan.graph.order, self.plan.graph
        for flag, name in (("--from", self.options.start), ("--until", self.options.until)):
            if name is not None and name not in order:
                raise UserError(f"{flag} {name}: no such stage{nearest(name, order)}")
        names = set(order)
        if self.options.until is not None:
            names &= {self.options.until, *graph.ancestors(self.options.until)}
        if self.options.start is not None:
            names &= {self.options.start, *graph.descendants(self.options.start)}
            needed = {parent for name in names for parent in graph.ancestors(name)} - names
            for name in (name for name in order if name in needed):
                unmade = self._unmade(name) if self.done(name) else []
                if unmade or not self.done(name):
                    lacks = f"did not keep the weights of {_steps(unmade)}" if unmade else "is not done yet"
                    raise UserError(f"--from {self.options.start}: {name} {lacks}; run without --from, or from {name}")
        return [name for name in order if name in names]

    def done(self, name: str) -> bool:
        """The stage finished under its present key."""
        return self.folders[name].is_done(self.keys[name])

    def refuse_missing_programs(self, wanted: list[str]) -> None:
        """Stop before the first stage, not in the evaluation at its end."""
        stages, loaded = [self.plan.stages[name] for name in wanted if not self.done(name)], self.plan.loaded
        sampler = checks.missing_sampler(stages, loaded.hardware, f"hardware {loaded.cascade.hardware}")
        for line in (*sampler, *checks.missing_programs(stages)):
            raise UserError(line)

    def outlook(self, name: str) -> str:
        """What `run` would do with a stage."""
        folder, steps = self.folders[name], self.plan.stages[name].num_steps
        unmade = self._unmade(name)
        if unmade:
            return f"would train its {steps} steps again: the weights of {_steps(unmade)} were not kept"
        if self.done(name):
            return "done" if self._measured(name) else "done, would be evaluated again (the evaluation changed)"
        step = folder.newest_checkpoint()
        if step is not None:
            return f"would go on from step {step} of {steps}"
        return f"would run {steps} steps in {folder.path}"

    def complete(self, name: str) -> bool:
        """The stage is done, measured as the config says, and has the weights that others need of it."""
        return self.done(name) and self._measured(name) and not self._unmade(name)

    def settled(self, name: str) -> bool:
        """Nothing is left to do for the stage, and none of its gates stops the cascade."""
        return self.complete(name) and not self.stopped(name)

    def stopped(self, name: str) -> str:
        """What the gate says that stops the cascade after a finished stage; "" when none does."""
        sentences = [result.sentence() for result in self._verdicts(name) if result.action == "stop"]
        return f"stage {name}: {sentences[0]}" if sentences else ""

    def bring(self, name: str, title: str) -> None:
        """Run a stage unless it is complete, then let its gates decide."""
        folder, stage = self.folders[name], self.plan.stages[name]
        if self.complete(name):
            self.say(f"{title}: done ({self.keys[name][:8]})")
        else:
            with locked(folder.lock):
                earlier, unmade = folder.result(), self._unmade(name)
                if unmade:
                    self.say(f"{title}: the weights of {_steps(unmade)} are needed and were not kept: it trains again")
                self.prepare(name)
                source = self.source(name)
                origin = {"hf": str(source.folder), "random": "random weights"}.get(source.kind, source.checkpoint)
                resumed = folder.newest_checkpoint()
                at = f", on from step {resumed}" if resumed is not None else ""
                self.say(f"{title}: {stage.kind} from {origin}, {stage.num_steps} steps{at}")
                self._launch(name, title)
                now = folder.result()
                if earlier is not None and now is not None and earlier.sha256 != now.sha256:
                    self.say(
                        f"{title}: its weights are not bit for bit those of its first run, from which finished stages "
                        "started; delete their folders to train them again"
                    )
        self.decide(name)

    def _launch(self, name: str, title: str) -> None:
        folder, started = self.folders[name], time.monotonic()
        folder.failed.unlink(missing_ok=True)
        said_before = folder.log.stat().st_size if folder.log.exists() else 0
        bar = StageBar(name, self.plan.stages[name].num_steps, folder.metrics, self.say, self.options.terminal)
        code = run_process(self.options.module, folder, self.plan.loaded.hardware.threads_per_rank, bar)
        if self.done(name):
            self.say(f"{title}: finished in {time.monotonic() - started:.0f} s")
            return
        cause = last_error(folder.log, code, said_before) if code else "it ended without its record"
        write_json(folder.failed, {"stage": name, "exit_code": code, "error": cause})
        raise StageFailed(f"stage {name} failed (exit code {code}): {cause}; the whole log is {folder.log}")

    def _measured(self, name: str) -> bool:
        """The evaluation files of a finished stage are there, made as the config now says."""
        return self._same_evaluation(name) and not any(
            not self.folders[name].evaluation(label).is_file() for label in _labels(self.plan.stages[name])
        )

    def _same_evaluation(self, name: str) -> bool:
        content = read_json(self.folders[name].evaluation_key)
        return content is not None and content["key"] == fingerprint.evaluation_key(self.plan.stages[name])

    def _unmade(self, name: str) -> list[int]:
        """Steps that the stage has passed without keeping weights that are needed now.

        While it trains, all of `keep_steps` are needed. Once it is trained, only those that a stage which is not done
        starts or learns from, and those still to be measured: who frees space keeps what is done.
        """
        folder, stage, graph = self.folders[name], self.plan.stages[name], self.plan.graph
        assert stage.evaluation is not None
        newest = folder.newest_checkpoint() or 0
        needed = set(stage.keep_steps)
        if self.done(name) or newest == stage.num_steps:
            newest = stage.num_steps
            needed = {step for below in graph.order if not self.done(below) for step in graph.kept_steps(name, below)}
            if _labels(stage):
                known = self._same_evaluation(name)
                paths = {step: folder.evaluation(_label(step)) for step in stage.evaluation.steps}
                needed |= {step for step, path in paths.items() if not (known and path.is_file())}
        return sorted(
            step for step in needed if step <= newest and not (folder.weights(step) / "config.json").is_file()
        )

    def prepare(self, name: str) -> None:
        """Write what launch needs.

        Of a finished stage only the evaluation is done again where that changed, and all of it where weights are
        needed that it did not keep: nothing of it is in the key, so what was trained from the stage stays done.
        """
        folder, stage = self.folders[name], self.plan.stages[name]
        if not self.complete(name):
            unmade = self._unmade(name)
            folder.record.unlink(missing_ok=True)
            if unmade:
                folder.forget_checkpoints()
            if unmade or not self._same_evaluation(name):
                shutil.rmtree(folder.evaluation("final").parent, ignore_errors=True)
        write_json(folder.evaluation_key, {"key": fingerprint.evaluation_key(stage)})
        write_stage_run(self.stage_run(name), folder.path)

    def stage_run(self, name: str) -> StageRun:
        """Everything launch needs, references resolved to folders."""
        plan, stage = self.plan, self.plan.stages[name]
        init = self._weights(self.source(name))
        choices = self._teachers(name)
        return StageRun(
            cascade=plan.loaded.cascade.name,
            stage=name,
            key=self.keys[name],
            seed=plan.loaded.cascade.seed,
            kind=stage.kind,
            init_folder=str(init.resolve()) if init is not None else None,
            teacher_folders={domain: str(choice.folder(self.folders).resolve()) for domain, choice in choices.items()},
            teacher_stages={domain: choice.checkpoint for domain, choice in choices.items()},
            model=dataclasses.asdict(plan.model),
            tokenizer=str(fingerprint.tokenizer_of(plan, name).resolve()),
            hardware=plan.loaded.hardware,
            trackers=plan.loaded.cascade.trackers,
            config=stage,
        )

    def source(self, name: str) -> Source:
        """Where a stage really starts, rollbacks of its ancestors followed."""
        return gates.effective_source(name, self.plan.graph.sources, self.folders)

    def _weights(self, source: Source) -> Path | None:
        """The folder of the weights that a source names; None for random ones."""
        if source.kind == "random":
            return None
        if source.folder is not None:
            return source.folder
        folder = self.folders[source.stage].weights(source.step)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: the weights of {source.checkpoint} are gone; delete "
                f"{self.folders[source.stage].path} and run again"
            )
        return folder

    def _teachers(self, name: str) -> dict[str, teachers.Choice]:
        """Choose the teachers of a distillation from the ledger as it is now, and keep the reasons."""
        stage, graph = self.plan.stages[name], self.plan.graph
        if not isinstance(stage, MopdConfig):
            return {}
        choices = teachers.choose(name, stage.data.domains, graph.teaching[name], graph.order, self.ledger())
        for domain, choice in choices.items():
            self._weights(Source("stage", choice.stage, choice.step))
            self.say(f"{name}: {domain} is taught by {choice.checkpoint} ({choice.reason})")
        write_json(self.folders[name].teachers, teachers.to_json(choices))
        return choices

    def ledger(self) -> Ledger:
        """The scores of every stage that is done."""
        return read_ledger({name: self.folders[name] for name in self.plan.graph.order if self.done(name)})

    def decide(self, name: str) -> None:
        """Evaluate the gates of a finished stage; a failed one warns, stops the run or sends the children back."""
        folder = self.folders[name]
        results = self._verdicts(name)
        if not results:
            folder.gates.unlink(missing_ok=True)
            return
        write_json(folder.gates, gates.to_json(results))
        for result in results:
            self.say(f"{name}: {result.sentence()}")
        stopped = self.stopped(name)
        if stopped:
            raise StageFailed(f"{stopped}; change the stage or the gate and run again")

    def _verdicts(self, name: str) -> list[gates.GateResult]:
        """What the gates of a finished stage say, as the config has them now."""
        stage = self.plan.stages[name]
        if not stage.gates:
            return []
        return gates.evaluate(name, stage, gates.reference_of(name, self.source(name)), self.ledger())


def _steps(steps: list[int]) -> str:
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(map(str, steps))


def _label(step: int) -> str:
    return f"step_{step:06d}"


def _labels(stage: StageBase) -> list[str]:
    """The evaluation files that a stage leaves; none where nothing is measured."""
    measure = stage.evaluation
    assert measure is not None
    if measure.select + measure.report == 0:
        return []
    return ["final", *map(_label, measure.steps)]
