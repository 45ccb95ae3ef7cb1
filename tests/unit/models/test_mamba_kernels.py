"""The mixer on mamba-ssm's kernels, which stand-ins in PyTorch take the place of: same values, same gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_cascade.models import mixer_native, nemotron_h, spec
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.packed import packed_row
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.types import UserError

STANDIN = Path(__file__).with_name("mamba_standin")
OURS = "nemo_cascade.models.mamba_kernels"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`models/mamba_kernels.py` as it is imported where mamba_ssm and causal_conv1d are installed."""
    monkeypatch.setattr(mixer_native, "library", lambda: None)  # the C mixer would take the place of both
    monkeypatch.syspath_prepend(str(STANDIN))
    yield importlib.import_module(OURS)
    for name in [name for name in sys.modules if name == OURS or name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        del sys.modules[name]


@torch.no_grad()
def mixers(
    kernels: ModuleType, config: NemotronHConfig, layout: ParallelLayout, precision: str
) -> tuple[Mamba2Mixer, Mamba2Mixer]:
    """PyTorch's and the kernels' with the same weights, away from their start."""
    built = [nemotron_h.build(config, layout, precision).decoder.layers[0].mixer for _ in range(2)]
    generator = torch.Generator().manual_seed(2)
    for name, parameter in built[0].named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn * (0.1 if "proj" in name else 0.5) if "norm" not in name else parameter + 0.3 * drawn)
    built[1].load_state_dict(built[0].state_dict())
    built[1].__class__ = kernels.KernelMixer
    return built[0], built[1]


def run(mixer: Mamba2Mixer, lengths: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input and of every parameter, in fp32."""
    generator, hidden = torch.Generator().manual_seed(5), mixer.config.hidden_size
    x = torch.randn(sum(lengths), 1, hidden, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mixer.zero_grad()
    out, bias = mixer(x, packed_seq_params=packed_row(bounds, mixer.shape.chunk_size))
    assert bias is None and out.dtype == dtype
    (out.float() * upstream).sum().backward()
    gradients = {name: parameter.grad.float() for name, parameter in mixer.named_parameters()}
    return {"output": out.detach().float(), "input": x.grad.float(), **gradients}


@pytest.mark.parametrize(
    ("precision", "dtype", "close"), [("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("lengths", [[70], [33, 1, 4, 64, 7]], ids=["one sequence", "packed"])
@pytest.mark.parametrize("conv", [True, False], ids=["causal_conv1d", "without it"])
def test_values_and_gradients_are_those_of_pytorch(
    kernels: ModuleType, config: NemotronHConfig, layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch,
    conv: bool, lengths: list[int], precision: str, dtype: torch.dtype, close: float,
) -> None:  # fmt: skip
    ours, theirs = mixers(kernels, config, layout, precision)
    if not conv:
        monkeypatch.setattr(kernels, "causal_conv1d_fn", None)
    expected, found = run(ours, lengths, dtype), run(theirs, lengths, dtype)
    assert found.keys() == expected.keys() and len(found) == 10
    for name, value in expected.items():
        gap = float((found[name] - value).abs().max() / value.abs().max())
        assert gap < close, (name, gap)
    calls = sys.modules["mamba_ssm.ops.triton.ssd_combined"].CALLS
    if conv:  # the row as it is, in one call
        assert [call[:2] for call in calls] == [(1, sum(lengths))]
    else:
        assert len(calls) == len(packed_row(torch.tensor([0, *lengths]).cumsum(0).int(), 32).layout.blocks)
    assert bool(sys.modules["causal_conv1d"].CALLS) == conv


def test_a_row_whose_places_int32_cannot_count_is_cut_into_its_sequences(
    kernels: ModuleType, config: NemotronHConfig, layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mixer = mixers(kernels, config, layout, "fp32")
    lengths = [33, 4]
    expected = run(mixer, lengths, torch.float32)
    monkeypatch.setattr(kernels, "PLACES", 37 * (2 * mixer.inner + 2 * mixer.groups * mixer.state + mixer.heads))
    found = run(mixer, lengths, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert [call[:2] for call in sys.modules["mamba_ssm.ops.triton.ssd_combined"].CALLS] == [(1, 37), (2, 40)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_is_the_one_in_pytorch(
    kernels: ModuleType, config: NemotronHConfig, layout: ParallelLayout, dtype: torch.dtype, close: float
) -> None:
    """Its weight is fp32 in both dtypes; the layers of the local spec begin with it where the kernels' mixer runs."""
    assert kernels.KernelMixer.norm_class is kernels.KernelRMSNorm
    built = nemotron_h.build(config, layout).decoder.layers[0].norm
    found, generator = [], torch.Generator().manual_seed(3)
    with torch.no_grad():
        built.weight.copy_(torch.rand(built.weight.shape, generator=generator) + 0.5)
    x, upstream = (torch.randn(11, 1, config.hidden_size, generator=generator).to(dtype) for _ in range(2))
    for kind in (type(built), kernels.KernelRMSNorm):
        built.__class__, own = kind, x.clone().requires_grad_()
        built.zero_grad()
        out = built(own)
        out.backward(upstream)
        found.append((out.detach(), own.grad, built.weight.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() < close * one.abs().max()
    assert sys.modules["mamba_ssm.ops.triton.layernorm_gated"].CALLS == [tuple(x.shape)]


def test_channels_that_the_convolution_kernel_does_not_take_stay_in_pytorch(
    kernels: ModuleType, layout: ParallelLayout
) -> None:
    """Channels last it wants multiples of 8; 2 heads of 6 and 2 groups of 4 states are 28 channels."""
    odd = NemotronHConfig(
        vocab_size=16, hidden_size=12, hybrid_override_pattern="M", num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, mamba_num_heads=2, mamba_head_dim=6, ssm_state_size=4, n_groups=2, n_routed_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=4, moe_shared_expert_intermediate_size=4, chunk_size=8,
    )  # fmt: skip
    ours, theirs = mixers(kernels, odd, layout, "fp32")
    expected, found = run(ours, [9, 20], torch.float32), run(theirs, [9, 20], torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert not sys.modules["causal_conv1d"].CALLS


def test_kernels_that_cannot_be_imported_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade of torch, for which they were not built."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    with pytest.raises(UserError, match=r"mamba_ssm is installed and cannot be imported \(undefined symbol.*uninstall"):
        spec.mixer_class()


def test_without_a_card_the_local_spec_scans_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STANDIN))
    assert spec.local_parts("bf16").mixer is Mamba2Mixer
