"""Read a Hugging Face model folder without torch: its config, its tensor headers, its bytes and their checksums.

Bytes are read in pieces and never mapped, so that memory stays bounded however large a shard is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Json, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "checksums.json"
WIDTHS = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""
PIECE = 4 * 1024**2  # bytes read at a time; a reader holds up to three pieces beside its tensor


class Progress(Protocol):
    """Who is told how a transfer goes."""

    def begin(self, what: str, tensors: int, size: int) -> None:
        """A phase of so many tensors and bytes starts."""

    def advance(self, size: int) -> None:
        """One more tensor of `size` bytes is through."""


class Silent:
    """Nobody is told."""

    def begin(self, what: str, tensors: int, size: int) -> None:
        """Nothing."""

    def advance(self, size: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: byte offsets `begin` and `end` in `file`; dtype is safetensors' name (F32, BF16, ...).

    `stored_as` is the name in the file where that differs: `model.` prefix, experts stacked in one tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    stored_as: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


def read_json(path: Path) -> dict[str, Json]:
    """A JSON object from a file of the folder; one line says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: {path.name} is missing, this is not a complete Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed")
    return content


def read_config(folder: str | Path) -> NemotronHConfig:
    """The architecture of the checkpoint in `folder`."""
    path = Path(folder) / "config.json"
    return NemotronHConfig.from_hf_json(read_json(path), str(path))


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of the index; None for a folder of one file."""
    if not (folder / INDEX).is_file():
        return None
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{folder / INDEX}: key weight_map is missing")
    return {name: str(file) for name, file in names.items()}


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of the folder in a fixed order: those of the index, or the single file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = _weight_map(folder)
    files = [folder / SINGLE] if names is None else [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder}: {file.name} is missing, this is not a complete Hugging Face folder")
    return files


def read_header(folder: str | Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor as stored, read from the first bytes of each file and compared with the index."""
    folder = Path(folder)
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for name, header in file_header(file).items():
            if name in headers:
                raise UserError(f"{file}: tensor {name} is also in {headers[name].file.name}")
            headers[name] = header
    for name, expected in (_weight_map(folder) or {}).items():
        if name not in headers or headers[name].file.name != expected:
            raise UserError(f"{folder / expected}: tensor {name} is missing, {INDEX} says that it is there")
    return headers


def raw_header(file: Path) -> bytes:
    """The first bytes of a safetensors file: the length of its table and the table."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        return first + (stream.read(length) if 0 < length <= size - 8 else b"")


def file_header(file: Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor of one file; a file cut short or damaged is one line that names it."""
    size, raw = file.stat().st_size, raw_header(file)
    headers: dict[str, TensorHeader] = {}
    try:
        entries = json.loads(raw[8:])
    except ValueError as error:
        raise UserError(f"{file}: not a safetensors file, or cut short; copy or export it again") from error
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if name == "__metadata__":
            continue
        try:
            begin, end = (len(raw) + int(offset) for offset in entry["data_offsets"])
            header = TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])), file, begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: the entry of tensor {name} is damaged; copy or export it again") from error
        if end > size:
            raise UserError(f"{file}: cut short, {name} ends at byte {end} of {size}; copy or export it again")
        wanted = math.prod(header.shape) * WIDTHS.get(header.dtype, 0)
        if header.dtype not in WIDTHS or header.size != wanted:
            raise UserError(
                f"{file}: the entry of tensor {name} is damaged: {header.size} bytes for shape {list(header.shape)} "
                f"of {header.dtype}; copy or export it again"
            )
        headers[name] = header
    return headers


