"""A cascade as a NeMo-Run experiment: a job per unfinished stage, dependencies as in the graph, truth from markers."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.manifest import write_manifest
from nemo_cascade.cascade.plan import Plan, make_plan
from nemo_cascade.cascade.runner import LAUNCH, Options, Run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.recipes.executors import ExecutorConfig, build_executor, load_executor
from nemo_cascade.recipes.stage import say
from nemo_cascade.types import UserError

FAILED, MISTAKE = 1, 2


@dataclass(frozen=True)
class Recipe:
    """What to run and where. `cascade` and `executor` are names below conf, or paths."""

    cascade: str
    executor: str
    overrides: tuple[str, ...] = ()
    detach: bool = False
    dry_run: bool = False
    module: str = LAUNCH  # the program that runs one stage folder


def unfinished(run: Run) -> list[str]:
    """Stages with something left to do, in the order they run: no marker of their present key, an evaluation that
    changed, weights that another stage needs and they did not keep, or a gate that says stop.
    """
    return [name for name in run.plan.graph.order if not run.settled(name)]


def submit(recipe: Recipe) -> int:
    """Submit what is not done as a new experiment; 0 when everything is done in the end (detached: submitted)."""
    executor = load_executor(recipe.executor)
    plan = make_plan(load_cascade(recipe.cascade, recipe.overrides))
    plan.refuse_missing()
    run = Run(plan, Options(module=recipe.module), say)
    name, waiting = run.manifest.cascade, unfinished(run)
    if not waiting:
        sys.stdout.write(f"{name}: all {len(run.folders)} stages are done\n")
        return 0
    write_manifest(run.manifest)
    run_experiment(recipe, plan, executor, waiting)
    if recipe.dry_run or recipe.detach:
        return 0
    left = unfinished(run)
    if left:
        sys.stderr.write(f"error: {name}: not done: {', '.join(left)}; submit again to go on\n")
    return FAILED if left else 0


def run_experiment(recipe: Recipe, plan: Plan, executor: ExecutorConfig, waiting: Sequence[str]) -> None:
    """One NeMo-Run experiment of the unfinished part of the graph."""
    # NeMo-Run reads its home when it is imported.
    os.environ.setdefault("NEMORUN_HOME", str(Path.home() / ".nemo_run"))
    import nemo_run

    name = plan.loaded.cascade.name
    with nemo_run.Experiment(name, enable_goodbye_message=False, skip_status_at_exit=True) as experiment:
        last: dict[str, str] = {}
        for stage in waiting:
            for number in range(1, executor.jobs + 1):
                before = (
                    [last[stage]] if stage in last else [last[up] for up in plan.graph.parents(stage) if up in last]
                )
                last[stage] = experiment.add(
                    nemo_run.Script(inline=script(recipe, executor, stage)),
                    executor=build_executor(executor, plan.loaded.hardware, name),
                    name=stage if number == 1 else f"{stage}_{number}",
                    dependencies=before or None,
                    tail_logs=executor.kind == "local",
                )
        if recipe.dry_run:
            experiment.dryrun(delete_exp_dir=False)
        else:
            experiment.run(detach=recipe.detach)


def script(recipe: Recipe, executor: ExecutorConfig, stage: str) -> str:
    """The shell lines of one stage's job."""
    words = [executor.interpreter, "-m", "nemo_cascade.recipes.stage", recipe.cascade, stage]
    words += [recipe.module, *recipe.overrides]
    folder = shlex.quote(str(executor.work_folder()))
    return f"cd {folder}\nexec {shlex.join(words)}\n"


def main(cascade: str, executor: str, arguments: Sequence[str] | None = None) -> int:
    """The command line that every recipe has."""
    parser = argparse.ArgumentParser(description=f"Run the cascade {cascade} through NeMo-Run.")
    parser.add_argument("--executor", default=executor, help="name below conf/executor, or a path")
    parser.add_argument("--detach", action="store_true", help="submit and return (Slurm)")
    parser.add_argument("--dry-run", action="store_true", help="write and print the job scripts")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example stages.if_rl.num_steps=20")
    options = parser.parse_args(arguments)
    try:
        return submit(Recipe(cascade, options.executor, tuple(options.overrides), options.detach, options.dry_run))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
