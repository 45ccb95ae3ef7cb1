"""Training checkpoints that are complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError

from nemo_cascade.learner.ranks import fail_together, gathered
from nemo_cascade.types import UserError

FORMAT = 1
META = "checkpoint.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_folder(folder: Path, what: str, write: Callable[[Path], None]) -> None:
    """Let every rank write into a folder that appears under its name only when all have finished.

    A failure on any rank becomes one UserError on all of them and leaves nothing behind; a folder of the same name
    stays what it was until the new one is whole.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    fail_together(attempt(lambda: _begin(aside), folder, what) if dist.get_rank() == 0 else "")
    problem = attempt(lambda: write(aside), folder, what)
    problems = [text for text in gathered(problem, everyone=True) if text]
    if problems:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(problems[0])
    fail_together(attempt(lambda: _publish(aside, folder), folder, what) if dist.get_rank() == 0 else "")


def save(folder: Path, state: dict[str, Any], meta: dict[str, Any], per_rank: bool = False) -> None:
    """Write this run's training state. Each model-parallel part is written once, by the first rank that holds it.

    `per_rank`: data-parallel ranks hold different parts too (distributed optimizer).
    """
    random_states = gathered(torch.get_rng_state(), everyone=True)
    own = part_name(per_rank)
    parts = gathered(own, everyone=True)

    def write(aside: Path) -> None:
        if parts.index(own) == dist.get_rank():
            _write_tensors(aside / own, state)
        if dist.get_rank() == 0:
            _write_tensors(aside / "random.pt", {"ranks": random_states})
            _write_text(aside / META, json.dumps({"format": FORMAT, "parts": sorted(set(parts)), **meta}, indent=1))

    write_folder(folder, "the training checkpoint", write)


def load(folder: Path, per_rank: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state of this rank's part, meta); sets the random stream. UserError says which file cannot be used and why."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / META}: not a training checkpoint ({error})") from error
    parts = sorted(set(gathered(part_name(per_rank), everyone=True)))
    if meta["format"] != FORMAT or meta["parts"] != parts:
        raise UserError(
            f"{folder}: written in format {meta['format']} as {len(meta['parts'])} model-parallel parts, this run has "
            f"format {FORMAT} and {len(parts)} parts; resume with the layout of the run that wrote it"
        )
    state = _read_tensors(folder / part_name(per_rank))
    random_states = _read_tensors(folder / "random.pt")["ranks"]
    torch.set_rng_state(random_states[dist.get_rank() % len(random_states)])
    return state, meta


def part_name(per_rank: bool = False) -> str:
    """The file of this rank's part: tensor, pipeline and expert coordinates; data-parallel ranks share it unless
    `per_rank`.
    """
    if per_rank:
        return f"rank{dist.get_rank()}.pt"
    tensor = parallel_state.get_tensor_model_parallel_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    return f"tensor{tensor}_pipeline{pipeline}_expert{parallel_state.get_expert_model_parallel_rank()}.pt"


def sync_folder(folder: Path) -> None:
    """Ask the file system to keep the folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def attempt(action: Callable[[], None], folder: Path, what: str) -> str:
    """Run it; a failure of the file system as one line for the user, an empty string when all went well."""
    try:
        action()
    except OSError as error:
        return _explain(error, folder, what)
    except SafetensorError as error:
        return (
            f"{folder}: {what} could not be written: {error}; free space if the disk is full and start again to resume"
        )
    except RuntimeError as error:
        # torch's zip writer wraps the OSError of the file it writes to, or says only that its position is unexpected.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            return _explain(cause, folder, what)
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            return f"{folder}: {what} could not be written, the disk is probably full; free space and start again"
        raise
    return ""


def _explain(error: OSError, folder: Path, what: str) -> str:
    """One line that names the folder and the remedy."""
    if error.errno in NO_ROOM:
        return (
            f"{folder}: no room left to write {what} ({error.strerror}); the previous one is untouched, free space and "
            "start again to resume"
        )
    return f"{folder}: {what} could not be written: {error}"


def _begin(aside: Path) -> None:
    """An empty folder beside the final one; what a killed run left there is thrown away."""
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _publish(aside: Path, folder: Path) -> None:
    """Sync and rename. An older folder of the same name makes room at the last moment."""
    sync_folder(aside)
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        folder.rename(outdated)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(outdated, ignore_errors=True)


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; nothing in the file is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: the checkpoint cannot be read ({reason}); delete its folder to resume from an older one"
        ) from error
    assert isinstance(content, dict)
    return content
