"""Which layouts of the 30B model run, and which of its layers FP8 leaves out."""

from __future__ import annotations

import dataclasses

import pytest
from megatron.core.quantization.utils import get_quant_config_or_none

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.layout_rules import Cut, fp8_exempt, fp8_problem, fp8_widths, problems
from nemo_cascade.models.precision import transformer_options

LARGE = NemotronHConfig.preset("nemotron_3_nano_30b_a3b")


@pytest.mark.parametrize(
    "cut",
    [Cut(), Cut(tensor=2, expert=8), Cut(tensor=4, pipeline=2, context=4, expert=8), Cut(tensor=8), Cut(context=8),
     Cut(tensor=4, context=2), Cut(tensor=8, context=4), Cut(pipeline=4), Cut(pipeline=13)],
)  # fmt: skip
def test_layouts_of_the_large_model_that_run(cut: Cut) -> None:
    assert list(problems(LARGE, cut)) == []


@pytest.mark.parametrize(
    ("cut", "key", "reason"),
    [
        (Cut(tensor=16), "tensor_parallel", "16 does not divide the model's n_groups 8"),
        (Cut(tensor=3), "tensor_parallel", "3 neither divides the model's num_key_value_heads 2 nor is a multiple"),
        (Cut(pipeline=3), "pipeline_parallel", "3 does not divide the 52 layers"),
        (Cut(expert=3), "expert_parallel", "3 does not divide the model's n_routed_experts 128"),
        (Cut(tensor=8, context=16), "context_parallel", "16 does not divide the 8 Mamba heads"),
    ],
)
def test_layouts_that_cannot_run_say_why(cut: Cut, key: str, reason: str) -> None:
    found = dict(problems(LARGE, cut))
    assert any(reason in text for text in found.values())
    assert key in found


def test_context_ranks_share_groups_evenly() -> None:
    three = dataclasses.replace(LARGE, n_groups=4, mamba_num_heads=48)
    assert "6 neither divides the 4 Mamba groups" in dict(problems(three, Cut(context=6)))["context_parallel"]


def test_fp8_widths_of_the_large_model() -> None:
    assert fp8_widths(LARGE, 1)["mixer.in_proj"] == (10304, 2688)
    assert fp8_widths(LARGE, 4)["mixer.in_proj"] == (2576, 2688)
    assert fp8_widths(LARGE, 4)["mlp.experts.linear_fc1"] == (1856, 2688)
    assert fp8_widths(LARGE, 2)["self_attention.linear_qkv"] == (2304, 2688)


def test_fp8_leaves_out_what_its_scales_do_not_divide() -> None:
    hopper = fp8_exempt(LARGE, 1, "hopper_fp8")
    assert sorted(hopper) == ["mixer.in_proj", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    assert hopper["mixer.in_proj"].startswith("width 10,304 is no multiple of 128")
    assert fp8_exempt(LARGE, 2, "blackwell_mxfp8") == {}
    cut = fp8_exempt(LARGE, 4, "blackwell_mxfp8")
    assert cut["mixer.in_proj"] == (
        "width 2,576 after tensor_parallel 4 is no multiple of 32, and it has one scale per 32 values"
    )
    assert fp8_exempt(LARGE, 1, "bf16") == {}


def test_fp8_that_would_leave_nothing_in_fp8_is_a_problem() -> None:
    assert fp8_problem(LARGE, 4, "hopper_fp8") == ""
    narrow = dataclasses.replace(LARGE, hidden_size=2000)
    assert fp8_problem(narrow, 1, "hopper_fp8").startswith("hopper_fp8 leaves no layer in FP8: mixer.in_proj")
    assert fp8_problem(narrow, 1, "bf16") == ""


def test_megatron_is_told_which_modules_stay_bf16() -> None:
    recipe = transformer_options("hopper_fp8", "te", fp8_exempt(LARGE, 1, "hopper_fp8"))["quant_recipe"]
    for path, key in (
        ("decoder.layers.3.mlp.experts.linear_fc1", "bf16"),
        ("decoder.layers.0.mixer.in_proj", "bf16"),
        ("decoder.layers.0.mixer.out_proj", None),
        ("decoder.layers.3.mlp.shared_experts.linear_fc1", None),
    ):
        found = get_quant_config_or_none(path, recipe)
        assert (found.config_key if found else None) == key
