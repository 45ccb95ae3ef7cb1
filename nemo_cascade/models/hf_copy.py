"""Rewrite Hugging Face folders with torch alone: one tensor at a time, in another dtype, other shards or other names.

`write_folder` is also what exports of the policy end in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from nemo_cascade.config.paths import sync_folder
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import export_dtype, kind_of
from nemo_cascade.models.hf_extras import write_extras
from nemo_cascade.models.hf_folder import (
    PIECE,
    Progress,
    Silent,
    TensorHeader,
    content_sha256,
    pieces,
    read_checked_header,
    read_config,
    verify,
    weight_files,
)
from nemo_cascade.models.hf_writer import SHARD_BYTES, Planned, ShardWriter, plan_shards, write_failed
from nemo_cascade.types import UserError

KEEP = "keep"
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' dtypes that a weight may have. FP8 is not one: its scales would be lost."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in STORED.items()}


def read_tensor(header: TensorHeader) -> torch.Tensor:
    """One tensor of a safetensors file, read into memory of its own."""
    tensor = torch.empty(header.shape, dtype=STORED[header.dtype])
    flat, done = tensor.reshape(-1), 0
    for part in read_parts(header):
        flat[done : done + part.numel()] = part
        done += part.numel()
    return tensor


def read_parts(header: TensorHeader) -> Iterator[torch.Tensor]:
    """The elements of a tensor in order, a few million at a time, as vectors."""
    for piece in pieces(header):
        yield torch.frombuffer(bytearray(piece), dtype=STORED[header.dtype])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def stored_dtype(name: str, dtype: torch.dtype, dtype_policy: str) -> torch.dtype:
    """fp32 stores all in fp32, bf16 only what models/dtypes.py keeps wide, keep changes nothing."""
    if dtype_policy == KEEP:
        return dtype
    stored: torch.dtype = getattr(torch, export_dtype(kind_of(name), dtype_policy))
    return stored


def refuse_quantised(headers: dict[str, TensorHeader]) -> None:
    """Refuse a dtype that no weight may have."""
    for name, header in headers.items():
        if header.dtype not in STORED:
            raise UserError(
                f"{header.file}: tensor {name} is stored as {header.dtype}, {', '.join(STORED)} can be read; "
                "quantised checkpoints must be exported in bf16 first"
            )


def stored(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a Hugging Face folder under published names, in the model's order, one at a time."""
    headers = read_checked_header(folder, read_config(folder))
    refuse_quantised(headers)
    for name, header in headers.items():
        yield name, read_tensor(header)


def copy_folder(
    source: str | Path,
    folder: str | Path,
    dtype_policy: str = KEEP,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> str:
    """Rewrite a Hugging Face folder under published names, perhaps in another dtype or other shards.

    Returns its content sha256. Resumable: after a kill the same call keeps every finished shard that still has its
    checksums. After an error nothing is left behind.
    """
    source, folder, progress = Path(source), Path(folder), progress or Silent()
    config = read_config(source)
    headers = read_checked_header(source, config)
    refuse_quantised(headers)
    verify(source, progress)
    plan = [
        Planned(name, SAFETENSORS_NAMES[stored_dtype(name, STORED[header.dtype], dtype_policy)], header.shape)
        for name, header in headers.items()
    ]

    def fill(writer: ShardWriter) -> None:
        for name, header in headers.items():
            if writer.wants(name):
                dtype = stored_dtype(name, STORED[header.dtype], dtype_policy)
                write_parts(writer, name, header.shape, dtype, read_parts(header))

    extras = Extras(config, Path(tokenizer_from) if tokenizer_from else source, shard_bytes, identity_of(source))
    return write_resumable(folder, plan, fill, extras, progress)


def write_resumable(
    folder: Path, plan: list[Planned], fill: Callable[[ShardWriter], None], extras: Extras, progress: Progress
) -> str:
    """`write_folder` by this process alone: what a kill leaves is gone on with, what an error leaves is removed."""
    aside = folder.with_name(f".{folder.name}.partial")
    with only_writer(aside, folder):
        try:
            return write_folder(folder, aside, plan, fill, extras, progress)
        except (OSError, UserError):
            shutil.rmtree(aside, ignore_errors=True)
            raise


def identity_of(folder: Path) -> str:
    """What tells whether a folder is still the one that an interrupted copy read: names, sizes and times."""
    files = [folder / "config.json", *weight_files(folder)]
    return "\n".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


@contextlib.contextmanager
def only_writer(aside: Path, folder: Path) -> Iterator[None]:
    """One conversion per target at a time; the lock goes with the process, however it ends."""
    lock = aside.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise write_failed(error, folder.parent, folder.name) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is writing it; wait for it or stop it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What an export needs beside its tensors. `identity` of the source makes it resumable."""

    config: NemotronHConfig
    tokenizer: Path | None
    shard_bytes: int
    identity: str = ""


def write_tensor(writer: ShardWriter, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Put one tensor, on whatever device, in its place on disk; its dtype changes on the way, a piece at a time."""
    parts = tensor.detach().reshape(-1).split(PIECE // 8)
    write_parts(writer, name, tuple(tensor.shape), dtype, iter(parts))


def write_parts(
    writer: ShardWriter, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterator[torch.Tensor]
) -> None:
    """The same for a tensor that comes as vectors in the order of its elements."""
    data = (bytes_of(part.to("cpu", dtype)) for part in parts)
    writer.write(Planned(name, SAFETENSORS_NAMES[dtype], shape), data)


class _Counting(ShardWriter):
    """Tells the progress of every tensor written."""

    progress: Progress = Silent()

    def write(self, tensor: Planned, data: Iterable[memoryview]) -> None:
        """Write and count."""
        super().write(tensor, data)
        self.progress.advance(tensor.size)


def write_folder(
    folder: Path,
    aside: Path,
    plan: list[Planned],
    fill: Callable[[ShardWriter], None],
    extras: Extras,
    progress: Progress,
) -> str:
    """Fill `aside`, read it back against the checksums of what was sent, and rename it over `folder`."""
    try:
        aside.mkdir(parents=True, exist_ok=True)
        writer = _Counting(aside, plan_shards(plan, extras.shard_bytes), extras.identity)
        writer.progress = progress
        left = [tensor for tensor in plan if writer.wants(tensor.name)]
        progress.begin("writing", len(left), sum(tensor.size for tensor in left))
        try:
            fill(writer)
            writer.finish()
        finally:
            writer.close()
        wide = all(tensor.dtype == "F32" for tensor in plan)
        write_extras(extras.config, aside, "float32" if wide else "bfloat16", extras.tokenizer)
        sha256 = content_sha256(aside, check=True, progress=progress)
        writer.forget()
        _sync(aside)
        _replace(aside, folder)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise write_failed(error, folder.parent, folder.name) from error
    return sha256


def _sync(folder: Path) -> None:
    """Everything in the folder is on the disk before the rename shows it."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(aside: Path, folder: Path) -> None:
    """Put the new folder in place of the old one; a reader sees one or the other."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
