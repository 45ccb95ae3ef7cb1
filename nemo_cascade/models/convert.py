"""To and from Hugging Face: export the policy under published names, load a folder, write a folder that others load.

Two name styles exist: published checkpoints (`backbone.` and one tensor per expert), which we write, and what recent
transformers saves (`model.` and experts stacked in one tensor), which we also read. Both ways go one tensor at a time.
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
import torch.distributed as dist

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_extras import write_extras
from nemo_cascade.models.hf_folder import (
    Progress,
    Silent,
    TensorHeader,
    content_sha256,
    read_checked_header,
    read_config,
    verify,
    weight_files,
)
from nemo_cascade.models.hf_writer import SHARD_BYTES, Planned, ShardWriter, plan_shards, write_failed
from nemo_cascade.models.names import dtypes, slots
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import UserError

DTYPE_POLICIES = ("fp32", "bf16")
KEEP = "keep"
# kept fp32 in a bf16 export: routing decides on small differences, and the decay is exp of exp
_FP32_ENDINGS = ("gate.weight", "e_score_correction_bias", "A_log", "mixer.D", "dt_bias")
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' dtypes that a weight may have. FP8 is not one: its scales would be lost."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in STORED.items()}
# fields that no shape shows but that change what the model computes
_SEMANTICS = (
    "hybrid_override_pattern", "num_attention_heads", "num_key_value_heads", "head_dim", "mamba_num_heads",
    "mamba_head_dim", "ssm_state_size", "n_groups", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob",
    "n_group", "topk_group", "layer_norm_epsilon",
)  # fmt: skip


def export_weights(model: NemotronH, config: NemotronHConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the policy under its published name, one at a time, as copies in the dtype of the parameter.

    Collective: every rank must run it to the end; every rank gets every whole tensor.
    """
    stored = dtypes(model, config)
    for name, slot in slots(model, config):
        yield name, dataclasses.replace(slot, dtype=stored[name]).read()


