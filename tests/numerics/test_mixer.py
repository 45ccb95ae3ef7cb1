"""The Mamba-2 mixer against the recurrence as the paper writes it, one token at a time, in float64.

Values and gradients of the input and of every parameter to 1e-10, over packed boundaries; the same for decoding with
carried state; and the mixer of two tensor-parallel ranks as the sum of its halves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode_layers import MambaLayer, Rows
from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.packed import packed_row

CHUNK = 8
CONFIG = NemotronHConfig(
    vocab_size=16, hidden_size=12, hybrid_override_pattern="M", num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, mamba_num_heads=8, mamba_head_dim=4, ssm_state_size=6, n_groups=2, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=4, moe_shared_expert_intermediate_size=4, chunk_size=CHUNK,
)  # fmt: skip
Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def double_mixer(config: NemotronHConfig, layout: ParallelLayout) -> Mamba2Mixer:
    """A mixer in float64 with every parameter away from its start."""
    generator = torch.Generator().manual_seed(2)
    mixer = nemotron_h.build(config, layout).decoder.layers[0].mixer.double()
    assert isinstance(mixer, Mamba2Mixer)
    for name, parameter in mixer.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(drawn * 0.5 if "proj" in name or "conv" in name else parameter + 0.3 * drawn)
    return mixer


def recurrence(weights: Weights, config: NemotronHConfig, hidden_T: torch.Tensor) -> torch.Tensor:
    """The mixer's output for one sequence [T, hidden], token by token from a zero state."""
    heads, width, groups, size = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
    inner, bc = heads * width, groups * size
    window = [torch.zeros(config.conv_channels, dtype=hidden_T.dtype)] * config.conv_kernel
    state = torch.zeros(heads, width, size, dtype=hidden_T.dtype)
    outputs = []
    for hidden in hidden_T:
        z, x, B, C, dt = (weights["in_proj.weight"] @ hidden).split([inner, inner, bc, bc, heads])
        window = [*window[1:], torch.cat([x, B, C])]
        taps = weights["conv1d.weight"][:, 0].unbind(1)
        mixed = weights["conv1d.bias"] + sum(tap * past for tap, past in zip(taps, window, strict=True))
        x, B, C = (mixed * torch.sigmoid(mixed)).split([inner, bc, bc])
        dt = torch.log1p(torch.exp(dt + weights["dt_bias"]))
        x = x.view(heads, width)
        B, C = (part.view(groups, size).repeat_interleave(heads // groups, 0) for part in (B, C))
        decay = torch.exp(-torch.exp(weights["A_log"]) * dt)
        state = decay[:, None, None] * state + dt[:, None, None] * x[:, :, None] * B[:, None, :]
        y = (state * C[:, None, :]).sum(-1) + weights["D"][:, None] * x
        gated = (y.flatten() * z * torch.sigmoid(z)).view(groups, -1)
        normed = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + config.layer_norm_epsilon)
        outputs.append(weights["out_proj.weight"] @ (normed.flatten() * weights["norm.weight"]))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "lengths",
    [
        [1], [CHUNK - 1], [CHUNK], [CHUNK + 1],
        [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 1, 2, 3 * CHUNK],
        [CHUNK] * 3,
    ],
)  # fmt: skip
def test_values_and_gradients_equal_the_recurrence(layout: ParallelLayout, lengths: list[int]) -> None:
    mixer = double_mixer(CONFIG, layout)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sum(lengths), CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()

    ours_in = hidden.clone().requires_grad_()
    ours, _ = mixer(ours_in.unsqueeze(1), packed_seq_params=packed_row(bounds, CHUNK))
    (ours.squeeze(1) * weight).sum().backward()

    naive = {name: parameter.detach().clone().requires_grad_() for name, parameter in mixer.named_parameters()}
    theirs_in = hidden.clone().requires_grad_()
    theirs = torch.cat([recurrence(naive, CONFIG, theirs_in[a:b]) for a, b in itertools.pairwise(bounds.tolist())])
    (theirs * weight).sum().backward()

    assert theirs.std() > 0.3
    assert (ours.squeeze(1) - theirs).abs().max() < 1e-10
    assert (ours_in.grad - theirs_in.grad).abs().max() < 1e-10
    assert set(naive) == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"
    }  # fmt: skip
    for name, parameter in mixer.named_parameters():
        if name != "A_log" or max(lengths) > 1:  # the first token of a sequence meets no decay
            assert naive[name].grad.abs().max() > 1e-3, name
        assert (parameter.grad - naive[name].grad).abs().max() < 1e-10, name


