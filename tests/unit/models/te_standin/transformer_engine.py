"""Transformer Engine's layers in plain PyTorch under its own names and arguments (2.11).

With it megatron-core's wrappers and our te spec can be built and run where there is no GPU. It shows that names,
arguments and the order of operations fit; what the real kernels compute, tests/gpu shows. `PRODUCTS` says which layer
multiplied in which FP8 recipe; products in FP8 are those of our emulation.

One file instead of a package: the submodules that megatron-core imports are registered at the end.
"""

import contextlib
import dataclasses
import enum
import os
import sys
import types

import torch
import torch.nn.functional as F

__version__ = "2.11.0"
__path__: list[str] = []


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class DelayedScaling:
    """Named by megatron-core, used by no profile of ours."""


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool


@dataclasses.dataclass(frozen=True)
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    # read once, when Transformer Engine is imported
    fp8_quant_fwd_inp: QParams = QParams(os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "") in ("", "0"))


@dataclasses.dataclass(frozen=True)
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3


Recipe = Float8BlockScaling | MXFP8BlockScaling


@dataclasses.dataclass(frozen=True)
class Product:
    """One product y = x W^T of a layer, or one per expert: in which recipe (None: bf16), of how many tokens each."""

    layer: torch.nn.Module
    recipe: Recipe | None
    tokens: tuple[int, ...]


PRODUCTS: list[Product] = []


def multiply(layer: torch.nn.Module, parts: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """The products of one layer under the autocast that it is called in."""
    recipe = FP8GlobalStateManager.recipes[-1]
    PRODUCTS.append(Product(layer, recipe, tuple(part[..., 0].numel() for part in parts)))
    if recipe is None:
        return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])
    from nemo_cascade.models.fp8_emulation import BLOCKWISE, MXFP8, fp8_linear

    rounding = BLOCKWISE if isinstance(recipe, Float8BlockScaling) else MXFP8
    return torch.cat([fp8_linear(part, weight, rounding) for part, weight in zip(parts, weights, strict=True)])


class RMSNorm(torch.nn.Module):
    def __init__(
        self, hidden_size, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False, device="cpu"
    ):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class LayerNorm(torch.nn.Module):
    """Named by megatron-core, used by no NemotronH."""


class Linear(torch.nn.Module):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, device="cpu", ub_overlap_ag=False, ub_overlap_rs=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False,
    ):  # fmt: skip
        super().__init__()
        assert not bias and tp_size == 1
        self.save_original_input = save_original_input  # megatron-core sets it where FP8 would keep both forms of x
        self.in_features, self.out_features, self.parallel_mode, self.use_bias = (
            in_features, out_features, parallel_mode, bias
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)

    def forward(self, inp, is_first_microbatch=None):
        return multiply(self, [inp], [self.weight])


class LayerNormLinear(Linear):
    """Named by megatron-core, used by no layer of ours."""


class GroupedLinear(torch.nn.Module):
    def __init__(
        self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
        tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
        return_bias=False, params_dtype=None, parallel_mode=None, device="cpu", ub_name=None, delay_wgrad_compute=False,
        save_original_input=False,
    ):  # fmt: skip
        super().__init__()
        assert not bias
        self.save_original_input = save_original_input
        self.num_gemms, self.use_bias = num_gemms, bias
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            init_method(weight)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return multiply(self, list(inp.split(m_splits)), weights)


class Fp8Padding(torch.nn.Module):
    """Each expert's tokens filled up with zeros to what the recipe's kernels take."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.align_size = align_size

    def forward(self, inp, m_splits):
        size = self.align_size or (32 if isinstance(FP8GlobalStateManager.recipes[-1], MXFP8BlockScaling) else 16)
        padded = [-(-count // size) * size for count in m_splits]
        parts = zip(inp.split(m_splits), m_splits, padded, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, whole - count)) for part, count, whole in parts]), padded


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.align_size = align_size

    def forward(self, inp, m_splits):
        size = self.align_size or (32 if isinstance(FP8GlobalStateManager.recipes[-1], MXFP8BlockScaling) else 16)
        parts = inp.split([-(-count // size) * size for count in m_splits])
        return torch.cat([part[:count] for part, count in zip(parts, m_splits, strict=True)])


class DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, attn_mask_type="causal",
        sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None,
        attention_type="self", softmax_scale=None,
    ):  # fmt: skip
        super().__init__()
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self, query, key, value, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
        cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None,
        attn_mask_type=None,
    ):  # fmt: skip
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and max_seqlen_q > 0
        sizes = torch.diff(cu_seqlens_q).tolist()
        rows = []
        for q, k, v in zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            rows.append(mixed[0].transpose(0, 1))
        return torch.cat(rows).flatten(1)


class FP8GlobalStateManager:
    """The recipes of the autocasts that are open, innermost last; None where FP8 is off."""

    recipes: list[Recipe | None] = [None]  # noqa: RUF012 - one for the process, as Transformer Engine's

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipes[-1] is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    assert not enabled or isinstance(fp8_recipe, Recipe)
    FP8GlobalStateManager.recipes.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        FP8GlobalStateManager.recipes.pop()


class Unused:
    """What megatron-core names at import and a NemotronH never uses."""


def submodule(name: str, **content: object) -> types.ModuleType:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__path__ = []
    vars(module).update(content)
    sys.modules[module.__name__] = module
    return module


def unused(name: str) -> type[Unused]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unused


class NeedsCard:
    """An optimizer or a function over lists of tensors: CUDA kernels."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no CUDA-capable device is detected")


layers = (
    RMSNorm, LayerNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention, Fp8Padding, Fp8Unpadding,
)  # fmt: skip
pytorch = submodule(
    "pytorch",
    fp8_autocast=fp8_autocast,
    **{layer.__name__: layer for layer in layers},
    fp8=submodule("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast),
    **{name: submodule(f"pytorch.{name}", __getattr__=unused) for name in ("ops", "distributed", "router", "tensor")},
)
over_lists = ("multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale", "FusedAdam", "FusedSGD")
submodule("pytorch.optimizers", **dict.fromkeys(over_lists, NeedsCard))
recipes = (Format, DelayedScaling, Float8BlockScaling, MXFP8BlockScaling)
common = submodule(
    "common", recipe=submodule("common.recipe", **{kind.__name__: kind for kind in recipes}, __getattr__=unused)
)
