"""Where configuration lives and how files are written so that a crash never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from nemo_cascade.types import UserError

PACKAGE = Path(__file__).resolve().parent.parent
NANO = PACKAGE / "models" / "nano"
NANO_TOKENIZER = NANO / "tokenizer"
PACKAGED = {"nano": NANO / "base", "nano_judge": NANO / "judge"}
"""Short names after `hf:` that mean a folder of the package."""


def conf_dir() -> Path:
    """The folder with cascade/, stage/, model/ and hardware/: the checkout's own, else the installed copy."""
    checkout = PACKAGE.parent / "conf"
    return checkout if (checkout / "cascade").is_dir() else PACKAGE / "conf"


def hf_folder(reference: str) -> Path:
    """The Hugging Face folder behind `hf:nano`, `hf:nano_judge` or `hf:PATH` (relative to the working folder)."""
    name = reference.removeprefix("hf:")
    return PACKAGED.get(name, Path(name).expanduser())


def tokenizer_folder(folder: Path | None, vocab_size: int) -> Path:
    """The folder whose tokenizer belongs to the weights in `folder`: itself, or the nano tokenizer for weights without.

    The nano tokenizer fits a checkpoint of exactly its vocabulary; another one was trained on other tokens. Weights
    from no folder (None: a random draw) have seen none, so there any vocabulary will do that has room for it.
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        return folder
    size = _nano_vocabulary()
    if vocab_size == size or (folder is None and vocab_size > size):
        return NANO_TOKENIZER
    where = "random weights" if folder is None else str(folder)
    raise UserError(
        f"{where}: no tokenizer.json, and the nano tokenizer has {size} tokens where the model has {vocab_size}; "
        "put the tokenizer of the model into a Hugging Face folder with its weights"
    )


@lru_cache
def _nano_vocabulary() -> int:
    content = json.loads((NANO_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    return len({*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])})


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write a file completely or not at all: aside, synced, renamed.

    A full disk is the user's to repair, so it becomes one line that names the folder; the old content stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # nothing to remove where the folder itself could not be made
            aside.unlink()
        raise explain_os_error(error, path) from error


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or the user's quota, or the limit on a file's size (ulimit -f)."""


def explain_os_error(error: OSError, path: Path) -> UserError:
    """An operating system's refusal as one line with its remedy."""
    if error.errno in NO_ROOM:
        return UserError(
            f"{path.parent}: no space left while writing {path.name} ({os.strerror(error.errno)}); free space and run "
            "again, finished work is kept"
        )
    return UserError(
        f"{path}: cannot be written ({os.strerror(error.errno or 0)}); check the folder and its permissions"
    )
