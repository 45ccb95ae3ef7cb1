"""Folders that all ranks write together and that are complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from nemo_cascade.config.paths import NO_ROOM, sync_folder
from nemo_cascade.learner.ranks import fail_together, gathered
from nemo_cascade.types import UserError

T = TypeVar("T")


def write_folder(
    folder: Path,
    what: str,
    write: Callable[[Path], T],
    complete: Callable[[Path, list[T]], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Let every rank write into a folder that appears under its name only when all have finished.

    The first rank then gets what all `write` calls returned and writes what `complete` adds. A failure on any rank
    becomes one UserError on all of them and leaves nothing behind; a folder of the same name stays what it was until
    the new one is whole. `group`: all ranks (default: the world); a group of its own lets another thread do this.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    first = dist.get_rank() == 0
    fail_together(attempt(lambda: _begin(aside), folder, what) if first else "", group)
    written: list[T] = []
    problem = attempt(lambda: written.append(write(aside)), folder, what)
    answers = gathered((problem, written), everyone=True, group=group)
    problems = [text for text, _ in answers if text]
    if not problems:

        def publish() -> None:
            if complete is not None:
                complete(aside, [result for _, results in answers for result in results])
            _publish(aside, folder)

        problems = [text for text in gathered(attempt(publish, folder, what) if first else "", True, group) if text]
    if problems:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(problems[0])


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
