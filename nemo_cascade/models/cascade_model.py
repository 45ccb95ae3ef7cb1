"""The policy as NeMo users know it: a ModelPT with an OmegaConf config, `.nemo` files and the Lightning hooks.

Importing this module imports nemo.core (seconds), so import it only where a model is built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_common
from nemo.core.classes.common import PretrainedModelInfo
from omegaconf import DictConfig, OmegaConf

from nemo_cascade.config.paths import PACKAGED, hf_folder
from nemo_cascade.config.strict import read_yaml
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.models import convert, cpu, nemotron_h, parallel
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.models.moe import freeze_routers, update_expert_bias
from nemo_cascade.models.nemo_file import check_nemo_file, keep_files, key_of, named_files
from nemo_cascade.models.nemo_optim import decay_groups
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.precision import BF16_LAYERS
from nemo_cascade.models.training_rows import loader
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

cpu.install()

# nemo-toolkit 3.0.0 instantiates only classes below the prefixes of nemo/core/classes/common.py:59, which names
# NVIDIA's packages; any other ModelPT can be saved but not restored. This adds our one module to the list, in the open:
# the check stays on for everything else, and a .nemo file that names another class of ours is still refused.
ALLOWED_PREFIX = "nemo_cascade.models.cascade_model."
if ALLOWED_PREFIX not in nemo_common.ALLOWED_TARGET_PREFIXES:
    nemo_common.ALLOWED_TARGET_PREFIXES.append(ALLOWED_PREFIX)

DESCRIPTIONS = {
    "nano": "NemotronH of 1.1M parameters, pre-trained on the nano corpus: where the nano cascade starts",
    "nano_judge": "the same model trained to compare two answers: the preference judge of the nano cascade",
}
"""What the package ships (`config.paths.PACKAGED`), in words."""


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


def _override(given: DictConfig | dict[str, Any] | str | Path | None) -> DictConfig | None:
    """An override config as NeMo takes it: an object, or the path of a YAML file."""
    if given is None:
        return None
    content = read_yaml(Path(given)) if isinstance(given, str | Path) else given
    config = OmegaConf.create(content)
    assert isinstance(config, DictConfig)
    return config.model if "model" in config else config


class CascadeModel(ModelPT):
    """NemotronH on Megatron-core behind NeMo's model interface.

    `cfg.architecture` holds the fields of NemotronHConfig; `layout`, `precision`, `layer_spec`, `seed` and, for
    training under Lightning, `train_ds`, `validation_ds` (`training_rows.py`), `optim` (any of NeMo's, or
    `nemo_optim.optim_config` of a stage), `router_frozen` and `expert_bias_rate` are optional. The state dict, and so a
    `.nemo` file, holds whole tensors under published names: a file written at one layout restores at any other. Ranks
    are started with the layout if `parallel.start` has not run yet.

    `tokenizer` is a Hugging Face folder, whose tokenizer, chat template and code files a `.nemo` file carries; inside
    one it names these files.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        self._published: dict[str, torch.Tensor] | None = None
        if "architecture" not in cfg:
            raise UserError("model config: key architecture is missing; build it with cascade_model.model_config")
        self.hf_config = NemotronHConfig.from_mapping(_plain(cfg.architecture), "model config: architecture")
        self.layout = ParallelLayout(**_plain(cfg.get("layout", OmegaConf.create({}))))
        if not parallel.is_started():
            parallel.start(self.layout, seed=int(cfg.get("seed", 1)))
        if isinstance(cfg.get("tokenizer"), str):
            cfg = OmegaConf.merge(cfg, {"tokenizer": None}, {"tokenizer": named_files(cfg.tokenizer)})
        super().__init__(cfg=cfg, trainer=trainer)
        self.tokenizer_folder = self._keep_tokenizer()
        self.model = nemotron_h.build(
            self.hf_config,
            self.layout,
            str(cfg.get("precision", "fp32")),
            str(cfg.get("layer_spec", "local")),
            int(cfg.get("fp8_bf16_layers", BF16_LAYERS)),
        )
        if cfg.get("router_frozen", False):
            freeze_routers(self.model)

    def _keep_tokenizer(self) -> Path | None:
        """Register the files of `cfg.tokenizer` as artifacts, which `save_to` carries; returns where they lie."""
        files = _plain(self._cfg.get("tokenizer") or OmegaConf.create({}))  # a copy: registering changes the config
        folder = keep_files(self, files, lambda key, source: self.register_artifact(f"tokenizer.{key}", source))
        if folder is None:
            return None
        self.artifacts = {}  # from here on they are ours: what they were read from may be gone by the time of save_to
        for file in folder.iterdir():
            self.register_artifact(f"tokenizer.{key_of(file.name)}", str(file))
        return folder

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer | None:
        """The tokenizer that the model carries, with its chat template; None where it has none."""
        folder = self.tokenizer_folder
        return ChatTokenizer(folder) if folder and (folder / "tokenizer.json").is_file() else None

    @classmethod
    def from_hf(
        cls,
        folder: str | Path,
        layout: ParallelLayout | None = None,
        precision: str = "fp32",
        override: DictConfig | None = None,
        trainer: Trainer | None = None,
    ) -> CascadeModel:
        """The model of a Hugging Face folder with its weights and tokenizer; `override` lies over its config."""
        cfg = model_config(read_config(folder), layout, precision)
        cfg.tokenizer = named_files(folder)
        model = cls(cfg if override is None else OmegaConf.merge(cfg, override), trainer)
        convert.load_folder(model.model, folder)
        return model

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """The models that the package itself holds; `from_pretrained` reads them without a network."""
        return [
            PretrainedModelInfo(name, DESCRIPTIONS[name], str(folder), cls)
            for name, folder in PACKAGED.items()
            if (folder / "config.json").is_file()
        ]

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - NeMo's signature
        cls,
        model_name: str,
        refresh_cache: bool = False,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        save_restore_connector: Any = None,
        return_model_file: bool = False,
    ) -> Any:
        """One of `list_available_models` by name, or a Hugging Face folder on this machine; nothing is downloaded.

        `refresh_cache` and `save_restore_connector` mean nothing here: there is no cache and no `.nemo` file.
        """
        folder = hf_folder(model_name)
        if not (folder / "config.json").is_file():
            known = ", ".join(info.pretrained_model_name for info in cls.list_available_models())
            raise UserError(f"from_pretrained: {model_name!r} is neither one of {known} nor a Hugging Face folder here")
        if return_model_file:
            return str(folder)
        override = _override(override_config_path)
        if return_config:
            cfg = model_config(read_config(folder))
            return cfg if override is None else OmegaConf.merge(cfg, override)
        model = cls.from_hf(folder, override=override, trainer=trainer)
        return model if map_location is None else model.to(map_location)

    @classmethod
    def restore_from(  # noqa: PLR0913 - NeMo's signature
        cls,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: Any = None,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """The model of a `.nemo` file. An override config with `architecture` replaces the stored one, as in NeMo.

        One without it names only what changes (another layout, precision, optim, data) and lies over the stored one.
        A damaged file is a UserError before anything is loaded.
        """
        if Path(restore_path).is_file():
            check_nemo_file(restore_path)
        override = _override(override_config_path)
        if override is not None and "architecture" not in override:
            stored = super().restore_from(restore_path, return_config=True)
            OmegaConf.set_struct(stored, False)
            override = OmegaConf.merge(stored, override)
        try:
            return super().restore_from(
                restore_path, override, map_location, strict, return_config, save_restore_connector, trainer,
                validate_access_integrity,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{restore_path}: {error}") from error
        finally:  # NeMo forgets this after a refused file, and then no later model sets up its data
            cls._set_model_restore_state(is_being_restored=False)

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

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Move the expert biases once per optimizer step, at the rate `cfg.expert_bias_rate` (0: never)."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            update_expert_bias(self.model, float(self._cfg.get("expert_bias_rate", 0.0)))

    def setup_training_data(self, train_data_config: DictConfig | dict[str, Any]) -> None:
        """A loader of packed rows: `file` and `micro_batch_tokens`, or `data` and the other keys of an SFT stage."""
        self._train_dl = loader(_plain(OmegaConf.create(train_data_config)), "train_ds")

    def setup_validation_data(self, val_data_config: DictConfig | dict[str, Any]) -> None:
        """As `setup_training_data`, for `validation_ds`."""
        self._validation_dl = loader(_plain(OmegaConf.create(val_data_config)), "validation_ds")

    def setup_optimizer_param_groups(self) -> None:
        """NeMo's hook: what is trained, vectors without weight decay as in the Learner's optimizer."""
        self._optimizer_param_groups = decay_groups(self.parameters())

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
