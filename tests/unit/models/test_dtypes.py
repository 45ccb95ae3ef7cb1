"""The table of dtypes knows every tensor of the published model, and the config layer every profile."""

from __future__ import annotations

import pytest
import torch

from nemo_cascade.config.schema_hardware import PRECISIONS, HardwareConfig
from nemo_cascade.models import dtypes
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import DecodeModel
from nemo_cascade.models.decode_native import _blob
from nemo_cascade.refit.rounding import Rounding
from nemo_cascade.types import UserError
from tests.unit.rollout.standins import random_weights, tiny_config
from tools.precision_table import PAGE, render


def test_every_tensor_of_the_published_model_is_of_one_kind() -> None:
    counts: dict[str, int] = {}
    for name in NemotronHConfig.preset("nemotron_3_nano_30b_a3b").tensor_shapes():
        fitting = [kind for kind in dtypes.KINDS if name.endswith(kind.endings)]
        assert len(fitting) == 1, name
        counts[fitting[0].name] = counts.get(fitting[0].name, 0) + 1
    # 52 layers: 23 Mamba, 6 attention, 23 MoE of 128 experts and a shared one
    assert counts == {
        "embedding": 1, "output layer": 1, "norm": 52 + 23 + 1, "Mamba projections": 2 * 23, "convolution": 2 * 23,
        "A_log, D, dt_bias": 3 * 23, "attention projections": 4 * 6, "router": 23, "expert bias": 23,
        "experts, shared expert": 2 * 129 * 23,
    }  # fmt: skip
    with pytest.raises(UserError, match="backbone.layers.0.mixer.surprise is of no kind"):
        dtypes.kind_of("backbone.layers.0.mixer.surprise")


def test_the_config_knows_the_profiles_and_nothing_else() -> None:
    assert set(PRECISIONS) == set(dtypes.PROFILES)
    with pytest.raises(UserError, match="hardware.precision"):
        HardwareConfig(precision="int4")
    with pytest.raises(UserError, match="hardware.fp8_bf16_layers"):
        HardwareConfig(fp8_bf16_layers=-1)


def test_an_export_keeps_what_the_learner_keeps_wide() -> None:
    for kind in dtypes.KINDS:
        for precision in dtypes.PROFILES:
            held = dtypes.learner_dtype(kind, precision)
            assert held == ("float32" if kind.wide or precision == "fp32" else "bfloat16")
            assert not dtypes.narrower(dtypes.export_dtype(kind, "fp32"), held)
            # a bf16 export rounds only what an fp32 Learner holds, and never a wide tensor
            assert dtypes.narrower(dtypes.export_dtype(kind, "bf16"), held) == (precision == "fp32" and not kind.wide)
            assert not dtypes.narrower(dtypes.engine_dtype(kind, "local"), held)


def test_transformer_engine_keeps_norms_beside_their_products() -> None:
    norm = dtypes.kind_of("backbone.layers.0.norm.weight")
    router = dtypes.kind_of("backbone.layers.1.mixer.gate.weight")
    assert dtypes.learner_dtype(norm, "hopper_fp8", "te") == "bfloat16"
    assert dtypes.learner_dtype(router, "hopper_fp8", "te") == "float32"


def test_our_engine_holds_every_weight_in_fp32() -> None:
    config = tiny_config()
    named = {name: tensor.to(torch.bfloat16) for name, tensor in random_weights(config, 1).items()}
    plain = DecodeModel(config, named)
    held = [plain.embeddings, plain.norm_f, plain.lm_head]
    for layer in plain.layers:
        held += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert len(held) > 3 * len(plain.layers)
    assert {tensor.dtype for tensor in held if tensor.is_floating_point()} == {torch.float32}
    assert _blob(config, named)[0].dtype == torch.float32


def test_a_refit_counts_what_an_engine_rounds_and_refuses_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    third = torch.full((4,), 1.0 / 3.0)
    ours, theirs = Rounding("local"), Rounding("trtllm")
    assert not ours.possible and theirs.possible
    for name in ("backbone.norm_f.weight", "backbone.layers.2.mixer.gate.weight", "backbone.layers.0.mixer.A_log"):
        ours.add(name, third)
        theirs.add(name, third)
    theirs.add("backbone.layers.0.norm.weight", torch.ones(4))  # exact in bf16: nothing is lost
    theirs.add("lm_head.weight", third.to(torch.bfloat16).float())  # a bf16 weight in an fp32 file
    with caplog.at_level("INFO"):
        ours.report(0)
        theirs.report(1)
        assert caplog.messages == []
        theirs.report(0)
    assert caplog.messages == ["refit: engine trtllm rounds to bfloat16: 1 norm, 1 router"]
    with pytest.raises(UserError, match="engine trtllm holds lm_head.weight in bfloat16, which would round"):
        theirs.add("lm_head.weight", third)
    with pytest.raises(UserError, match="'vllm' is not one of local, trtllm"):
        Rounding("vllm")


def test_the_page_shows_the_table() -> None:
    assert render() in PAGE.read_text(encoding="utf-8"), "run python -m tools.precision_table --write"
    assert "| norm | fp32 | fp32 | fp32 | fp32 | fp32 | fp32 | fp32 |" in render()
