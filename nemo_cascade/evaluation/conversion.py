"""Convert a checkpoint: Hugging Face folder <-> `.nemo` file, other names, dtype or shards.

Needs torch; the CLI imports it late.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf

from nemo_cascade.config.paths import NANO_TOKENIZER, explain_os_error
from nemo_cascade.models import hf_average, hf_copy
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import content_sha256, read_config
from nemo_cascade.models.hf_writer import SHARD_BYTES
from nemo_cascade.observe.transfer import TransferLine
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    from nemo_cascade.models.cascade_model import CascadeModel

NEMO = ".nemo"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size_in_bytes(text: str) -> int:
    """`5GB`, `300MB`, `1.5G` as bytes; a thousand to the kilo, as Hugging Face counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size: {text!r} is not a size, write for example 5GB or 300MB")
    return size


def convert(
    source: Path,
    target: Path,
    dtype: str = hf_copy.KEEP,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
) -> str:
    """Hugging Face folder <-> `.nemo` file, or a folder of another name style, dtype or shard size into published form.

    Returns the content sha256 of the written folder, or of the read one where a `.nemo` file was written; both were
    read back and compared. Progress goes to stderr. Folder to folder streams and resumes after a kill, whereas a
    `.nemo` file passes through a model that holds it whole. `tokenizer` is the folder whose tokenizer and code files
    the target carries; by default the source's, or nano's where it has none and the vocabulary is nano's.
    """
    if target.exists():
        raise UserError(f"{target}: already there; give a new path")
    with closing(TransferLine()) as line:
        if source.suffix != NEMO and target.suffix != NEMO:
            return hf_copy.copy_folder(
                source, target, dtype, _tokenizer(tokenizer, source, read_config(source)), shard_bytes, line
            )
        from nemo_cascade.models.cascade_model import CascadeModel
        from nemo_cascade.models.convert import save_folder

        if source.suffix == NEMO:
            if not source.is_file():
                raise UserError(f"{source}: no such file")
            model = CascadeModel.restore_from(str(source))
            carried = _tokenizer(tokenizer, model.tokenizer_folder, model.hf_config)
            return save_folder(model.model, model.hf_config, target, dtype, carried, shard_bytes, line)
        override = {"tokenizer": str(_tokenizer(tokenizer, source, read_config(source)))}
        _save_nemo(CascadeModel.from_hf(source, override=OmegaConf.create(override)), target)
        return content_sha256(source, check=True, progress=line)


def average(
    sources: Sequence[Path], target: Path, shard_bytes: int = SHARD_BYTES, tokenizer: Path | None = None
) -> str:
    """The plain mean of several Hugging Face folders of one model as a new folder; returns its content sha256."""
    if target.exists():
        raise UserError(f"{target}: already there; give a new path")
    for path in (*sources, target):
        if path.suffix == NEMO:
            raise UserError(f"--average: {path} is a .nemo file; Hugging Face folders are averaged, convert it first")
    with closing(TransferLine()) as line:
        carried = _tokenizer(tokenizer, sources[0], read_config(sources[0]))
        return hf_average.average_folders(sources, target, carried, shard_bytes, line)


def _tokenizer(named: Path | None, source: Path | None, config: NemotronHConfig) -> Path | None:
    """The folder to carry tokenizer and code files from; another vocabulary never gets nano's tokenizer."""
    if named is not None and not (named / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {named}: no tokenizer.json there")
    if named is not None or (source is not None and (source / "tokenizer.json").is_file()):
        return named or source
    return NANO_TOKENIZER if config.vocab_size == NemotronHConfig.preset("nano").vocab_size else source


def _save_nemo(model: CascadeModel, target: Path) -> None:
    """Complete or absent: written aside, its weights read back and compared with the model's, renamed."""
    aside = target.with_name(f".{target.stem}.{os.getpid()}.partial{NEMO}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        model.save_to(str(aside))
        if nemo_sha256(aside) != named_sha256(model.state_dict()):
            raise UserError(f"{target}: what was read back is not what was written; check the disk and run again")
        aside.rename(target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    except RuntimeError as error:  # torch's zip writer wraps the error of the file, or says only that a write failed
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise explain_os_error(cause, target) from error
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise UserError(f"{target}: not written, the disk is probably full; free space and run again") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def named_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """`content_sha256` of tensors in memory: over sorted names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{hf_copy.SAFETENSORS_NAMES[tensor.dtype]}\n{list(tensor.shape)}\n".encode())
        digest.update(hf_copy.bytes_of(tensor))
    return digest.hexdigest()


def nemo_sha256(path: Path) -> str:
    """`content_sha256` of the weights inside a `.nemo` file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, tarfile.open(path) as archive:
        member = next(member for member in archive if member.name.endswith("model_weights.ckpt"))
        archive.extract(member, folder, filter="data")
        stored = torch.load(Path(folder) / member.name, map_location="cpu", mmap=True, weights_only=True)
        return named_sha256(stored)