@torch.no_grad()
@pytest.mark.parametrize("read", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 31, 32, 33])
def test_decoding_with_carried_state_equals_the_recurrence(layout: ParallelLayout, read: int) -> None:
    """`read` tokens at once, the rest one by one, beside a neighbour of another length in the same batch."""
    mixer = double_mixer(CONFIG, layout)
    weights = dict(mixer.named_parameters())
    generator = torch.Generator().manual_seed(6)
    norm = 1.0 + 0.2 * torch.randn(CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    layer = MambaLayer(CONFIG, {"norm.weight": norm} | {f"mixer.{name}": tensor for name, tensor in weights.items()})
    steps, lengths = 10, [read, 5]
    texts = [
        torch.randn(length + steps, CONFIG.hidden_size, generator=generator, dtype=torch.float64) for length in lengths
    ]
    whole = []
    for text in texts:
        normed = norm * text / torch.sqrt(text.square().mean(-1, keepdim=True) + CONFIG.layer_norm_epsilon)
        whole.append(text + recurrence(weights, CONFIG, normed))

    prompts = torch.cat([text[:length] for text, length in zip(texts, lengths, strict=True)])
    out_N, state = layer.prefill(prompts, Rows.of(lengths), room=0)
    assert (out_N - torch.cat([whole[0][:read], whole[1][:5]])).abs().max() < 1e-10
    for step in range(steps):
        at = [length + step for length in lengths]
        out_B = layer.step(torch.stack([texts[0][at[0]], texts[1][at[1]]]), state, at)
        assert (out_B - torch.stack([whole[0][at[0]], whole[1][at[1]]])).abs().max() < 1e-10, step


@torch.no_grad()
def test_two_half_mixers_add_up_to_the_whole(layout: ParallelLayout) -> None:
    """What tensor parallelism over heads and groups relies on: each rank's slice of z, x, B, C and dt is a mixer."""
    whole = double_mixer(CONFIG, layout)
    half_config = dataclasses.replace(
        CONFIG, mamba_num_heads=CONFIG.mamba_num_heads // 2, n_groups=CONFIG.n_groups // 2
    )
    heads, bc = CONFIG.mamba_inner, CONFIG.n_groups * CONFIG.ssm_state_size
    blocks = {
        "in_proj.weight": [heads, heads, bc, bc, CONFIG.mamba_num_heads],
        "conv1d.weight": [heads, bc, bc],
        "conv1d.bias": [heads, bc, bc],
    }
    row = packed_row(torch.tensor([0, 11, 12, 30]).int(), CHUNK)
    hidden = torch.randn(
        30, 1, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(8)
    )
    expected, _ = whole(hidden, packed_seq_params=row)
    total = torch.zeros_like(expected)
    for rank in range(2):
        part = double_mixer(half_config, layout)
        for name, parameter in part.named_parameters():
            full = whole.get_parameter(name)
            if name == "out_proj.weight":
                piece = full.chunk(2, dim=1)[rank]
            else:
                piece = torch.cat([block.chunk(2)[rank] for block in full.split(blocks.get(name, [full.shape[0]]))])
            parameter.copy_(piece)
        total += part(hidden, packed_seq_params=row)[0]
    assert expected.std() > 0.3
    assert (total - expected).abs().max() < 1e-10


def test_the_recurrence_is_not_the_code_under_test() -> None:
    """At one token the recurrence can be written down by hand: y = (dt (B . C) + D) x, gated, normed and projected."""
    config = dataclasses.replace(
        CONFIG, hidden_size=1, mamba_num_heads=1, mamba_head_dim=1, ssm_state_size=1, n_groups=1, conv_kernel=1
    )
    one = torch.ones(1, dtype=torch.float64)
    weights = {
        "in_proj.weight": torch.tensor([[1.0], [2.0], [3.0], [4.0], [0.0]], dtype=torch.float64),
        "conv1d.weight": torch.ones(3, 1, 1, dtype=torch.float64), "conv1d.bias": torch.zeros(3, dtype=torch.float64),
        "dt_bias": one * 0.0, "A_log": one * 0.0, "D": one * 0.5, "norm.weight": one, "out_proj.weight": one[:, None],
    }  # fmt: skip
    x, b, c, z = (F.silu(one * value) for value in (2.0, 3.0, 4.0, 1.0))
    gated = (torch.log(torch.tensor(2.0, dtype=torch.float64)) * b * c + 0.5) * x * z
    expected = gated / torch.sqrt(gated.square() + config.layer_norm_epsilon)
    assert torch.allclose(recurrence(weights, config, one[None]), expected[None], atol=1e-14)
