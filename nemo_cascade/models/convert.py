"""To and from Hugging Face: export the policy under published names, load a folder, write a folder that others load.

Two name styles exist: published checkpoints (`backbone.` and one tensor per expert), which we write, and what recent
transformers saves (`model.` and experts stacked in one tensor), which we also read. Both ways go one tensor at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_copy import (
    KEEP,
    SAFETENSORS_NAMES,
    Extras,
    read_tensor,
    refuse_quantised,
    stored_dtype,
    write_folder,
    write_tensor,
)
from nemo_cascade.models.hf_folder import Progress, Silent, read_checked_header, read_config, verify
from nemo_cascade.models.hf_writer import SHARD_BYTES, Planned, ShardWriter
from nemo_cascade.models.names import Rows, slots
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import UserError

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
    refuse_quantised(headers)
    verify(folder)
    import_weights(model, model.hf_config, ((name, read_tensor(header)) for name, header in headers.items()))


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
    progress: Progress | None = None,
) -> str:
    """Write a Hugging Face folder that transformers, vLLM and TensorRT-LLM load; returns its content sha256.

    Complete or absent: written beside `folder`, synced, read back and compared, renamed over it. Collective where the
    model is cut over ranks: rank 0 writes, the others return "" once their part is read. `tokenizer_from` gives
    tokenizer, chat template and, where it has them, the published modelling files. WriteFailed where the disk refuses.
    """
    folder = Path(folder)
    table = _dtypes(source, config) if isinstance(source, NemotronH) and dtype_policy == KEEP else {}
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
            write_tensor(writer, name, tensor, stored_dtype(name, tensor.dtype, dtype_policy))

    tokenizer = Path(tokenizer_from) if tokenizer_from else None
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        return write_folder(folder, aside, plan, fill, Extras(config, tokenizer, shard_bytes), progress or Silent())
    except (OSError, UserError):
        if dist.is_initialized() and dist.get_world_size() > 1:
            _drain(named)  # the other ranks are in the middle of the same collectives
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dtypes(model: NemotronH, config: NemotronHConfig) -> dict[str, torch.dtype]:
    """Tensor name -> dtype of its parameter, on every rank; collective where other ranks hold a part of the model."""
    known: dict[str, torch.dtype] = {}
    for name, slot in slots(model, config):
        if slot.is_local:
            piece = slot.pieces[0]
            known[name] = piece.local.dtype if isinstance(piece, Rows) else piece.view.dtype
    for group in (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            parts: list[dict[str, torch.dtype]] = [{} for _ in range(group.size())]
            dist.all_gather_object(parts, known, group=group)
            known = {name: dtype for part in parts for name, dtype in part.items()}
    return known


def _drain(named: Iterator[object]) -> None:
    for _ in named:
        pass
