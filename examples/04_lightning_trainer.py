"""SFT under Lightning's Trainer, the NeMo way: a model by name, data, optimizer and schedule from its config, a `.nemo`
file. About 20 seconds.

python examples/04_lightning_trainer.py
"""

import logging
import tempfile
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf

from nemo_cascade.models.cascade_model import CascadeModel

STEPS = 20
CONFIG = OmegaConf.create({
    "train_ds": {  # the keys of an SFT stage
        "data": {"domains": {"long_context": 1, "code": 1}, "options": {"long_context": {"phrase": "has"}}},
        "tokens_per_step": 2048, "max_sequence_tokens": 320, "seed": 7,
    },
    "optim": {
        "name": "adamw", "lr": 1.0e-3, "betas": [0.9, 0.98], "weight_decay": 0.1,
        "sched": {"name": "CosineAnnealing", "warmup_steps": 4, "min_lr": 1.0e-4},
    },
})  # fmt: skip


class Print(Callback):
    """The loss of each step, as it comes."""

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        print(f"step {batch_idx + 1}: loss {float(outputs['loss']):.4f}, next lr {rate:.2e}")


def main() -> None:
    """Train the shipped nano model for a few steps, save it, restore it."""
    for chatty in ("nemo_logger", "lightning.pytorch", "megatron"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for info in CascadeModel.list_available_models():
        print(f"{info.pretrained_model_name}: {info.description}")
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, gradient_clip_val=1.0, callbacks=[Print()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = CascadeModel.from_pretrained("nano", override_config_path=CONFIG, trainer=trainer)
    trainer.fit(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sft.nemo"
        model.save_to(str(file))
        print(f"{file.name}: {file.stat().st_size // 1024} KiB")
        restored = CascadeModel.restore_from(str(file), override_config_path=OmegaConf.create({"precision": "bf16"}))
    tensors = restored.state_dict()
    print(f"restored {len(tensors)} tensors, embeddings in {tensors['backbone.embeddings.weight'].dtype}")


if __name__ == "__main__":
    main()
