"""A real cascade at the smallest size: the shipped base and judge, trained, judged and distilled by real processes.

`Cascade.run` starts the command line as a user would; `Outcome` is everything a stage computed, clocks left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("seconds", "tokens_per_second")
SAMPLING = "record_every: 1\nsampling: {max_new_tokens: 32, max_prompt_tokens: 160, max_total_tokens: 320}\n"

STAGES = {
    "sft": "kind: sft\ninit: base\nnum_steps: 2\nsave_every: 1\ntokens_per_step: 2048\nmax_sequence_tokens: 320\n"
    "data: {domains: {instruction_following: 1, code: 1, preference: 1, swe_agentic: 1}, flaw_rate: 0.35}\n"
    "optimizer: {lr: 3.0e-4}\n",
    "rl": "kind: grpo\ninit: sft\nnum_steps: 3\nsave_every: 1\nprompts_per_step: 8\ngroup_size: 4\n" + SAMPLING +
    "data: {domains: {instruction_following: 1, code: 1, preference: 1, swe_agentic: 1}}\n"
    "filters: {dynamic: true, max_refills: 20}\nloss: {kl: 0.03}\noptimizer: {lr: 1.0e-3}\n",
    "mopd": "kind: mopd\ninit: rl\nnum_steps: 2\nsave_every: 1\nprompts_per_step: 4\ngroup_size: 1\n" + SAMPLING +
    "data: {domains: {instruction_following: 1, code: 1}}\nteachers: {candidates: [sft, rl]}\n"
    "optimizer: {lr: 1.0e-3}\n",
}  # fmt: skip

HEAD = (
    "name: real\nmodel: nano\nbase: hf:nano\nhardware: cpu\nstages: [sft, rl, mopd]\njudge: {serve: hf:nano_judge}\n"
    "evaluation: {select: 4, report: 4, domains: [instruction_following, code], max_new_tokens: 32}\n"
)


@dataclass(frozen=True)
class Outcome:
    """What a stage computed: the hash of its weights, and the rest of its folder without clocks and process ids."""

    sha256: str
    metrics: tuple[str, ...]
    rollouts: tuple[str, ...]
    evaluation: tuple[tuple[str, str], ...]


class Cascade:
    """A cascade file of its own in `folder`, its output beside it."""

    def __init__(self, folder: Path, head: str = HEAD, stages: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "runs"
        for name, text in (STAGES if stages is None else stages).items():
            (folder / f"{name}.yaml").write_text(text)
        self.path = folder / "cascade.yaml"
        self.path.write_text(head + f"output: {self.output}\n")
        self.folder = self.output / "real"

    def command(self, *words: str) -> list[str]:
        """The command line; `words` after `run` and the cascade."""
        return [sys.executable, "-m", "nemo_cascade.cli", "run", str(self.path), *words]

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run to its end with these environment variables added."""
        return subprocess.run(
            self.command(*words), cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=1200
        )

    def stage(self, name: str) -> StageFolder:
        """A stage's folder as the last run named it."""
        return read_manifest(self.folder).folders[name]

    def outcome(self, name: str) -> Outcome:
        """What a finished stage computed."""
        folder = self.stage(name)
        result = folder.result()
        assert result is not None, f"{name} is not done"
        return Outcome(
            result.sha256,
            tuple(_without_clocks(line) for line in folder.metrics.read_text().splitlines()),
            tuple(
                f"{path.name} {_without_clocks(line)}"
                for path in sorted((folder.path / "rollouts").glob("*.jsonl"))
                for line in path.read_text().splitlines()
            ),
            tuple((path.name, digest(path)) for path in sorted(folder.evaluation("final").parent.glob("*.jsonl"))),
        )


def environment(**variables: str) -> dict[str, str]:
    """This process's variables, the package importable, and `variables`."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **variables}


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_clocks(line: str) -> str:
    row = json.loads(line)
    kept = {key: value for key, value in row.items() if not any(clock in key for clock in CLOCKS)}
    return json.dumps(kept, sort_keys=True)
