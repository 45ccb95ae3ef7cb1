"""A look at a checkpoint on disk before anything of it is used: are all files there, whole, and of this model?"""

from __future__ import annotations

import io
import pickle
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


def check_stored(folder: Path, wanted: Iterable[ShardedTensor]) -> str:
    """One line on what keeps this rank from loading the `wanted` tensors, empty when nothing does."""
    try:
        index = read_index(folder)
    except UserError as error:
        return str(error)
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
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"{path}: this file of the checkpoint is missing; {REMEDY}"
        if path.stat().st_size < end:
            return f"{path}: the checkpoint is cut short, {path.stat().st_size} of {end} bytes are there; {REMEDY}"
    return ""


def first_broken(folder: Path) -> str:
    """One line that names the first tensor that cannot be read, with its file; empty when all can."""
    for index, place in read_index(folder).storage_data.items():
        path = folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"{path}: tensor {index.fqn} cannot be read ({reason}); {REMEDY}"
    return ""