def import_weights(model: NemotronH, config: NemotronHConfig, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a checkpoint into the policy; each rank takes its part. Both name styles, any order, all tensors needed.

    UserError names an unknown, repeated or missing tensor, or one of a wrong shape with both shapes and the remedy.
    """
    table = dict(slots(model, config))
    missing = set(table)
    for published, tensor in named:
        for name, part in _canonical(published, tensor):
            if name not in table:
                raise UserError(
                    f"tensor {published} does not belong to this model; check config.json against the weights"
                )
            found, wanted = tuple(part.shape), table[name].shape
            if found != wanted:
                raise UserError(
                    f"tensor {name} has shape {list(found)}, the model needs {list(wanted)}; use the model config of "
                    "the checkpoint's own config.json"
                )
            if name not in missing:
                raise UserError(f"tensor {name} is given twice")
            missing.discard(name)
            table[name].write(part)
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing, the first is {min(missing)}; the checkpoint is incomplete"
        )


def _canonical(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor under published names: `model.` becomes `backbone.`, stacked experts are taken apart."""
    if name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    stem, _, last = name.rpartition(".")
    if stem.endswith("mixer.experts") and last in ("up_proj", "down_proj"):
        for expert, part in enumerate(tensor):
            yield f"{stem}.{expert}.{last}.weight", part
    else:
        yield name, tensor


def load_folder(model: NemotronH, folder: str | Path) -> None:
    """Fill the policy from a Hugging Face folder, one tensor at a time.

    Config, names, shapes and, where the folder has them, checksums are checked before the first tensor is copied: a bad
    folder changes nothing.
    """
    folder = Path(folder)
    headers = read_checked_header(folder, model.hf_config)
    _check_config(folder, model.hf_config)
    _check_dtypes(headers)
    verify(folder)
    import_weights(model, model.hf_config, ((name, read_tensor(header)) for name, header in headers.items()))


def stored(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a Hugging Face folder under published names, in the model's order, one at a time."""
    headers = read_checked_header(folder, read_config(folder))
    _check_dtypes(headers)
    for name, header in headers.items():
        yield name, read_tensor(header)


def _check_config(folder: Path, config: NemotronHConfig) -> None:
    """Refuse weights that fit by shape but were trained to be computed with another router scale, eps or head split."""
    if not (folder / "config.json").is_file():
        return
    found = read_config(folder)
    for key in _SEMANTICS:
        if getattr(found, key) != getattr(config, key):
            raise UserError(
                f"{folder / 'config.json'}: {key} is {getattr(found, key)}, this run's model has "
                f"{getattr(config, key)}; use the model config of the checkpoint"
            )


def _check_dtypes(headers: dict[str, TensorHeader]) -> None:
    for name, header in headers.items():
        if header.dtype not in STORED:
            raise UserError(
                f"{header.file}: tensor {name} is stored as {header.dtype}, {', '.join(STORED)} can be read; "
                "quantised checkpoints must be exported in bf16 first"
            )


def read_tensor(header: TensorHeader) -> torch.Tensor:
    """One tensor of a safetensors file, read into memory of its own."""
    tensor = torch.empty(header.shape, dtype=STORED[header.dtype])
    with header.file.open("rb") as stream:
        stream.seek(header.begin)
        view = bytes_of(tensor)
        while view:
            count = stream.readinto(view)
            if not count:
                raise UserError(f"{header.file}: cut short inside tensor {header.stored_as}; copy or export it again")
            view = view[count:]
    return tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def as_policy(name: str, tensor: torch.Tensor, dtype_policy: str) -> torch.Tensor:
    """The tensor in the dtype in which an export stores it; see `stored_dtype`."""
    return tensor.to(stored_dtype(name, tensor.dtype, dtype_policy))


def stored_dtype(name: str, dtype: torch.dtype, dtype_policy: str) -> torch.dtype:
    """fp32 stores all in fp32, bf16 keeps only the sensitive ones so, keep changes nothing."""
    if dtype_policy == KEEP:
        return dtype
    if dtype_policy not in DTYPE_POLICIES:
        raise UserError(f"precision_export: {dtype_policy!r} is not one of {', '.join(DTYPE_POLICIES)}")
    return torch.float32 if dtype_policy == "fp32" or name.endswith(_FP32_ENDINGS) else torch.bfloat16


def save_folder(
    source: NemotronH | Iterable[tuple[str, torch.Tensor]],
    config: NemotronHConfig,
    folder: str | Path,
    dtype_policy: str = "fp32",
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> str:
    """Write a Hugging Face folder that transformers, vLLM and TensorRT-LLM load; returns its content sha256.

    Complete or absent: written beside `folder`, synced, read back and compared, renamed over it. Collective where the
    model is cut over ranks: rank 0 writes, the others return "" once their part is read. `tokenizer_from` gives
    tokenizer, chat template and, where it has them, the published modelling files. WriteFailed where the disk refuses.
    """
    folder = Path(folder)
    table = dtypes(source, config) if isinstance(source, NemotronH) else {}
    named = export_weights(source, config) if isinstance(source, NemotronH) else iter(source)
    if dist.is_initialized() and dist.get_rank() != 0:
        _drain(named)
        return ""
    plan = [
        Planned(name, SAFETENSORS_NAMES[stored_dtype(name, table.get(name, torch.float32), dtype_policy)], shape)
        for name, shape in config.tensor_shapes().items()
    ]

    def fill(writer: ShardWriter) -> None:
        for name, tensor in named:
            _write(writer, name, as_policy(name, tensor, dtype_policy))

    tokenizer = Path(tokenizer_from) if tokenizer_from else None
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        return _export(folder, aside, plan, fill, _Extras(config, tokenizer, shard_bytes), progress or Silent())
    except (OSError, UserError):
        if dist.is_initialized() and dist.get_world_size() > 1:
            _drain(named)  # the other ranks are in the middle of the same collectives
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _drain(named: Iterator[object]) -> None:
    for _ in named:
        pass


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
    _check_dtypes(headers)
    verify(source, progress)
    plan = [
        Planned(name, SAFETENSORS_NAMES[stored_dtype(name, STORED[header.dtype], dtype_policy)], header.shape)
        for name, header in headers.items()
    ]

    def fill(writer: ShardWriter) -> None:
        for name, header in headers.items():
            if writer.wants(name):
                _write(writer, name, as_policy(name, read_tensor(header), dtype_policy))

    aside = folder.with_name(f".{folder.name}.partial")
    extras = _Extras(config, Path(tokenizer_from) if tokenizer_from else source, shard_bytes, _identity(source))
    with _only_writer(aside, folder):
        try:
            return _export(folder, aside, plan, fill, extras, progress)
        except (OSError, UserError):
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _identity(folder: Path) -> str:
    """What tells whether a folder is still the one that an interrupted copy read: names, sizes and times."""
    files = [folder / "config.json", *weight_files(folder)]
    return "\n".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


@contextlib.contextmanager
def _only_writer(aside: Path, folder: Path) -> Iterator[None]:
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
class _Extras:
    """What an export needs beside its tensors. `identity` of the source makes it resumable."""

    config: NemotronHConfig
    tokenizer: Path | None
    shard_bytes: int
    identity: str = ""


def _write(writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
    tensor = tensor.detach().contiguous().cpu()
    writer.write(Planned(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)), bytes_of(tensor))


class _Counting(ShardWriter):
    """Tells the progress of every tensor written."""

    progress: Progress = Silent()

    def write(self, tensor: Planned, data: memoryview) -> None:
        """Write and count."""
        super().write(tensor, data)
        self.progress.advance(tensor.size)


def _export(
    folder: Path,
    aside: Path,
    plan: list[Planned],
    fill: Callable[[ShardWriter], None],
    extras: _Extras,
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
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)
