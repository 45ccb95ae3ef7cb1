"""The folder of a stage: what lies where, when it is done, and who may write.

<output>/<cascade>/<stage>-<key8>/
    config.yaml                 everything launch needs (StageRun)
    metrics.jsonl               one line per step
    rollouts/step_000012.jsonl  what was sampled; step_000012.npz, by which experts, with routing_replay: sampler
    checkpoints/step_000040/    resumable training state
    weights/step_000040/        exported keep_steps, Hugging Face format
    hf/                         the final Hugging Face folder
    evaluation/final.jsonl      one line per task; also step_000040.jsonl, and init.jsonl for weights that no stage made
    gates.json, teachers.json   what was decided, and from which scores
    record.json                 StageResult, written last: it exists when, and only when, the stage is done
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.config.paths import write_atomic
from nemo_cascade.config.schema import STAGE_KINDS
from nemo_cascade.types import StageResult, UserError

KEY_IN_NAME = 8
STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class StageFolder:
    """The paths inside one stage folder. Nothing is created by asking for a path."""

    path: Path

    @property
    def config(self) -> Path:
        """Everything launch needs."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line per finished step."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the stage's process wrote to its terminal."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Resumable training state, one folder per step."""
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        """The final Hugging Face folder."""
        return self.path / "hf"

    @property
    def record(self) -> Path:
        """The done marker."""
        return self.path / "record.json"

    @property
    def gates(self) -> Path:
        """What the stage's gates decided."""
        return self.path / "gates.json"

    @property
    def teachers(self) -> Path:
        """Which checkpoint teaches which domain, and why."""
        return self.path / "teachers.json"

    @property
    def failed(self) -> Path:
        """The last failure; removed when the stage starts again."""
        return self.path / "failed.json"

    @property
    def lock(self) -> Path:
        """Who is running the stage now."""
        return self.path / "lock.json"

    def rollouts(self, step: int) -> Path:
        """The rollouts of one step."""
        return self.path / "rollouts" / f"step_{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The resumable state after `step` steps."""
        return self.checkpoints / f"step_{step:06d}"

    def weights(self, step: int | None = None) -> Path:
        """The Hugging Face folder after `step` steps, or at the end."""
        return self.hf if step is None else self.path / "weights" / f"step_{step:06d}"

    def evaluation(self, label: str) -> Path:
        """Task scores of one checkpoint: `final`, `step_000040` or `init`."""
        return self.path / "evaluation" / f"{label}.jsonl"

    @property
    def evaluation_key(self) -> Path:
        """From which evaluation settings the files of `evaluation/` were made."""
        return self.path / "evaluation_key.json"

    def newest_checkpoint(self) -> int | None:
        """The step from which training would go on."""
        steps = [int(match[1]) for path in self.checkpoints.glob("step_*") if (match := STEP.fullmatch(path.name))]
        return max(steps, default=None)

    def forget_checkpoints(self) -> None:
        """Let the stage train from its start. Renamed first: half a checkpoint must not be taken for a whole one."""
        aside = self.path / ".checkpoints.removed"
        shutil.rmtree(aside, ignore_errors=True)
        if self.checkpoints.is_dir():
            self.checkpoints.rename(aside)
            shutil.rmtree(aside)

    def is_done(self, key: str) -> bool:
        """True when the stage finished under exactly this key."""
        result = self.result()
        return result is not None and result.key == key

    def result(self) -> StageResult | None:
        """The content of record.json, None before the stage is done."""
        content = read_json(self.record)
        if content is None:
            return None
        fields = {field.name for field in dataclasses.fields(StageResult)}
        if not isinstance(content, dict) or set(content) != fields:
            raise UserError(f"{self.record}: not a stage's record; delete the file and the stage is run again")
        return StageResult(**content)

    def finish(self, result: StageResult) -> None:
        """Mark the stage as done. The last thing that its process does."""
        assert result.kind in STAGE_KINDS
        write_json(self.record, dataclasses.asdict(result))


def stage_folder(cascade_folder: Path, stage: str, key: str) -> StageFolder:
    """The folder of one stage under one key."""
    return StageFolder(cascade_folder / f"{stage}-{key[:KEY_IN_NAME]}")


def write_json(path: Path, content: Any) -> None:
    """JSON on disk, complete or absent, with a line per key so that it can be read and compared."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, None when there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error.msg} in line {error.lineno}); delete the file and run again"
        ) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
        yield row
