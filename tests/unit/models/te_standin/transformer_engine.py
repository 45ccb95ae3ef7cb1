"""Transformer Engine's layers in plain PyTorch under its own names and arguments (2.11).

With it megatron-core's wrappers and our te spec can be built and run where there is no GPU. It shows that names,
arguments and the order of operations fit; what the real kernels compute, tests/gpu shows.

One file instead of a package: the submodules that megatron-core imports are registered at the end.
"""

import contextlib
import sys
import types

import torch
import torch.nn.functional as F

__version__ = "2.11.0"
__path__: list[str] = []


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
        delay_wgrad_compute=False, symmetric_ar_type=None,
    ):  # fmt: skip
        super().__init__()
        assert not bias and tp_size == 1
        self.in_features, self.out_features, self.parallel_mode, self.use_bias = (
            in_features, out_features, parallel_mode, bias
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)

    def forward(self, inp, is_first_microbatch=None):
        return inp @ self.weight.t()


class LayerNormLinear(Linear):
    """Named by megatron-core, used by no layer of ours."""


class GroupedLinear(torch.nn.Module):
    def __init__(
        self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
        tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
        return_bias=False, params_dtype=None, parallel_mode=None, device="cpu", ub_name=None, delay_wgrad_compute=False,
    ):  # fmt: skip
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            init_method(weight)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        parts = inp.split(m_splits)
        return torch.cat([part @ getattr(self, f"weight{index}").t() for index, part in enumerate(parts)])


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
    """FP8 is never on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = False, **_: object):
    assert not enabled
    yield


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


layers = (RMSNorm, LayerNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention)
pytorch = submodule(
    "pytorch",
    **{layer.__name__: layer for layer in layers},
    fp8=submodule("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast),
    **{name: submodule(f"pytorch.{name}", __getattr__=unused) for name in ("ops", "distributed", "router", "tensor")},
)
common = submodule("common", recipe=submodule("common.recipe", __getattr__=unused))
