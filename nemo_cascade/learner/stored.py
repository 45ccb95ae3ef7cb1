"""A look at a checkpoint on disk before anything of it is used: are all files there, whole, and of this model?"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_cascade.types import UserError

INDEX = ".metadata"  # torch's name for what lies where
REMEDY = "delete the checkpoint's folder to resume from an older one"
# All that torch 2.13 puts into an index. A pickle may name anything else, and loading it would run it.
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index and refuses a pickle of anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The classes of `KNOWN`, torch's dtypes and sizes."""
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or found is torch.Size:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_index(folder: Path) -> Metadata:
    """What lies where in the checkpoint."""
    path = folder / INDEX
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except (OSError, EOFError, ValueError, TypeError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the checkpoint's index cannot be read ({error or 'cut short'}); {REMEDY}") from error
    if not isinstance(index, Metadata):
        raise UserError(f"{path}: not the index of a checkpoint; {REMEDY}")
    return index


def check_names(folder: Path, index: Metadata, wanted: Iterable[ShardedTensor]) -> str:
    """One line on the first of the `wanted` tensors that the checkpoint cannot give, empty when it has them all."""
    for entry in wanted:
        stored = index.state_dict_metadata.get(entry.key)
        if not isinstance(stored, TensorStorageMetadata):
            return (
                f"{folder / INDEX}: tensor {entry.key} is not in the checkpoint; resume with the model, precision and "
                "trained parameters of the run that wrote it, or start the stage afresh"
            )
        if tuple(stored.size) != tuple(entry.global_shape):
            return (
                f"{folder / INDEX}: tensor {entry.key} has shape {list(stored.size)}, this run's model needs "
                f"{list(entry.global_shape)}; start the stage afresh"
            )
    return ""


def check_files(folder: Path, index: Metadata, rank: int, ranks: int) -> str:
    """One line on the first missing, cut or altered file, empty when all are whole.

    Every tensor is a zip archive with a checksum that torch writes and does not look at. It is read here, each file by
    one of the ranks: a flipped bit in a weight would otherwise train on unseen.
    """
    tensors: dict[str, list[tuple[int, int, str]]] = {}
    for key, place in index.storage_data.items():
        tensors.setdefault(place.relative_path, []).append((place.offset, place.length, key.fqn))
    for number, (name, places) in enumerate(sorted(tensors.items())):
        path, end = folder / name, max(offset + length for offset, length, _ in places)
        if not path.is_file():
            return f"{path}: this file of the checkpoint is missing; {REMEDY}"
        if path.stat().st_size < end:
            return f"{path}: the checkpoint is cut short, {path.stat().st_size} of {end} bytes are there; {REMEDY}"
        if number % ranks == rank and (broken := _first_altered(path, places)):
            return f"{path}: tensor {broken} is not what was written (checksum); {REMEDY}"
    return ""


def _first_altered(path: Path, places: list[tuple[int, int, str]]) -> str:
    """The name of the first tensor whose bytes are not those that were written."""
    with path.open("rb") as file:
        for offset, length, name in sorted(places):
            file.seek(offset)
            try:
                broken = zipfile.ZipFile(io.BytesIO(file.read(length))).testzip()
            except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError):  # depends on which byte
                return name
            if broken is not None:
                return name
    return ""
