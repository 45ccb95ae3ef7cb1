"""To and from Hugging Face: export the policy under published names, load a folder, write a folder that others load.

Two name styles exist: published checkpoints (`backbone.` and one tensor per expert), which we write, and what recent
transformers saves (`model.` and experts stacked in one tensor), which we also read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import export_dtype, kind_of
from nemo_cascade.models.hf_folder import INDEX, SINGLE, content_sha256, read_header
from nemo_cascade.models.names import slots
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import Json, UserError

SHARD_BYTES = 4 * 1024**3
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "generation_config.json", "configuration_nemotron_h.py", "modeling_nemotron_h.py",
)  # fmt: skip
_AUTO_MAP: dict[str, Json] = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}


def export_weights(model: NemotronH, config: NemotronHConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the policy under its published name, one at a time, as copies in the dtype of the parameter.

    Collective: every rank must run it to the end; every rank gets every whole tensor.
    """
    for name, slot in slots(model, config):
        yield name, slot.read()


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
            _check_shape(name, tuple(part.shape), table[name].shape)
            if name not in missing:
                raise UserError(f"tensor {name} is given twice")
            missing.discard(name)
            table[name].write(part)
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing, the first is {min(missing)}; the checkpoint is incomplete"
        )


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if found != wanted:
        raise UserError(
            f"tensor {name} has shape {list(found)}, the model needs {list(wanted)}; use the model config of the "
            "checkpoint's own config.json"
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
    """Fill the policy from a Hugging Face folder; names and shapes are checked before the first tensor is copied."""
    folder = Path(folder)
    config = model.hf_config
    headers = read_header(folder)
    wanted = config.tensor_shapes()
    found: set[str] = set()
    for published, header in headers.items():
        for name, part in _canonical(published, torch.empty(header.shape, device="meta")):
            if name not in wanted:
                raise UserError(f"{folder}: tensor {published} does not belong to this model; check its config.json")
            try:
                _check_shape(name, tuple(part.shape), wanted[name])
            except UserError as error:
                raise UserError(f"{folder}: {error}") from error
            found.add(name)
    if absent := [name for name in wanted if name not in found]:
        raise UserError(
            f"{folder}: {len(absent)} tensors are missing, the first is {absent[0]}; export the checkpoint again"
        )
    import_weights(model, config, _stored({name: header.file for name, header in headers.items()}))


def _stored(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of safetensors files, one at a time."""
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():
                yield name, stored.get_tensor(name)


def as_policy(name: str, tensor: torch.Tensor, dtype_policy: str) -> torch.Tensor:
    """A tensor as an export stores it: fp32 stores all in fp32, bf16 only those that models/dtypes.py keeps wide."""
    return tensor.to(getattr(torch, export_dtype(kind_of(name), dtype_policy)))


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32` of torch.float32: the names that models/dtypes.py uses, which knows no torch."""
    return str(tensor.dtype).removeprefix("torch.")


def save_folder(
    source: NemotronH | Iterable[tuple[str, torch.Tensor]],
    config: NemotronHConfig,
    folder: str | Path,
    dtype_policy: str = "fp32",
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a Hugging Face folder that transformers, vLLM and TensorRT-LLM load; returns its content sha256.

    Complete or absent: written beside `folder`, synced, renamed over it. Collective where the model is cut over ranks:
    rank 0 writes, the others return "" once their part is read. `tokenizer_from` gives tokenizer, chat template and,
    where it has them, the published modelling files.
    """
    named = export_weights(source, config) if isinstance(source, NemotronH) else iter(source)
    if dist.is_initialized() and dist.get_rank() != 0:
        for _ in named:
            pass
        return ""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(((name, as_policy(name, tensor, dtype_policy)) for name, tensor in named), aside, shard_bytes)
        _write_configs(config, aside, dtype_policy, Path(tokenizer_from) if tokenizer_from else None)
        sha256 = content_sha256(aside)
        _sync(aside)
        _replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sha256


def _write_weights(named: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int) -> None:
    """Shards of at most `shard_bytes` with an index, or one file when all fits."""
    shards: list[dict[str, torch.Size]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.shape for name, tensor in held.items()})
        held.clear()

    for name, tensor in named:
        weight = tensor.numel() * tensor.element_size()
        if held and size + weight > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous().cpu()
        size += weight
        total += weight
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def _write_configs(config: NemotronHConfig, folder: Path, dtype_policy: str, tokenizer_from: Path | None) -> None:
    """config.json, generation_config.json and the copied tokenizer files."""
    content = config.to_hf_json()
    content["dtype"] = content["torch_dtype"] = "float32" if dtype_policy == "fp32" else "bfloat16"
    if tokenizer_from is not None:
        if not tokenizer_from.is_dir():
            raise UserError(f"tokenizer {tokenizer_from}: no such folder")
        parsers = [file.name for file in tokenizer_from.glob("*reasoning_parser*.py")]
        for name in (*_COPIED, *parsers):
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, folder / name)
        if (folder / "modeling_nemotron_h.py").is_file() and (folder / "configuration_nemotron_h.py").is_file():
            content["auto_map"] = _AUTO_MAP
    _write_json(folder / "config.json", content)
    if not (folder / "generation_config.json").is_file():
        _write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": config.bos_token_id,
                "eos_token_id": config.eos_token_id,
                "pad_token_id": config.pad_token_id,
                "do_sample": True,
                "temperature": 1.0,
                "top_p": 0.95,
            },
        )


def _write_json(path: Path, content: Mapping[str, Json] | dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
