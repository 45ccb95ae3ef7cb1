"""Read a Hugging Face model folder without torch: its config, its tensor headers and the hash of its content."""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Json, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: byte offsets `begin` and `end` in `file`; dtype is safetensors' name (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


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


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of the folder in a fixed order: those of the index, or the single file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{folder / INDEX}: key weight_map is missing")
        files = [folder / name for name in sorted({str(name) for name in names.values()})]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder}: {file.name} is missing, this is not a complete Hugging Face folder")
    return files


def read_header(folder: str | Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor, read from the first bytes of each file."""
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if 0 < length <= size - 8 else b""
        try:
            entries = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{file}: not a safetensors file, or cut short; copy or export it again") from error
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if end > size:
                raise UserError(f"{file}: cut short, {name} ends at byte {end} of {size}; copy or export it again")
            if name in headers:
                raise UserError(f"{file}: tensor {name} is also in {headers[name].file.name}")
            headers[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), file, begin, end)
    return headers


def content_sha256(folder: str | Path) -> str:
    """The hash that names a checkpoint: over sorted tensor names, dtypes, shapes and bytes.

    Not over files: the same tensors in one file or in ten give the same hash, whatever tokenizer lies beside them.
    """
    digest = hashlib.sha256()
    headers = read_header(folder)
    maps: dict[Path, mmap.mmap] = {}
    try:
        for name in sorted(headers):
            header = headers[name]
            digest.update(f"{name}\n{header.dtype}\n{list(header.shape)}\n".encode())
            if header.end == header.begin:
                continue
            if header.file not in maps:
                with header.file.open("rb") as stream:
                    maps[header.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            with memoryview(maps[header.file]) as whole, whole[header.begin : header.end] as part:
                digest.update(part)
    finally:
        for mapped in maps.values():
            mapped.close()
    return digest.hexdigest()
