"""The C mixer against the recurrence as the paper writes it, and against the PyTorch one inside a model."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import mamba, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.mixer_native import CHUNK, MixerSizes, library, mix
from nemo_cascade.models.packed import packed_row
from tests.numerics.test_mixer import recurrence

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(library() is None, reason="no C compiler"),
]

CONFIG = NemotronHConfig(
    vocab_size=16, hidden_size=24, hybrid_override_pattern="M", num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=6, n_groups=2, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=4, moe_shared_expert_intermediate_size=4, chunk_size=8,
)  # fmt: skip
WIDER = dataclasses.replace(CONFIG, mamba_num_heads=2, mamba_head_dim=48, n_groups=1, conv_kernel=CHUNK + 3)
# whole tiles and their remainders
SQUARES = dataclasses.replace(CONFIG, mamba_head_dim=32, ssm_state_size=18, conv_kernel=2)
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 1]


@torch.no_grad()
def mixer_of(config: NemotronHConfig, layout: ParallelLayout) -> Mamba2Mixer:
    """A mixer with every parameter away from its start."""
    torch.manual_seed(3)  # dt_bias and A_log start at random
    generator = torch.Generator().manual_seed(2)
    mixer = nemotron_h.build(config, layout).decoder.layers[0].mixer
    for name, parameter in mixer.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn * 0.5 if "proj" in name or "conv" in name else parameter + 0.3 * drawn)
    return mixer


def problem(config: NemotronHConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sum(LENGTHS), config.hidden_size, generator=generator)
    upstream = torch.randn(hidden.shape, generator=generator)
    return hidden, upstream, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def differentiated(mixer: Mamba2Mixer, config: NemotronHConfig) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    hidden, upstream, bounds = problem(config)
    hidden.requires_grad_()
    mixer.zero_grad()
    output = mixer(hidden.unsqueeze(1), packed_seq_params=packed_row(bounds, config.chunk_size))[0].squeeze(1)
    (output * upstream).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    return grads | {"output": output.detach(), "hidden": hidden.grad}


@pytest.mark.parametrize(
    ("config", "forgetful"), [(CONFIG, False), (WIDER, False), (SQUARES, False), (CONFIG, True), (SQUARES, True)]
)
def test_values_and_gradients_equal_the_recurrence_in_float64(
    layout: ParallelLayout, config: NemotronHConfig, forgetful: bool
) -> None:
    """To 5e-6 of the largest entry, over packed boundaries; PyTorch in fp32 is within 5e-6, too.

    `forgetful`: the first head forgets all at some tokens (exp(-500)) and little at others. There 1e-5: exp of
    differences of sums, which is how PyTorch makes a decay, is off by 2e-5.
    """
    mixer = mixer_of(config, layout)
    if forgetful:
        with torch.no_grad():
            mixer.A_log[0], mixer.dt_bias[0] = 5.0, -3.0
    assert mixer.sizes.usable(torch.zeros(1))
    found = differentiated(mixer, config)
    hidden, upstream, bounds = problem(config)
    naive = {name: parameter.detach().double().requires_grad_() for name, parameter in mixer.named_parameters()}
    hidden = hidden.double().requires_grad_()
    output = torch.cat([recurrence(naive, config, hidden[a:b]) for a, b in itertools.pairwise(bounds.tolist())])
    (output * upstream).sum().backward()
    expected = {name: tensor.grad for name, tensor in naive.items()} | {
        "output": output.detach(),
        "hidden": hidden.grad,
    }
    for name, value in expected.items():
        assert value.abs().max() > 1e-3, name
        assert (found[name] - value).abs().max() < (1e-5 if forgetful else 5e-6) * value.abs().max(), name


def test_it_is_the_pytorch_mixer_to_rounding(layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, ran = mixer_of(CONFIG, layout), []
    monkeypatch.setattr(mamba, "mix", lambda *args: ran.append(1) or mix(*args))
    native = differentiated(mixer, CONFIG)
    monkeypatch.setattr(MixerSizes, "usable", lambda self, row: False)
    plain = differentiated(mixer, CONFIG)
    assert ran == [1]
    for name, value in plain.items():
        assert (native[name] - value).abs().max() < 1e-5 * value.abs().max(), name


def test_a_sequence_has_the_same_bits_alone_and_packed(layout: ParallelLayout) -> None:
    mixer = mixer_of(CONFIG, layout)
    hidden, _, bounds = problem(CONFIG)
    projected = mixer.in_proj(hidden.unsqueeze(1))[0][:, 0].detach().requires_grad_()
    conv = mixer.conv1d.weight.squeeze(1)
    weights = (conv, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    packed = mix(projected, weights, bounds.tolist(), mixer.sizes)
    (packed_grad,) = torch.autograd.grad((packed**2).sum(), projected)
    for begin, end in itertools.pairwise(bounds.tolist()):
        row = projected[begin:end].detach().requires_grad_()
        alone = mix(row, weights, [0, end - begin], mixer.sizes)
        (alone_grad,) = torch.autograd.grad((alone**2).sum(), row)
        assert torch.equal(alone, packed[begin:end])
        assert torch.equal(alone_grad, packed_grad[begin:end])
    assert packed.abs().max() > 0.1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(layout: ParallelLayout, bad: float) -> None:
    """In every column of one token: its sequence's output and gradients say so, other sequences' rows do not."""
    mixer = mixer_of(CONFIG, layout)
    hidden, _, bounds = problem(CONFIG)
    projected = mixer.in_proj(hidden.unsqueeze(1))[0][:, 0].detach()
    conv = mixer.conv1d.weight.squeeze(1)
    weights = (conv, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    begin, end = bounds.tolist()[5:7]
    for column in range(projected.shape[1]):
        row = projected.clone()
        row[begin + 20, column] = bad
        row.requires_grad_()
        out = mix(row, weights, bounds.tolist(), mixer.sizes)
        (grad,) = torch.autograd.grad((out**2).sum(), row)
        assert not out[begin + 20 : end].isfinite().all(), column
        assert not grad[begin:end].isfinite().all(), column
        for value in (out, grad):
            assert value[:begin].isfinite().all() and value[end:].isfinite().all()


def test_what_it_does_not_take_goes_to_pytorch() -> None:
    sizes = MixerSizes(heads=4, width=16, groups=2, state=6, taps=4, eps=1e-5)
    row = torch.zeros(3, 4)
    assert sizes.usable(row)
    assert not sizes.usable(row.double())
    assert not sizes.usable(row.bfloat16())
    assert not dataclasses.replace(sizes, width=8).usable(row)
    assert not dataclasses.replace(sizes, state=5).usable(row)
    torch.set_num_threads(2)
    assert not sizes.usable(row)


def test_without_gradient_no_state_is_kept_and_the_values_are_the_same(layout: ParallelLayout) -> None:
    mixer = mixer_of(CONFIG, layout)
    hidden, _, bounds = problem(CONFIG)
    row = packed_row(bounds, CONFIG.chunk_size)
    wanted, _ = mixer(hidden.unsqueeze(1), packed_seq_params=row)
    with torch.no_grad():
        found, _ = mixer(hidden.unsqueeze(1), packed_seq_params=row)
    assert wanted.requires_grad and not found.requires_grad
    assert torch.equal(found, wanted)
