"""Experts over two ranks with each dispatcher, routing replay over ranks, a `.nemo` file under another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.routing import Routing
from tests import ranks
from tests.numerics import moe_over_ranks


@pytest.mark.slow
def test_two_ranks_are_one(model: NemotronH, config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    convert.save_folder(model, config, tmp_path / "hf")
    policy = CascadeModel(model_config(config, layout))
    convert.load_folder(policy.model, tmp_path / "hf")
    policy.save_to(str(tmp_path / "policy.nemo"))
    tokens = torch.randint(0, config.vocab_size, (77,), generator=torch.Generator().manual_seed(2))
    bounds = torch.tensor([0, 40, 53, 77]).int()
    free = Routing()
    logits = model.packed_logits(tokens, bounds, routing=free)
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    replay = Routing((free.chosen() + 3) % 8)
    expected = {
        "tokens": tokens, "bounds": bounds, "logits": logits.detach(), "chosen": free.chosen(),
        "other": replay.given, "up": model.decoder.layers[2].mlp.experts.up.grad, "gate": routers(model)[0].weight.grad,
    }  # fmt: skip
    with torch.no_grad():
        expected["replayed"] = model.packed_logits(tokens, bounds, routing=replay)
    assert (expected["replayed"] - expected["logits"]).abs().max() > 0.1
    expected["difference"] = replay.difference()
    torch.save(expected, tmp_path / "expected.pt")
    ranks.run(moe_over_ranks.__file__, str(tmp_path))
    start = policy.state_dict()
    for file in sorted(tmp_path.glob("tp2_*.nemo")):  # written by two ranks
        override = OmegaConf.create({"layout": {"tensor": 1, "expert": 1}})
        back = CascadeModel.restore_from(str(file), override_config_path=override).state_dict()
        assert back.keys() == start.keys()
        assert all(torch.equal(value, start[name]) for name, value in back.items()), file
    assert len(list(tmp_path.glob("tp2_*.nemo"))) == 4
