"""The policy as NeMo users know it: a ModelPT with an OmegaConf config, `.nemo` files and the Lightning hooks.

Importing this module imports nemo.core (seconds), so import it only where a model is built.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_common
from nemo.core.classes.common import PretrainedModelInfo
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, IterableDataset

from nemo_cascade.data.packing import pack
from nemo_cascade.models import convert, cpu, nemotron_h, parallel
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.precision import BF16_LAYERS
from nemo_cascade.types import Sequence, UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

cpu.install()

# nemo-toolkit 3.0.0 instantiates only classes below the prefixes of nemo/core/classes/common.py:59, which names
# NVIDIA's packages; any other ModelPT can be saved but not restored. This adds our one module to the list, in the open:
# the check stays on for everything else, and a .nemo file that names another class of ours is still refused.
ALLOWED_PREFIX = "nemo_cascade.models.cascade_model."
if ALLOWED_PREFIX not in nemo_common.ALLOWED_TARGET_PREFIXES:
    nemo_common.ALLOWED_TARGET_PREFIXES.append(ALLOWED_PREFIX)


def model_config(
    config: NemotronHConfig,
    layout: ParallelLayout | None = None,
    precision: str = "fp32",
    spec: str = "local",
    bf16_layers: int = BF16_LAYERS,
) -> DictConfig:
    """The config of a CascadeModel: the architecture, how it is cut, its precision and its layer spec."""
    content = {
        "architecture": dataclasses.asdict(config),
        "precision": precision,
        "layer_spec": spec,
        "fp8_bf16_layers": bf16_layers,
    }
    if layout is not None:
        content["layout"] = dataclasses.asdict(layout)
    return OmegaConf.create(content)


def _plain(node: DictConfig) -> dict[str, Any]:
    """An OmegaConf mapping as a dict."""
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


class CascadeModel(ModelPT):
    """NemotronH on Megatron-core behind NeMo's model interface.

    `cfg.architecture` holds the fields of NemotronHConfig; `cfg.layout`, `cfg.precision` and `cfg.layer_spec` are
    optional. The state dict, and so a `.nemo` file, holds whole tensors under published names: a file written at one
    layout restores at any other. Ranks are started with the layout if `parallel.start` has not run yet.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        self._published: dict[str, torch.Tensor] | None = None
        if "architecture" not in cfg:
            raise UserError("model config: key architecture is missing; build it with cascade_model.model_config")
        self.hf_config = NemotronHConfig.from_mapping(_plain(cfg.architecture), "model config: architecture")
        self.layout = ParallelLayout(**_plain(cfg.get("layout", OmegaConf.create({}))))
        if not parallel.is_started():
            parallel.start(self.layout, seed=int(cfg.get("seed", 1)))
        super().__init__(cfg=cfg, trainer=trainer)
        self.model = nemotron_h.build(
            self.hf_config,
            self.layout,
            str(cfg.get("precision", "fp32")),
            str(cfg.get("layer_spec", "local")),
            int(cfg.get("fp8_bf16_layers", BF16_LAYERS)),
        )

    @classmethod
    def from_hf(cls, folder: str | Path, layout: ParallelLayout | None = None, precision: str = "fp32") -> CascadeModel:
        """The model of a Hugging Face folder with its weights."""
        model = cls(model_config(read_config(folder), layout, precision))
        convert.load_folder(model.model, folder)
        return model

    def forward(self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] in fp32 of one packed row; sequence s is tokens_T[cu_seqlens[s]:cu_seqlens[s + 1]]."""
        return self.model.packed_logits(tokens_T, cu_seqlens)

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean negative log-likelihood (nat) over the trained targets of one packed row."""
        loss = self._loss(batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The same loss on held-out rows."""
        loss = self._loss(batch)
        self.log("val_loss", loss, batch_size=1)
        return loss

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = self(batch["tokens_T"], batch["cu_seqlens"])
        losses = torch.nn.functional.cross_entropy(logits, batch["targets_T"], reduction="none")
        mask = batch["loss_mask_T"]
        return (losses * mask).sum() / mask.sum().clamp(min=1.0)

    def setup_training_data(self, train_data_config: DictConfig | dict[str, Any]) -> None:
        """A loader of packed rows: `file` (JSON lines with token_ids and loss_mask) and `micro_batch_tokens`."""
        self._train_dl = _loader(train_data_config, "train_ds")

    def setup_validation_data(self, val_data_config: DictConfig | dict[str, Any]) -> None:
        """As `setup_training_data`, for `validation_ds`."""
        self._validation_dl = _loader(val_data_config, "validation_ds")

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Models that `from_pretrained` can download: none, checkpoints come as Hugging Face folders (`from_hf`)."""
        return []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Whole tensors under published names, independent of the layout. Collective where the model is cut."""
        if self._published is not None:
            return self._published
        return dict(convert.export_weights(self.model, self.hf_config))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Take whole tensors under published names; each rank keeps its part."""
        convert.import_weights(self.model, self.hf_config, state_dict.items())
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def save_to(self, save_path: str) -> None:
        """Write a `.nemo` file; every rank must call it, rank 0 writes."""
        self._published = self.state_dict()
        try:
            super().save_to(save_path)
        finally:
            self._published = None


class _PackedRows(IterableDataset[dict[str, torch.Tensor]]):
    """Tokenised sequences of a JSON-lines file as packed rows."""

    def __init__(self, file: Path, micro_batch_tokens: int, source: str) -> None:
        if not file.is_file():
            raise UserError(f"{source}: file {file} does not exist")
        self.file, self.micro_batch_tokens, self.source = file, micro_batch_tokens, source

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sequences = []
        for number, line in enumerate(self.file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                sequences.append(Sequence(tuple(row["token_ids"]), tuple(row["loss_mask"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                message = f"{self.file}:{number}: a row needs the lists token_ids and loss_mask ({error})"
                raise UserError(message) from error
        for batch in pack(sequences, self.micro_batch_tokens).batches:
            yield {
                "tokens_T": batch.tokens_T,
                "targets_T": batch.targets_T,
                "loss_mask_T": batch.loss_mask_T,
                "cu_seqlens": batch.cu_seqlens,
            }


def _loader(config: DictConfig | dict[str, Any], source: str) -> DataLoader[dict[str, torch.Tensor]]:
    """One packed row per item; the row is the batch."""
    if "file" not in config:
        raise UserError(f"{source}: key file is missing (JSON lines with token_ids and loss_mask)")
    rows = _PackedRows(Path(str(config["file"])), int(config.get("micro_batch_tokens", 4096)), source)
    return DataLoader(rows, batch_size=None)
