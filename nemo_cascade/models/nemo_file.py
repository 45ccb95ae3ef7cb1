"""A `.nemo` file: a tar with the model's config, its weights as torch saves them, and the tokenizer's files."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_cascade.models.hf_extras import carried
from nemo_cascade.types import UserError

CHECKSUMS = "carried_sha256.json"
"""Names the other carried files with their sha256: a tar has no checksum of what it holds."""
_ID = 33  # of the name NeMo gives an artifact: 32 hexadecimal digits and _ before its own name


def key_of(name: str) -> str:
    """What a carried file is called in `cfg.tokenizer`, where a point would begin another level."""
    return name.replace(".", "_").replace("-", "_")


def named_files(folder: str | Path) -> dict[str, str]:
    """`cfg.tokenizer` of a Hugging Face folder: every file that exports carry."""
    if not Path(folder).is_dir():
        raise UserError(f"tokenizer {folder}: no such folder")
    return {key_of(file.name): str(file.resolve()) for file in carried(Path(folder))}


def keep_files(owner: object, files: Mapping[str, str], find: Callable[[str, str], str]) -> Path | None:
    """Copy the files of a `cfg.tokenizer` under their own names into a folder that lives as long as `owner`.

    `find(key, source)` is NeMo's register_artifact: it gives the path where the source lies now, which for a restored
    model is a temporary one. None without files.
    """
    found = {key: Path(find(key, source)) for key, source in files.items() if key != key_of(CHECKSUMS)}
    if not found:
        return None
    folder = Path(tempfile.mkdtemp(prefix="nemo_cascade-tokenizer-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    digests = {}
    for key, path in found.items():
        name = path.name[_ID:] if files[key].startswith("nemo:") else path.name
        shutil.copyfile(path, folder / name)
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    return folder


def check_nemo_file(path: str | Path) -> None:
    """Read the file to its end: each tensor against the checksum that torch wrote beside it and never looks at, each
    carried file against its own.

    UserError says what is damaged, before anything is loaded.
    """
    found: dict[str, str] = {}
    expected: dict[str, str] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream, name = archive.extractfile(member), Path(member.name).name
                if stream is None:
                    continue
                if name.endswith(".ckpt"):
                    with zipfile.ZipFile(stream) as weights:
                        if (damaged := weights.testzip()) is not None:
                            raise UserError(f"{path}: {damaged} in {name} is damaged; {_REMEDY}")
                elif name[_ID:] == CHECKSUMS:
                    expected = json.loads(stream.read())
                else:
                    found[name[_ID:]] = hashlib.sha256(stream.read()).hexdigest()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError) as error:
        said = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path}: not a .nemo file, damaged or cut short ({said}); {_REMEDY}") from error
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise UserError(f"{path}: {name} is {'damaged' if name in found else 'missing'}; {_REMEDY}")


_REMEDY = "copy or export it again"
