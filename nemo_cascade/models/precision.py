"""Precision profiles: what the name in hardware.precision means to Megatron-core."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.quantization.quant_config import GlobMatcher, Matcher, RecipeConfig

from nemo_cascade.types import UserError

_FP8: dict[str, dict[str, Any]] = {
    # Hopper: e4m3 for activations, weights and gradients with 128-wide block scales.
    "hopper_fp8": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    # Blackwell: microscaling, one scale per 32 values in hardware.
    "blackwell_mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}


def transformer_options(precision: str, spec: str, exempt: Iterable[str] = ()) -> dict[str, Any]:
    """TransformerConfig arguments of a precision profile; `exempt` modules stay bf16 under FP8.

    An fp8 profile without Transformer Engine's layers is an error: megatron-core would train in bf16 in silence.
    """
    if precision == "fp32":
        return {"params_dtype": torch.float32}
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    if precision == "bf16":
        return bf16
    if precision not in _FP8:
        raise UserError(f"hardware.precision: {precision!r} is not one of fp32, bf16, {', '.join(_FP8)}")
    if spec != "te":
        raise UserError(f"hardware.precision: {precision} needs hardware.layer_spec: te, got {spec}")
    # The first and last layers stay in bf16, as NVIDIA's recipes for this family do.
    return {**bf16, **_FP8[precision], "first_last_layers_bf16": True, "quant_recipe": _bf16_modules(exempt)}


def _bf16_modules(names: Iterable[str]) -> RecipeConfig:
    """Megatron's per-module recipe that switches FP8 off in the modules whose path ends in one of these names."""
    matchers: list[Matcher] = [GlobMatcher(f"*{name}", "bf16") for name in names]
    off = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
    return RecipeConfig(matchers, {"bf16": off})
