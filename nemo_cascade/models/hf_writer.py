"""Write the safetensors shards of a Hugging Face folder one tensor at a time, without torch.

All names, dtypes and shapes are known before the first byte, so each shard's table is written first and every tensor
goes straight to its place, in pieces: memory never holds a shard. A finished shard leaves a record of its checksums;
whoever comes after a kill finds it, checks the file against it and goes on behind it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.config.paths import NO_ROOM, sync_folder
from nemo_cascade.models.hf_folder import CHECKSUMS, INDEX, SINGLE, WIDTHS, TensorHeader, file_header, pieces
from nemo_cascade.types import Json, UserError

SHARD_BYTES = 5 * 10**9
_KEY = ".resume.json"


class WriteFailed(UserError, OSError):
    """The file system refused. One line for the user; `errno` for a caller that treats it as any failed write."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno, self.strerror = number, message

    def __str__(self) -> str:
        return str(self.strerror)


def write_failed(error: OSError, folder: Path, what: str) -> WriteFailed:
    """A refusal of the file system while `what` was written, with its remedy."""
    reason = error.strerror or str(error)
    remedy = (
        "free space and run again"
        if error.errno in NO_ROOM
        else "check that the folder exists and its permissions and run again"
    )
    return WriteFailed(error.errno or errno.EIO, f"{folder}: no way to write {what} ({reason}); {remedy}")


@dataclass(frozen=True)
class Planned:
    """One tensor to write; dtype is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


class Shard:
    """One file to write: its table and the place of each tensor behind it.

    Wide dtypes come first, so that every tensor starts at a multiple of its element's width.
    """

    def __init__(self, file: str, tensors: Iterable[Planned]) -> None:
        self.file = file
        self.places: dict[str, tuple[Planned, int]] = {}
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in sorted(tensors, key=lambda tensor: -WIDTHS[tensor.dtype]):
            end = offset + tensor.size
            table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self.places[tensor.name] = (tensor, offset)
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + offset


def plan_shards(tensors: Iterable[Planned], shard_bytes: int) -> list[Shard]:
    """Cut a sequence of tensors into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    if shard_bytes < 1:
        raise UserError(f"shard size {shard_bytes} is below 1 byte")
    groups: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.size
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


