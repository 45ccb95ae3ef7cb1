from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_cascade.algorithms.schedule import learning_rate
from nemo_cascade.config.paths import NANO_TOKENIZER, hf_folder
from nemo_cascade.config.schema import DataConfig, OptimizerConfig, SftConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import conversation_stream
from nemo_cascade.domains import load
from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
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


def test_an_override_changes_what_it_names(
    model: NemotronH, config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    policy = CascadeModel(model_config(config, layout))
    policy.load_state_dict(dict(convert.export_weights(model, config)))
    policy.save_to(str(tmp_path / "policy.nemo"))
    stored = CascadeModel.restore_from(str(tmp_path / "policy.nemo"), return_config=True)
    assert stored.precision == "fp32" and stored.architecture.hidden_size == 128

    partial = OmegaConf.create({"precision": "bf16", "optim": {"name": "adamw", "lr": 1e-4}})
    restored = CascadeModel.restore_from(str(tmp_path / "policy.nemo"), override_config_path=partial)
    assert restored.cfg.optim.lr == 1e-4 and restored.hf_config == config
    assert restored.model.embedding.word_embeddings.weight.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            own = restored.model.state_dict()[name]
            assert torch.equal(own, tensor.to(own.dtype)), name

    (tmp_path / "whole.yaml").write_text(OmegaConf.to_yaml({"model": {**stored, "seed": 5}}))
    whole = CascadeModel.restore_from(str(tmp_path / "policy.nemo"), override_config_path=str(tmp_path / "whole.yaml"))
    assert whole.cfg.seed == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("target", ["nemo_cascade.models.mamba.Mamba2Mixer", "subprocess.Popen"])
def test_a_file_of_a_foreign_class_is_refused(
    config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path, target: str
) -> None:
    from nemo.core.classes import common
    from omegaconf import OmegaConf

    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    policy = CascadeModel(model_config(config, layout))
    OmegaConf.set_struct(policy._cfg, False)
    policy._cfg.target = target
    policy.save_to(str(tmp_path / "foreign.nemo"))
    with pytest.raises(common.UnsafeTargetError, match=target):
        CascadeModel.restore_from(str(tmp_path / "foreign.nemo"))


def test_shipped_models_come_by_name(layout: ParallelLayout) -> None:
    from nemo_cascade.config.paths import hf_folder
    from nemo_cascade.models.cascade_model import CascadeModel

    infos = {info.pretrained_model_name: info for info in CascadeModel.list_available_models()}
    assert list(infos) == ["nano", "nano_judge"] and all(info.class_ is CascadeModel for info in infos.values())
    policy = CascadeModel.from_pretrained("nano")
    stored = load_file(hf_folder("hf:nano") / "model.safetensors")
    assert stored.keys() == policy.state_dict().keys()
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in policy.state_dict().items())
    assert CascadeModel.from_pretrained("nano_judge", return_config=True).architecture.hidden_size == 128
    with pytest.raises(UserError, match="'giant' is neither one of nano, nano_judge nor a Hugging Face folder here"):
        CascadeModel.from_pretrained("giant")


