"""The mean of several checkpoints of one model (a model soup), with torch alone: one tensor at a time.

Averaging is a baseline for distillation: experts that start from one SFT checkpoint often lie in one basin, so that the
mean of their weights keeps part of what each has learnt and costs no training. Weights that were trained from
different starts have no such mean, and nothing here can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nemo_cascade.models.hf_copy import (
    STORED,
    Extras,
    identity_of,
    read_parts,
    refuse_quantised,
    write_parts,
    write_resumable,
)
from nemo_cascade.models.hf_folder import Progress, Silent, TensorHeader, read_checked_header, read_config, verify
from nemo_cascade.models.hf_writer import SHARD_BYTES, Planned, ShardWriter
from nemo_cascade.types import UserError


def average_folders(
    sources: Sequence[str | Path],
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> str:
    """Write (w_1 + ... + w_n) / n of every tensor, summed in float64 and rounded once to the dtype of the sources.

    The expert biases are averaged like all else. Returns the content sha256 of the folder. Resumes and cleans up as
    `copy_folder` does. Refuses folders of another architecture, and tensors whose dtypes differ.
    """
    paths, folder, progress = [Path(source) for source in sources], Path(folder), progress or Silent()
    headers = [_checked(paths[0], path) for path in paths]
    for path in paths:
        verify(path, progress)
    plan = [Planned(name, header.dtype, header.shape) for name, header in headers[0].items()]

    def fill(writer: ShardWriter) -> None:
        for name, header in headers[0].items():
            if writer.wants(name):
                parts = _mean([table[name] for table in headers])
                write_parts(writer, name, header.shape, STORED[header.dtype], parts)

    tokenizer = Path(tokenizer_from) if tokenizer_from else paths[0]
    extras = Extras(read_config(paths[0]), tokenizer, shard_bytes, "\n".join(identity_of(path) for path in paths))
    return write_resumable(folder, plan, fill, extras, progress)


def _checked(first: Path, path: Path) -> dict[str, TensorHeader]:
    """The headers of a source, which must hold the same tensors as the first."""
    config, ours = read_config(path), read_config(first)
    differing = [key for key, value in dataclasses.asdict(ours).items() if dataclasses.asdict(config)[key] != value]
    if differing:
        raise UserError(f"{path}: its {differing[0]} is not that of {first}; only checkpoints of one model have a mean")
    headers = read_checked_header(path, config)
    refuse_quantised(headers)
    if first != path:
        for name, header in read_checked_header(first, ours).items():
            if headers[name].dtype != header.dtype:
                raise UserError(
                    f"{path}: tensor {name} is {headers[name].dtype}, in {first} it is {header.dtype}; bring both to "
                    "one dtype first: nemo-cascade convert --dtype"
                )
    return headers


def _mean(headers: Sequence[TensorHeader]) -> Iterator[torch.Tensor]:
    """The elements of the mean in order, a few million at a time."""
    for parts in zip(*(read_parts(header) for header in headers), strict=True):
        added = parts[0].double()
        for part in parts[1:]:
            added += part
        yield added / len(headers)
