"""The body of a stage's job: `python -m nemo_cascade.recipes.stage CASCADE STAGE MODULE [KEY=VALUE ...]`.

It guards itself, because schedulers start jobs whose parents failed: exit 75 when an input lacks its marker or a gate
above says stop, 0 when the stage is done (also when it was done before), 1 when it failed or its own gate says stop, 2
on a mistake in the configuration. Teachers are chosen here, when the stage starts, from the ledger as it is then.

As one task the stage starts its own ranks. As a task among several (Slurm, several nodes) each task is a rank: task 0
prepares the stage folder, the others wait for it with a deadline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.plan import make_plan
from nemo_cascade.cascade.process import environment
from nemo_cascade.cascade.runner import Options, Run, StageFailed
from nemo_cascade.config.load import Loaded, load_cascade
from nemo_cascade.config.strict import nearest
from nemo_cascade.types import UserError

DONE, FAILED, MISTAKE, NOT_YET = 0, 1, 2, 75
PREPARE_DEADLINE_S = 600.0
POLL_S = 0.5
PORT_BASE, PORTS = 20000, 20000


@dataclass(frozen=True)
class SlurmTask:
    """This process among the tasks of a job, from Slurm's variables; one of one outside Slurm."""

    rank: int
    local_rank: int
    world: int
    job: str
    first_host: str

    @staticmethod
    def read(env: Mapping[str, str]) -> SlurmTask:
        """Who this task is."""
        world = int(env.get("SLURM_NTASKS", "1"))
        if world == 1:
            return SlurmTask(0, 0, 1, "", "")
        job = f"{env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT', '0')}"
        return SlurmTask(
            int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, job, first_host(env["SLURM_NODELIST"])
        )

    def variables(self) -> dict[str, str]:
        """What torch.distributed reads. The port follows from the job, so two jobs on a node do not meet."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world),
            "MASTER_ADDR": self.first_host,
            "MASTER_PORT": str(PORT_BASE + int(self.job.partition("-")[0]) % PORTS),
        }


def first_host(node_list: str) -> str:
    """The first host of `node[003-010,012]` or `a,b`."""
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return node_list.partition(",")[0]
    return prefix + rest.replace("-", ",").replace("]", ",").partition(",")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage if its inputs are there; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 3:
        sys.stderr.write("usage: python -m nemo_cascade.recipes.stage CASCADE STAGE MODULE [KEY=VALUE ...]\n")
        return MISTAKE
    try:
        cascade, stage, module, *overrides = arguments
        return run_stage(load_cascade(cascade, overrides), stage, module, SlurmTask.read(os.environ))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except StageFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED


def run_stage(loaded: Loaded, stage: str, module: str, task: SlurmTask) -> int:
    """Guard, then run as the only task or as one of several. `module` is the program that runs one stage folder."""
    plan = make_plan(loaded)
    plan.refuse_missing()
    if stage not in plan.graph.order:
        raise UserError(f"stage {stage!r}: not in this cascade{nearest(stage, plan.graph.order)}")
    run = Run(plan, Options(module=module), say)
    if run.complete(stage) and task.rank > 0:
        return DONE
    obstacle = why_not_yet(run, stage, writes=task.rank == 0)
    if obstacle:
        sys.stderr.write(f"{stage}: {obstacle}\n")
        return NOT_YET
    folder = run.folders[stage]
    ready = folder.path / f".ready-{task.job}"
    if task.rank > 0:
        return follow([sys.executable, "-m", module, str(folder.path)], ready, task, loaded.hardware.threads_per_rank)
    if task.world > 1:
        os.environ.update(task.variables())
        run.prepare(stage)
        ready.touch()
    run.bring(stage, stage)
    return DONE


def why_not_yet(run: Run, stage: str, writes: bool) -> str:
    """Why the stage must not start: an input without its marker, or a gate above it that stops the cascade; else "".

    Gates are decided again, as the config has them now: a stage whose gate was changed need not run again. One task
    `writes` what they say.
    """
    for parent in run.plan.graph.parents(stage):
        if not run.done(parent):
            return f"its input {parent} is not done ({run.folders[parent].record} is missing)"
    above = run.plan.graph.ancestors(stage)
    for ancestor in (name for name in run.plan.graph.order if name in above):
        if stopped := run.stopped(ancestor):
            return stopped
        if writes:
            run.decide(ancestor)
    return ""


def follow(command: Sequence[str], ready: Path, task: SlurmTask, threads: int) -> int:
    """A rank but the first: wait until the first has prepared the folder, then train with it."""
    deadline = time.monotonic() + PREPARE_DEADLINE_S
    while not ready.exists():
        if time.monotonic() > deadline:
            sys.stderr.write(
                f"rank {task.rank}: waited {PREPARE_DEADLINE_S:.0f} s for rank 0 to prepare {ready.parent}\n"
            )
            return FAILED
        time.sleep(POLL_S)
    return subprocess.run(command, env={**environment(threads), **task.variables()}, check=False).returncode


def say(line: str) -> None:
    """Progress goes to the job's log."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