def test_nemos_cosine_and_a_stages_schedule_are_one_curve() -> None:
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler

    from nemo_cascade.models.nemo_optim import optim_config

    cfg = OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=4, warmup_from=1e-3 / 5)
    curves = []
    for sched in (
        {"name": "CosineAnnealing", "warmup_steps": 4, "min_lr": 1e-4, "max_steps": 20},
        optim_config(cfg, 20)["sched"],
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule = prepare_lr_scheduler(optimizer, dict(sched))["scheduler"]
        rates = []
        for _ in range(25):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        curves.append(rates)
    assert curves[0] == pytest.approx(curves[1], rel=1e-12)
    assert curves[1] == pytest.approx([learning_rate(cfg, step, 20) for step in range(25)], rel=1e-12)
    assert curves[1][0] == pytest.approx(2e-4) and curves[1][4] == 1e-3 and curves[1][20] == pytest.approx(1e-4)


SFT = {
    "data": {
        "domains": {"instruction_following": 1, "mcqa": 1, "math": 1},
        "flaw_rate": 0.3, "flaw_rates": {"math": 0.0}, "thinking_share": 0.5,
    },
    "tokens_per_step": 1536, "max_sequence_tokens": 320, "seed": 11,
}  # fmt: skip


def test_lightning_and_the_learner_take_the_same_steps(layout: ParallelLayout, tmp_path: Path) -> None:
    """Same data, optimizer, clipping and schedule: five losses within 1e-5, and the weights after them."""
    from lightning.pytorch import Callback, Trainer
    from omegaconf import OmegaConf

    from nemo_cascade.algorithms.loss import cross_entropy
    from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
    from nemo_cascade.models.cascade_model import CascadeModel
    from nemo_cascade.models.nemo_optim import optim_config

    cfg = OptimizerConfig(
        lr=1e-3, min_lr=1e-4, betas=[0.9, 0.98], weight_decay=0.1, clip_grad=0.5, schedule="cosine", warmup_steps=2,
        warmup_from=2e-4, expert_bias_rate=1e-3,
    )  # fmt: skip
    override = OmegaConf.create({"train_ds": SFT, "optim": optim_config(cfg, 5), "expert_bias_rate": 1e-3})
    losses: dict[str, list[float]] = {"lightning": [], "learner": []}

    class Record(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            losses["lightning"].append(float(outputs["loss"]))

    trainer = Trainer(
        max_steps=5, accelerator="cpu", devices=1, gradient_clip_val=0.5, logger=False, callbacks=[Record()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    policy = CascadeModel.from_pretrained("nano", override_config_path=override, trainer=trainer)
    trainer.fit(policy)

    learner = MegatronLearner(policy.hf_config, LearnerSettings(cfg, num_steps=5), str(hf_folder("hf:nano")))
    domains = {name: load(name) for name in SFT["data"]["domains"]}
    stage = SftConfig(kind="sft", init="base", num_steps=5, **stage_keys())
    stream = conversation_stream(stage, domains, ChatTokenizer(NANO_TOKENIZER), seed=11)
    norms = []
    for step in range(5):
        metrics = learner.update(stream.take(step), cross_entropy("token"))
        losses["learner"].append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert losses["lightning"] == pytest.approx(losses["learner"], abs=1e-5), losses
    assert max(norms) > 0.5 and len(set(losses["learner"])) == 5, (norms, losses)
    trained = policy.state_dict()
    for name, tensor in learner.weights():
        assert (trained[name] - tensor).abs().max() < 1e-5, name


def stage_keys() -> dict[str, Any]:
    """The keys of SFT that an SftConfig has."""
    return {
        "data": DataConfig(**SFT["data"]), "tokens_per_step": SFT["tokens_per_step"],
        "max_sequence_tokens": SFT["max_sequence_tokens"],
    }  # fmt: skip


def test_nemos_hooks(config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path) -> None:
    from lightning.pytorch import Trainer
    from omegaconf import OmegaConf

    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    cfg = model_config(config, layout)
    sched = {"name": "CosineAnnealing", "warmup_steps": 1, "min_lr": 1e-5}
    more = {
        "train_ds": SFT, "validation_ds": {**SFT, "seed": 12, "num_steps": 2}, "router_frozen": True,
        "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "sched": sched},
    }  # fmt: skip
    trainer = Trainer(
        max_steps=2, val_check_interval=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    policy = CascadeModel(OmegaConf.merge(cfg, more), trainer)
    gates = [router.weight.clone() for router in routers(policy.model)]
    trainer.fit(policy)
    assert 5.0 < float(trainer.callback_metrics["val_loss"]) < 7.0
    decayed, plain = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0 and len(plain["params"]) > 10
    assert tuple(decayed["betas"]) == (0.9, 0.95) and type(trainer.optimizers[0]) is torch.optim.AdamW
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(1e-5)  # the end of the cosine
    assert all(torch.equal(gate, router.weight) for gate, router in zip(gates, routers(policy.model), strict=True))


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

    from nemo_cascade.models.cascade_model import CascadeModel
    from nemo_cascade.models.training_rows import loader

    with pytest.raises(UserError, match="key architecture is missing"):
        CascadeModel(OmegaConf.create({"precision": "fp32"}))
    with pytest.raises(UserError, match=r"train_ds: file .*rows\.jsonl does not exist"):
        loader({"file": str(tmp_path / "rows.jsonl")}, "train_ds")
    (tmp_path / "rows.jsonl").write_text('{"token_ids": [1, 2]}\n')
    with pytest.raises(UserError, match="train_ds: key 'micro_batch_token' unknown; did you mean 'micro_batch_tokens'"):
        loader({"file": str(tmp_path / "rows.jsonl"), "micro_batch_token": 64}, "train_ds")
    with pytest.raises(UserError, match="train_ds: key file .* or data .* is missing"):
        loader({"micro_batch_tokens": 64}, "train_ds")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a row needs the lists"):
        list(loader({"file": str(tmp_path / "rows.jsonl")}, "train_ds"))


def test_from_hf(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel

    convert.save_folder(model, config, tmp_path)
    policy = CascadeModel.from_hf(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), model.parameters(), strict=True))
