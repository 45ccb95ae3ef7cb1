"""A stage whose ranks only say that they are there; rank 0 finishes the stage when it has seen the others."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.types import StageResult

if __name__ == "__main__":
    folder, env = StageFolder(Path(sys.argv[1])), os.environ
    run, world = read_stage_run(folder.path), int(env["WORLD_SIZE"])
    (folder.path / f"rank-{env['RANK']}-of-{world}-at-{env['MASTER_ADDR']}").touch()
    deadline = time.monotonic() + 120
    while env["RANK"] == "0" and len(list(folder.path.glob("rank-*"))) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    if env["RANK"] == "0":
        folder.finish(StageResult(run.stage, run.kind, run.key, "hf", "", run.config.num_steps, 0.0))
