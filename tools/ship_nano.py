"""Put a finished one-stage cascade's weights into the package: the end of `make nano-base` and `make nano-judge`.

Beside the weights it leaves `training.json`: the recipe, the loss curve, and a fingerprint of the data that the recipe
generates, so that a later change of a generator shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder, read_lines, write_json
from nemo_cascade.cascade.manifest import read_manifest
from nemo_cascade.config.schema import StageRun
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import conversation_stream
from nemo_cascade.domains import load

SIZE_LIMIT = 8 * 2**20
FINGERPRINTED_STEPS = 4
CURVE_POINTS = 100


def data_fingerprint(run: StageRun) -> str:
    """sha256 over the token ids of the first steps that the recipe's stream gives to one rank."""
    names = {*run.config.data.domains} | ({"preference"} if run.config.data.judge_share else set())
    domains = {name: load(name) for name in sorted(names)}
    stream = conversation_stream(run.config, domains, ChatTokenizer(run.tokenizer), run.seed)
    digest = hashlib.sha256()
    for step in range(FINGERPRINTED_STEPS):
        digest.update(json.dumps([sequence.token_ids for sequence in stream.take(step)]).encode())
    return digest.hexdigest()


def loss_curve(folder: StageFolder) -> list[list[float]]:
    """[step, loss] at about a hundred steps."""
    lines = [(line["step"], line["loss"]) for line in read_lines(folder.metrics)]
    every = max(1, len(lines) // CURVE_POINTS)
    return [[step, round(loss, 4)] for step, loss in lines[::every]]


def ship(cascade_folder: Path, target: Path) -> Path:
    """Replace `target` by the Hugging Face folder of the cascade's last stage."""
    manifest = read_manifest(cascade_folder)
    entry = manifest.stages[-1]
    folder = manifest.folders[entry.name]
    if not folder.is_done(entry.key):
        raise SystemExit(f"{folder.path}: not finished; run the cascade first")
    size = sum(path.stat().st_size for path in folder.hf.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{folder.hf}: {size} bytes are too many to ship; export in bf16")
    run, result = read_stage_run(folder.path), folder.result()
    assert result is not None
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder.hf, target)
    for path in target.iterdir():
        path.chmod(0o644)
    write_json(
        target / "training.json",
        {
            "sha256": result.sha256,
            "seconds": result.seconds,
            "ranks": run.hardware.world_size,
            "seed": run.seed,
            "data_fingerprint": data_fingerprint(run),
            "recipe": dataclasses.asdict(run.config),
            "loss_curve": loss_curve(folder),
        },
    )
    return target


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), Path(sys.argv[2])))