def published(headers: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The same tensors under published names: `model.` becomes `backbone.`, stacked experts are taken apart."""
    found: dict[str, TensorHeader] = {}
    for stored_as, header in headers.items():
        for name, part in _published(stored_as, header):
            if name in found:
                raise UserError(f"{header.file}: tensor {stored_as} gives {name} a second time")
            found[name] = replace(part, stored_as=stored_as)
    return found


def _published(name: str, header: TensorHeader) -> Iterator[tuple[str, TensorHeader]]:
    if name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    stem, _, last = name.rpartition(".")
    if not (stem.endswith("mixer.experts") and last in ("up_proj", "down_proj") and header.shape):
        yield name, header
        return
    size = header.size // max(header.shape[0], 1)
    for expert in range(header.shape[0]):
        begin = header.begin + expert * size
        part = replace(header, shape=header.shape[1:], begin=begin, end=begin + size)
        yield f"{stem}.{expert}.{last}.weight", part


def read_checked_header(folder: str | Path, config: NemotronHConfig) -> dict[str, TensorHeader]:
    """The headers under published names, in the model's order; one tensor too few, too many or bent is a UserError."""
    folder = Path(folder)
    try:
        return _of_model(folder, published(read_header(folder)), config.tensor_shapes())
    except UserError as error:
        if damaged := _damaged_header(folder):
            raise UserError(f"{error}; moreover {damaged}") from error
        raise


def _of_model(
    folder: Path, headers: dict[str, TensorHeader], wanted: dict[str, tuple[int, ...]]
) -> dict[str, TensorHeader]:
    for name, header in headers.items():
        if name not in wanted:
            raise UserError(
                f"{folder}: tensor {header.stored_as} in {header.file.name} does not belong to this model; "
                "check its config.json"
            )
        if header.shape != wanted[name]:
            raise UserError(
                f"{folder}: tensor {name} has shape {list(header.shape)}, the model needs {list(wanted[name])} "
                f"({header.file.name}); use the model config of the checkpoint's own config.json"
            )
    if absent := [name for name in wanted if name not in headers]:
        files = sorted({header.file.name for header in headers.values()})
        where = files[0] if len(files) == 1 else f"any of {len(files)} files"
        raise UserError(
            f"{folder}: {len(absent)} tensors are missing, the first is {absent[0]}, which is not in {where}; "
            "export the checkpoint again"
        )
    return {name: headers[name] for name in wanted}


def pieces(header: TensorHeader) -> Iterator[bytes]:
    """The bytes of a tensor, at most PIECE of them at a time."""
    with header.file.open("rb") as stream:
        stream.seek(header.begin)
        left = header.size
        while left:
            piece = stream.read(min(left, PIECE))
            if not piece:
                raise UserError(f"{header.file}: cut short inside tensor {header.stored_as}; copy or export it again")
            left -= len(piece)
            yield piece


def read_checksums(folder: str | Path) -> dict[str, Json] | None:
    """The checksums that our exports carry; None for a folder from elsewhere."""
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content.get("files"), dict) or not isinstance(content.get("tensors"), dict):
        raise UserError(f"{path}: damaged, keys files and tensors are needed; copy or export the folder again")
    return content


def _damaged_header(folder: Path) -> str:
    """Which file does not begin as it was written, or an empty string; a file that is gone is told elsewhere."""
    with contextlib.suppress(UserError):
        recorded = read_checksums(folder)
        expected: dict[str, Json] = recorded["files"] if recorded else {}  # type: ignore[assignment]
        for file in weight_files(folder) if recorded else ():
            if hashlib.sha256(raw_header(file)).hexdigest() != expected.get(file.name):
                return f"the header of {file} is not the one that {CHECKSUMS} records: {_REPAIR}"
    return ""


_REPAIR = f"the file is damaged or was changed; copy or export it again (or remove {CHECKSUMS} if you changed it)"


def verify(folder: str | Path, progress: Progress | None = None) -> bool:
    """Compare every header and every tensor with checksums.json; False where the folder carries none.

    UserError names the first damaged tensor and its file.
    """
    folder, progress = Path(folder), progress or Silent()
    if read_checksums(folder) is None:
        return False
    headers, recorded = read_header(folder), _recorded(folder)
    progress.begin("checking", len(headers), sum(header.size for header in headers.values()))
    for name, header in headers.items():
        own = hashlib.sha256()
        for piece in pieces(replace(header, stored_as=name)):
            own.update(piece)
        _compare(name, header, own.hexdigest(), recorded)
        progress.advance(header.size)
    return True


def _recorded(folder: Path) -> dict[str, Json]:
    """Tensor name -> checksum of checksums.json, once the headers are known to be those that it records."""
    if damaged := _damaged_header(folder):
        raise UserError(damaged)
    return (read_checksums(folder) or {})["tensors"]  # type: ignore[return-value]


def _compare(name: str, header: TensorHeader, found: str, recorded: dict[str, Json]) -> None:
    if found != recorded.get(name):
        raise UserError(f"{header.file}: tensor {name} is not the one that {CHECKSUMS} records: {_REPAIR}")


def content_sha256(folder: str | Path, check: bool = False, progress: Progress | None = None) -> str:
    """The hash that names a checkpoint: over sorted tensor names, dtypes, shapes and bytes.

    Not over files: the same tensors in one file or in ten give the same hash, whatever tokenizer lies beside them.
    With `check`, the same pass compares each tensor with checksums.json where there is one.
    """
    folder, progress = Path(folder), progress or Silent()
    headers = read_header(folder)
    recorded = _recorded(folder) if check and read_checksums(folder) else None
    progress.begin("checking", len(headers), sum(header.size for header in headers.values()))
    digest = hashlib.sha256()
    for name in sorted(headers):
        header, own = headers[name], hashlib.sha256()
        digest.update(f"{name}\n{header.dtype}\n{list(header.shape)}\n".encode())
        for piece in pieces(replace(header, stored_as=name)):
            digest.update(piece)
            if recorded is not None:
                own.update(piece)
        if recorded is not None:
            _compare(name, header, own.hexdigest(), recorded)
        progress.advance(header.size)
    return digest.hexdigest()
