"""Precision profiles on Megatron-core: what a hardware.precision makes of the config and of the built model."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.quantization.quant_config import GlobMatcher, Matcher, RecipeConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from nemo_cascade.models.dtypes import Profile, profile_of
from nemo_cascade.models.fp8_emulation import RECIPES, fp8_linear
from nemo_cascade.models.linear import parallel_linear
from nemo_cascade.models.moe import LocalExperts
from nemo_cascade.types import UserError

BF16_LAYERS = 2  # at each end of the model; NVIDIA's FP8 recipes for this family keep as many in bf16


def transformer_options(
    precision: str, spec: str, exempt: Iterable[str] = (), bf16_layers: int = BF16_LAYERS
) -> dict[str, Any]:
    """TransformerConfig arguments of a precision profile; `exempt` modules and `bf16_layers` at each end stay bf16.

    An fp8 profile without Transformer Engine's layers is an error: megatron-core would train in bf16 in silence.
    """
    profile = profile_of(precision)
    check_spec(profile, spec)
    if profile.matrices == "float32":
        return {"params_dtype": torch.float32}
    options: dict[str, Any] = {"params_dtype": torch.bfloat16, "bf16": True}
    if profile.recipe is None:
        return options
    # Megatron's own names; with the emulation `fp8` stays off and only we read them.
    options |= {
        "first_last_layers_bf16": bf16_layers > 0,
        "num_layers_at_start_in_bf16": bf16_layers,
        "num_layers_at_end_in_bf16": bf16_layers,
    }
    if profile.emulated:
        return options
    return options | {"fp8": "e4m3", "fp8_recipe": profile.recipe, "quant_recipe": _bf16_modules(exempt)}


def _bf16_modules(names: Iterable[str]) -> RecipeConfig:
    """Megatron's per-module recipe that switches FP8 off in the modules whose path ends in one of these names."""
    matchers: list[Matcher] = [GlobMatcher(f"*{name}", "bf16") for name in names]
    off = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
    return RecipeConfig(matchers, {"bf16": off})


def check_spec(profile: Profile, spec: str) -> None:
    """FP8 runs in Transformer Engine's layers, its emulation in ours."""
    if profile.needs_te and spec != "te":
        raise UserError(
            f"hardware.precision: {profile.name} needs hardware.layer_spec: te, got {spec}; to see what FP8 does "
            f"without a GPU set {profile.name}_emulated"
        )
    if profile.emulated and spec != "local":
        raise UserError(
            f"hardware.precision: {profile.name} needs hardware.layer_spec: local, got {spec}; with Transformer "
            f"Engine set {profile.name.removesuffix('_emulated')}"
        )


def check_installed(precision: str, spec: str) -> None:
    """Refuse an FP8 profile whose Transformer Engine is missing or was imported with other scales."""
    profile = profile_of(precision)
    check_spec(profile, spec)
    if not profile.needs_te:
        return
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"hardware.precision: {profile.name} needs the package transformer_engine (2.9 to 2.11), which is not "
            "installed; run in the GPU container, or set precision: bf16 and layer_spec: local"
        )
    for name, value in (profile.environment or {}).items():
        if os.environ.get(name) != value:
            raise UserError(f"hardware.precision: {profile.name} needs {name}={value} in the environment; set it")
    if profile.recipe == "blockwise":
        from transformer_engine.common.recipe import Float8BlockScaling

        if Float8BlockScaling().fp8_quant_fwd_inp.power_2_scale:
            raise UserError(
                f"hardware.precision: {profile.name}: Transformer Engine was imported before {profile.environment} was "
                "set and would scale by powers of two; set it before the process starts"
            )


def apply(model: torch.nn.Module, precision: str, spec: str) -> None:
    """Give a freshly built model the dtypes of the table, and the emulation where the profile asks for it.

    Megatron builds everything in `params_dtype`; here the tensors that are fp32 in every profile become so.
    """
    profile = profile_of(precision)
    if profile.matrices != "float32":
        for name, parameter in model.named_parameters():
            if is_wide(name, spec):
                parameter.data = parameter.data.float()
    if profile.emulated:
        assert profile.recipe is not None
        _emulate(model, profile.recipe)


def is_wide(name: str, spec: str) -> bool:
    """Whether a Megatron parameter is fp32 in every profile: router, A_log, D, dt_bias and, in `local`, the norms."""
    last = name.rsplit(".", 2)[-2:]
    if last[-1] in ("A_log", "D", "dt_bias") or last == ["router", "weight"]:
        return True
    return spec == "local" and last[-1] == "weight" and last[0].endswith("norm")


def _emulate(model: torch.nn.Module, recipe_name: str) -> None:
    """Round the products of the linear layers that Transformer Engine would run in FP8.

    Those inside the layers: projections and experts. Router, embedding, output layer, convolution and scan are not.
    Widths that Transformer Engine's kernels do not take (layout_rules.fp8_exempt) are rounded, too, with a shorter last
    block: small models have nothing but such widths.
    """
    recipe = RECIPES[recipe_name]
    for layer in model.decoder.layers:
        if is_first_last_bf16_layer(layer.config, layer.layer_number - 1):
            continue
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                # Each rank quantises its own shard, as Transformer Engine does: a shard whose width is no multiple of
                # the block has a shorter last block, so a layout can change the rounding.
                module._forward_impl = functools.partial(parallel_linear, functools.partial(fp8_linear, recipe=recipe))
            elif isinstance(module, LocalExperts):
                module.fp8 = recipe
