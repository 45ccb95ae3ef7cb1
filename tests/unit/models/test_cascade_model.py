from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import UserError

pytest.importorskip("nemo.core.classes")


def test_nemo_file_round_trip_and_forward(
    model: NemotronH, config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path
) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    policy = CascadeModel(model_config(config, layout))
    policy.load_state_dict(dict(convert.export_weights(model, config)))
    policy.save_to(str(tmp_path / "policy.nemo"))
    restored = CascadeModel.restore_from(str(tmp_path / "policy.nemo"))
    assert restored.hf_config == config
    tokens, bounds = torch.arange(50), torch.tensor([0, 20, 50]).int()
    with torch.no_grad():
        logits = restored(tokens, bounds)
        assert torch.equal(logits, model.packed_logits(tokens, bounds))
    assert logits.dtype == torch.float32
    assert list(restored.state_dict()) == list(config.tensor_shapes())


def test_the_allow_list_grows_by_exactly_one_module() -> None:
    from nemo.core.classes import common

    from nemo_cascade.models.cascade_model import ALLOWED_PREFIX

    ours = [prefix for prefix in common.ALLOWED_TARGET_PREFIXES if "cascade" in prefix]
    assert ours == [ALLOWED_PREFIX] == ["nemo_cascade.models.cascade_model."]
    with pytest.raises(common.UnsafeTargetError):
        common._get_allowed_target_class("nemo_cascade.models.mamba.Mamba2Mixer")
    with pytest.raises(common.UnsafeTargetError):
        common._get_allowed_target_class("subprocess.Popen")


def test_lightning_trains_it(config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path) -> None:
    from lightning.pytorch import Trainer
    from omegaconf import OmegaConf

    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    rows = [
        {"token_ids": [(7 * t + s) % 50 for t in range(20 + s)], "loss_mask": [0] + [1] * (19 + s)} for s in range(8)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    torch.manual_seed(0)
    policy = CascadeModel(model_config(config, layout))
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    policy.set_trainer(trainer)
    policy.setup_training_data({"file": str(file), "micro_batch_tokens": 64})
    policy.setup_optimization(OmegaConf.create({"name": "adamw", "lr": 2e-3}))
    batch = next(iter(policy._train_dl))
    before = policy._loss(batch).item()
    trainer.fit(policy)
    assert before > 5.5
    assert policy._loss(batch).item() < 0.7 * before


def test_user_errors(config: NemotronHConfig, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from nemo_cascade.models.cascade_model import CascadeModel, _loader

    with pytest.raises(UserError, match="key architecture is missing"):
        CascadeModel(OmegaConf.create({"precision": "fp32"}))
    with pytest.raises(UserError, match=r"train_ds: file .*rows\.jsonl does not exist"):
        _loader({"file": str(tmp_path / "rows.jsonl")}, "train_ds")
    (tmp_path / "rows.jsonl").write_text('{"token_ids": [1, 2]}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a row needs the lists"):
        list(_loader({"file": str(tmp_path / "rows.jsonl")}, "train_ds"))


def test_from_hf(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel

    convert.save_folder(model, config, tmp_path)
    policy = CascadeModel.from_hf(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), model.parameters(), strict=True))