class ShardWriter:
    """Fills the planned shards in `folder`, in any order of tensors.

    `source` says what is being written; shards that an earlier writer of the same source and plan finished are kept
    when their bytes still have their checksums. Without it nothing is kept, and no shard waits for the disk.
    """

    def __init__(self, folder: Path, shards: list[Shard], source: str = "") -> None:
        self.folder, self.shards = folder, shards
        self.shard_of = {name: shard for shard in shards for name in shard.places}
        self.checksums: dict[str, str] = {}
        self.missing = {shard.file: set(shard.places) for shard in shards}
        self.streams: dict[str, int] = {}
        self.resumable = bool(source)
        if self.resumable:
            self._take_over(source)
        self._check_room()

    def _take_over(self, source: str) -> None:
        """Adopt what an earlier writer finished; throw the rest away."""
        digest = hashlib.sha256(source.encode())
        for shard in self.shards:
            digest.update(shard.file.encode() + shard.header)
        key, path = digest.hexdigest(), self.folder / _KEY
        same = path.is_file() and path.read_text(encoding="utf-8") == key
        for shard in self.shards if same else ():
            record = self._record(shard)
            if record.is_file() and (found := _finished(self.folder / shard.file, shard)) is not None:
                if json.loads(record.read_text(encoding="utf-8")) == found:
                    self.checksums.update(found)
                    self.missing[shard.file].clear()
        keep = {_KEY} if same else set()
        for shard in self.shards:
            keep |= set() if self.missing[shard.file] else {shard.file, self._record(shard).name}
        for entry in self.folder.iterdir():
            if entry.name not in keep:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _write_synced(path, key)

    def _record(self, shard: Shard) -> Path:
        return self.folder / f".{shard.file}.json"

    def _check_room(self) -> None:
        """Refuse before the first byte where the disk cannot hold what is left to write."""
        needed = sum(shard.size for shard in self.shards if self.missing[shard.file])
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise WriteFailed(
                errno.ENOSPC,
                f"{self.folder.parent}: no room left to write {self.shards[-1].file}: {needed / 1e9:.3f} GB are "
                f"needed, {free / 1e9:.3f} GB are free; free space and run again",
            )

    def wants(self, name: str) -> bool:
        """Whether the tensor must still be written."""
        return name in self.missing[self.shard_of[name].file]

    def write(self, tensor: Planned, data: Iterable[memoryview]) -> None:
        """Put the bytes of one tensor, piece by piece, in their place. UserError where it is not the planned one."""
        shard = self.shard_of.get(tensor.name)
        if shard is None or tensor.name not in self.missing[shard.file]:
            raise UserError(f"{self.folder.parent}: tensor {tensor.name} is not of this model, or comes twice")
        planned, offset = shard.places[tensor.name]
        if planned != tensor:
            raise UserError(
                f"{self.folder.parent}: tensor {tensor.name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"{planned.dtype} of shape {list(planned.shape)} is needed in {shard.file}"
            )
        digest, place = hashlib.sha256(), len(shard.header) + offset
        for piece in data:
            self._put_piece(shard, tensor.name, piece, place)
            digest.update(piece)
            place += piece.nbytes
        assert place == len(shard.header) + offset + planned.size, tensor.name
        self.checksums[tensor.name] = digest.hexdigest()
        self.missing[shard.file].discard(tensor.name)
        if not self.missing[shard.file]:
            self._put_piece(shard, tensor.name, None, 0)

    def _put_piece(self, shard: Shard, name: str, piece: memoryview | None, place: int) -> None:
        """Write a piece of a tensor (None: the shard is full, finish it); a refusal names the tensor and the file."""
        try:
            if piece is None:
                self._finish(shard)
                return
            if shard.file not in self.streams:
                self.streams[shard.file] = os.open(self.folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                _put(self.streams[shard.file], memoryview(shard.header), 0)
            _put(self.streams[shard.file], piece, place)
        except OSError as error:
            raise write_failed(error, self.folder.parent, f"tensor {name} into {shard.file}") from error

    def _finish(self, shard: Shard) -> None:
        stream = self.streams.pop(shard.file)
        try:
            if self.resumable:
                os.fsync(stream)
        finally:
            os.close(stream)
        if not self.resumable:
            return
        record = {name: self.checksums[name] for name in shard.places}
        _write_synced(self._record(shard), json.dumps(record, sort_keys=True))

    def finish(self) -> None:
        """Write index and checksums once every tensor is there, and forget how to resume."""
        absent = sorted(name for names in self.missing.values() for name in names)
        if absent:
            where = self.shard_of[absent[0]].file
            raise UserError(
                f"{self.folder.parent}: {len(absent)} tensors never came, the first is {absent[0]} of {where}"
            )
        if len(self.shards) > 1:
            total = sum(tensor.size for shard in self.shards for tensor, _ in shard.places.values())
            places = sorted((name, shard.file) for name, shard in self.shard_of.items())
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(places)})
        files = {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in self.shards}
        content: dict[str, Json] = {"algorithm": "sha256", "files": files, "tensors": dict(self.checksums)}
        write_json(self.folder / CHECKSUMS, content)

    def forget(self) -> None:
        """Remove the records of a finished export."""
        if self.resumable:
            for path in (self.folder / _KEY, *(self._record(shard) for shard in self.shards)):
                path.unlink()

    def close(self) -> None:
        """Let go of open files."""
        while self.streams:
            os.close(self.streams.popitem()[1])


def write_json(path: Path, content: dict[str, Json]) -> None:
    """One JSON file, indented, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_synced(path: Path, text: str) -> None:
    """A record that is whole or absent after a kill or a power cut."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def _put(stream: int, data: memoryview, offset: int) -> None:
    """Write all of it at `offset`: the system may take less at a time."""
    data = data.cast("B")
    while data:
        written = os.pwrite(stream, data, offset)
        data, offset = data[written:], offset + written


def _finished(file: Path, shard: Shard) -> dict[str, str] | None:
    """The checksums of the tensors in a file, None where it is not the planned one from end to end."""
    if not file.is_file() or file.stat().st_size != shard.size:
        return None
    with file.open("rb") as stream:
        if stream.read(len(shard.header)) != shard.header:
            return None
    return {name: _sha256(header) for name, header in file_header(file).items()}


def _sha256(header: TensorHeader) -> str:
    digest = hashlib.sha256()
    for piece in pieces(header):
        digest.update(piece)
    return digest.hexdigest()
