"""A stage that trains one number per domain: small enough for a test, real enough to be killed, resumed and evaluated.

Started as `python -m standin_stage FOLDER` in place of nemo_cascade.launch. The policy is `skill`: domain -> float. A
step moves the trained domains up by `optimizer.lr` and all others down by a tenth of it; mopd moves halfway to the
teacher's skill. A task is solved when its difficulty lies below the skill. STANDIN_KILL=`stage:step` kills the process
with SIGKILL at that step, STANDIN_FAIL=`stage` raises, STANDIN_PACE is the time of a step in seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder, write_json
from nemo_cascade.cascade.fingerprint import folder_sha256
from nemo_cascade.cascade.lock import locked
from nemo_cascade.config.paths import write_atomic
from nemo_cascade.config.schema import StageRun
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.observe.progress import ProgressLine
from nemo_cascade.types import StageResult

LOG = logging.getLogger("standin_stage")
Skill = dict[str, float]


def load(folder: str) -> Skill:
    """What a stand-in's weights know; real ones (the shipped base) say nothing here."""
    path = Path(folder) / "model.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def export(folder: Path, skill: Skill) -> None:
    write_json(folder / "model.json", skill)
    write_json(folder / "config.json", {"model_type": "standin"})


def train_step(run: StageRun, skill: Skill) -> Skill:
    config = run.config
    if run.kind == "mopd":
        taught = {domain: load(folder)[domain] for domain, folder in run.teacher_folders.items()}
        return {name: value + 0.5 * (taught.get(name, value) - value) for name, value in skill.items()}
    return {
        name: value + (config.optimizer.lr if name in config.data.domains else -0.1 * config.optimizer.lr)
        for name, value in skill.items()
    }


def difficulty(task: str) -> float:
    return int(hashlib.sha256(task.encode()).hexdigest()[:8], 16) / 2**32


def evaluate(run: StageRun, skill: Skill, path: Path) -> None:
    rows = []
    for domain in run.config.evaluation.domains:
        sets = (
            ("select", "thinking", run.config.evaluation.select),
            ("report", "thinking", run.config.evaluation.report),
        )
        for split, mode, count in (*sets, ("report", "instruct", run.config.evaluation.other_mode)):
            for index in range(count):
                task = f"{domain}-{split}-{index}"
                handicap = 0.2 if mode == "instruct" else 0.0
                score = float(difficulty(task) < skill[domain] - handicap)
                row = {
                    "domain": domain,
                    "split": split,
                    "mode": mode,
                    "task_id": task,
                    "score": score,
                    "valid": index != 5,
                }
                rows.append(json.dumps(row))
    write_atomic(path, "".join(f"{row}\n" for row in rows))


def run_stage(folder: StageFolder) -> None:
    run, started = read_stage_run(folder.path), time.monotonic()
    if run.stage == os.environ.get("STANDIN_FAIL"):
        raise RuntimeError("the learner diverged at step 2")
    kill_stage, _, kill_step = os.environ.get("STANDIN_KILL", "").partition(":")
    done = folder.newest_checkpoint() or 0
    domains = run.config.evaluation.domains
    skill = dict.fromkeys(domains, 0.3) | (load(run.init_folder) if run.init_folder else {})
    start = dict(skill)
    if done:
        skill = json.loads((folder.checkpoint(done) / "state.json").read_text())
    progress = ProgressLine(run.stage, run.config.num_steps)
    for step in range(done, run.config.num_steps):
        began = time.perf_counter()
        time.sleep(float(os.environ.get("STANDIN_PACE", "0")))
        if run.stage == kill_stage and step == int(kill_step):
            os.kill(os.getpid(), signal.SIGKILL)
        skill = train_step(run, skill)
        took = time.perf_counter() - began
        line = {"step": step, "reward": sum(skill.values()) / len(skill), "tokens": 64.0, "seconds/total": took}
        with folder.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        progress.update(step, took, line)
        if (step + 1) in run.config.keep_steps:
            export(folder.weights(step + 1), skill)
        if (step + 1) % run.config.save_every == 0 or step + 1 == run.config.num_steps:
            write_json(folder.checkpoint(step + 1) / "state.json", skill)
        LOG.warning("%s step %d", run.stage, step + 1)
    export(folder.hf, skill)
    measured = {"final": skill}
    for step in run.config.evaluation.steps:
        measured[f"step_{step:06d}"] = load(str(folder.weights(step)))
    if run.init_folder is None:
        measured["init"] = start
    for label, weights in measured.items():
        if not folder.evaluation(label).exists():
            LOG.warning("%s measures %s", run.stage, label)
            evaluate(run, weights, folder.evaluation(label))
    seconds = time.monotonic() - started
    folder.finish(
        StageResult(run.stage, run.kind, run.key, "hf", folder_sha256(folder.hf), run.config.num_steps, seconds)
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    stage_folder = StageFolder(Path(sys.argv[1]))
    with locked(stage_folder.lock):
        run_stage(stage_folder)
