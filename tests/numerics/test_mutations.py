"""Mistakes that peers have made, made on purpose: the parity check must see each one and name the right layers.

The oracle is transformers on the unspoilt weights, the spoilt side Megatron. A check that no mistake can fail proves
nothing; one that names another layer sends people looking in the wrong place.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import router as megatron_router

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import attention, convert, mamba, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
from nemo_cascade.models.names import slots
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.norms import gated_rms_norm
from nemo_cascade.models.packed import packed_row
from nemo_cascade.models.parity import Parity, difference
from nemo_cascade.models.scan import causal_conv_silu, chunked_scan
from nemo_cascade.models.trace import MegatronEngine, Trace, TransformersEngine, points
from tests.numerics.shaken import packed_tokens, shaken

LENGTHS = [40, 1, 33, 20]
MODES = {"packed": True, "unpacked": False}
MAMBA, ATTENTION, EXPERTS = (0, 3), (1, 4), (2, 5)  # nano: M*EM*E
Patch = pytest.MonkeyPatch
Mutation = Callable[[NemotronH, Patch], None]


@pytest.fixture(scope="module")
def folder(config: NemotronHConfig, layout: ParallelLayout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unspoilt weights."""
    place = tmp_path_factory.mktemp("unspoilt") / "hf"
    convert.save_folder(shaken(config, layout), config, place)
    return place


@pytest.fixture(scope="module")
def sequences(config: NemotronHConfig) -> list[torch.Tensor]:
    tokens, bounds = packed_tokens(config.vocab_size, LENGTHS)
    return [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]


@pytest.fixture(scope="module")
def truth(folder: Path, sequences: list[torch.Tensor]) -> dict[str, Trace]:
    """What transformers computes from them."""
    pytest.importorskip("transformers")
    engine = TransformersEngine(folder)
    return {name: engine.trace(sequences, packed) for name, packed in MODES.items()}


@pytest.fixture
def model(folder: Path, config: NemotronHConfig, layout: ParallelLayout) -> Iterator[NemotronH]:
    built = nemotron_h.build(config, layout)
    convert.load_folder(built, folder)
    yield built


def compared(model: NemotronH, sequences: list[torch.Tensor], truth: dict[str, Trace]) -> Parity:
    engine = MegatronEngine(model)
    modes = {}
    for name, packed in MODES.items():
        free, alone = engine.trace(sequences, packed), engine.trace(sequences, packed, feed=truth[name])
        modes[name] = difference(truth[name], free, alone, points(model.hf_config))
    return Parity(modes, tolerance=1e-4)


def test_without_a_mistake_the_models_agree(
    model: NemotronH, sequences: list[torch.Tensor], truth: dict[str, Trace]
) -> None:
    parity = compared(model, sequences, truth)
    assert parity.agrees and not parity.bad
    assert parity.max_logprob_difference < 2e-5
    assert all(layer.cosine > 1 - 1e-9 for layer in parity.layers)
    assert [layer.rerouted for layer in parity.layers if layer.kind == "experts"] == [0.0, 0.0]


def test_the_routing_that_the_mistakes_rewrite_is_right_before_them(
    model: NemotronH, sequences: list[torch.Tensor], truth: dict[str, Trace], monkeypatch: Patch
) -> None:
    """Else a mutation of the router could be seen for another reason than its own."""

    def right(logits: torch.Tensor, topk: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.sigmoid(logits.float())
        return routed_by(scores, scores + options["expert_bias"], topk, options["scaling_factor"])

    monkeypatch.setattr(megatron_router, "topk_routing_with_score_function", right)
    assert compared(model, sequences, truth).max_logprob_difference < 2e-5


# mistakes in the code of the router


def wrong_router_scale(model: NemotronH, patch: Patch) -> None:
    """2.5 was never wired in."""
    patch.setattr(model.config, "moe_router_topk_scaling_factor", 1.0)


def slightly_wrong_router_scale(model: NemotronH, patch: Patch) -> None:
    patch.setattr(model.config, "moe_router_topk_scaling_factor", 2.49)


def routed_by(
    scores: torch.Tensor, choice: torch.Tensor, topk: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router returns: the weights and the map of the `topk` experts with the largest `choice`."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, choice.topk(topk, dim=-1).indices, True)
    weights = torch.where(chosen, scores, 0.0)
    return weights / weights.sum(-1, keepdim=True) * scale, chosen


def softmax_router(model: NemotronH, patch: Patch) -> None:
    def softmax(logits: torch.Tensor, topk: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.softmax(logits.float(), -1)
        return routed_by(scores, scores + options["expert_bias"], topk, options["scaling_factor"])

    patch.setattr(megatron_router, "topk_routing_with_score_function", softmax)


def missing_expert_bias(model: NemotronH, patch: Patch) -> None:
    for router in routers(model):
        router.expert_bias.zero_()


def expert_bias_leaks_into_the_weights(model: NemotronH, patch: Patch) -> None:
    def leaky(logits: torch.Tensor, topk: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.sigmoid(logits.float()) + options["expert_bias"]
        return routed_by(scores, scores, topk, options["scaling_factor"])

    patch.setattr(megatron_router, "topk_routing_with_score_function", leaky)


def weights_are_not_normalised(model: NemotronH, patch: Patch) -> None:
    true = megatron_router.topk_routing_with_score_function

    def raw(logits: torch.Tensor, topk: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, chosen = true(logits, topk, **options)
        return torch.where(chosen, torch.sigmoid(logits.float()), 0.0) * options["scaling_factor"], chosen

    patch.setattr(megatron_router, "topk_routing_with_score_function", raw)


def one_expert_fewer(model: NemotronH, patch: Patch) -> None:
    for router in routers(model):
        patch.setattr(router, "topk", 1)


# mistakes in the experts


def two_experts_exchanged(model: NemotronH, patch: Patch) -> None:
    experts = model.decoder.layers[5].mlp.experts
    for weight in (experts.up, experts.down):
        weight[[3, 4]] = weight[[4, 3]]


def one_expert_permuted(model: NemotronH, patch: Patch) -> None:
    """The inner channels of one expert's up projection in another order, its down projection as it was."""
    up = model.decoder.layers[2].mlp.experts.up
    up[6] = up[6].roll(1, 0)


def shared_expert_dropped(model: NemotronH, patch: Patch) -> None:
    for layer in EXPERTS:
        model.decoder.layers[layer].mlp.shared_experts.linear_fc2.weight.zero_()


def relu_is_not_squared(model: NemotronH, patch: Patch) -> None:
    for layer in EXPERTS:
        patch.setattr(model.decoder.layers[layer].mlp.shared_experts, "activation_func", F.relu)


# mistakes in the Mamba-2 mixer


def norm_before_gate(model: NemotronH, patch: Patch) -> None:
    def swapped(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
        grouped = y.view(*y.shape[:-1], groups, -1)
        normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
        return normed.view(y.shape) * weight * F.silu(z)

    patch.setattr(mamba, "gated_rms_norm", swapped)


def norm_over_all_groups_at_once(model: NemotronH, patch: Patch) -> None:
    patch.setattr(mamba, "gated_rms_norm", lambda y, z, weight, groups, eps: gated_rms_norm(y, z, weight, 1, eps))


def b_and_c_swapped(model: NemotronH, patch: Patch) -> None:
    patch.setattr(mamba, "chunked_scan", lambda x, dt, A, B, C, chunk: chunked_scan(x, dt, A, C, B, chunk))


def b_and_c_swapped_in_the_conversion(model: NemotronH, patch: Patch) -> None:
    """The rows of one layer's in_proj and convolution as another framework orders them."""
    mixer, width = model.decoder.layers[3].mixer, model.hf_config.n_groups * model.hf_config.ssm_state_size
    begin = mixer.inner
    for weight, start in ((mixer.in_proj.weight, 2 * begin), (mixer.conv1d.weight, begin), (mixer.conv1d.bias, begin)):
        rows = slice(start, start + 2 * width)
        weight[rows] = weight[rows].roll(width, 0)


def gate_and_x_swapped(model: NemotronH, patch: Patch) -> None:
    mixer = model.decoder.layers[0].mixer
    weight = mixer.in_proj.weight
    weight[: 2 * mixer.inner] = weight[: 2 * mixer.inner].roll(mixer.inner, 0)


def missing_d(model: NemotronH, patch: Patch) -> None:
    for layer in MAMBA:
        model.decoder.layers[layer].mixer.D.zero_()


def dt_without_bias(model: NemotronH, patch: Patch) -> None:
    for layer in MAMBA:
        model.decoder.layers[layer].mixer.dt_bias.zero_()


def sign_of_a(model: NemotronH, patch: Patch) -> None:
    patch.setattr(mamba, "chunked_scan", lambda x, dt, A, B, C, chunk: chunked_scan(x, dt, -A, B, C, chunk))


def a_without_exp(model: NemotronH, patch: Patch) -> None:
    def linear(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, *rest: Any) -> torch.Tensor:
        return chunked_scan(x, dt, -torch.log(-A), *rest)

    patch.setattr(mamba, "chunked_scan", linear)


def time_step_clamped(model: NemotronH, patch: Patch) -> None:
    """From below, as transformers does where config.json says so: here at 0.01."""

    def clamped(x: torch.Tensor, dt: torch.Tensor, *rest: Any) -> torch.Tensor:
        return chunked_scan(x, dt.clamp_min(0.01), *rest)

    patch.setattr(mamba, "chunked_scan", clamped)


def convolution_reversed(model: NemotronH, patch: Patch) -> None:
    patch.setattr(mamba, "causal_conv_silu", lambda x, weight, bias: causal_conv_silu(x, weight.flip(1), bias))


def convolution_without_bias(model: NemotronH, patch: Patch) -> None:
    for layer in MAMBA:
        model.decoder.layers[layer].mixer.conv1d.bias.zero_()


# mistakes in attention


def unscaled_attention(model: NemotronH, patch: Patch) -> None:
    for layer in ATTENTION:
        patch.setattr(model.decoder.layers[layer].self_attention.core_attention, "scale", 1.0)


def kv_heads_swapped(model: NemotronH, patch: Patch) -> None:
    for name, slot in slots(model, model.hf_config):
        if name.startswith("backbone.layers.4.") and name.endswith(("k_proj.weight", "v_proj.weight")):
            slot.write(slot.read().roll(model.hf_config.head_dim, 0))


def queries_of_the_groups_interleaved(model: NemotronH, patch: Patch) -> None:
    """Query head h reads KV head h % 2 instead of h // 2."""
    config = model.hf_config
    for name, slot in slots(model, config):
        if name == "backbone.layers.1.mixer.q_proj.weight":
            heads = slot.read().view(config.num_attention_heads, config.head_dim, -1)
            slot.write(heads[[0, 2, 1, 3]].flatten(0, 1))


def attention_is_not_causal(model: NemotronH, patch: Patch) -> None:
    true = F.scaled_dot_product_attention

    def seeing(*args: Any, **options: Any) -> torch.Tensor:
        return true(*args, **(options | {"is_causal": False}))

    patch.setattr(attention.F, "scaled_dot_product_attention", seeing)


# mistakes at both ends


def embedding_rows_shifted(model: NemotronH, patch: Patch) -> None:
    weight = model.embedding.word_embeddings.weight
    weight.copy_(weight.roll(1, 0))


def final_norm_forgotten(model: NemotronH, patch: Patch) -> None:
    model.decoder.final_norm.weight.fill_(1.0)


def head_tied_to_the_embedding(model: NemotronH, patch: Patch) -> None:
    model.output_layer.weight.copy_(model.embedding.word_embeddings.weight)


def names(layers: tuple[int, ...]) -> list[str]:
    return [f"backbone.layers.{layer}" for layer in layers]


CASES: list[tuple[Mutation, list[str]]] = [
    (wrong_router_scale, names(EXPERTS)),
    (slightly_wrong_router_scale, names(EXPERTS)),
    (softmax_router, names(EXPERTS)),
    (missing_expert_bias, names(EXPERTS)),
    (expert_bias_leaks_into_the_weights, names(EXPERTS)),
    (weights_are_not_normalised, names(EXPERTS)),
    (one_expert_fewer, names(EXPERTS)),
    (two_experts_exchanged, names((5,))),
    (one_expert_permuted, names((2,))),
    (shared_expert_dropped, names(EXPERTS)),
    (relu_is_not_squared, names(EXPERTS)),
    (norm_before_gate, names(MAMBA)),
    (norm_over_all_groups_at_once, names(MAMBA)),
    (b_and_c_swapped, names(MAMBA)),
    (b_and_c_swapped_in_the_conversion, names((3,))),
    (gate_and_x_swapped, names((0,))),
    (missing_d, names(MAMBA)),
    (dt_without_bias, names(MAMBA)),
    (sign_of_a, names(MAMBA)),
    (a_without_exp, names(MAMBA)),
    (time_step_clamped, names(MAMBA)),
    (convolution_reversed, names(MAMBA)),
    (convolution_without_bias, names(MAMBA)),
    (unscaled_attention, names(ATTENTION)),
    (kv_heads_swapped, names((4,))),
    (queries_of_the_groups_interleaved, names((1,))),
    (attention_is_not_causal, names(ATTENTION)),
    (embedding_rows_shifted, ["backbone.embeddings"]),
    (final_norm_forgotten, ["backbone.norm_f"]),
    (head_tied_to_the_embedding, ["lm_head"]),
]


@pytest.mark.parametrize(("mutate", "layers"), CASES, ids=[mutate.__name__ for mutate, _ in CASES])
def test_the_parity_check_sees_it_and_names_the_layers(
    mutate: Mutation,
    layers: list[str],
    model: NemotronH,
    sequences: list[torch.Tensor],
    truth: dict[str, Trace],
    monkeypatch: Patch,
) -> None:
    for where in (mamba.MixerSizes, attention):  # mistakes are made in what PyTorch does
        monkeypatch.setattr(where, "usable", lambda *_: False)
    with torch.no_grad():
        mutate(model, monkeypatch)
    parity = compared(model, sequences, truth)
    assert not parity.agrees
    assert [layer.name for layer in parity.bad] == layers
    assert layers[0] in parity.verdict()
    first = [layer.name for layer in parity.layers].index(layers[0])
    assert all(layer.max_difference < 1e-4 for layer in parity.layers[:first])  # nothing before it is blamed
    assert min(mode.maximum for mode in parity.modes.values()) > 1e-3


def test_state_that_crosses_a_boundary_shows_in_the_packed_row_alone(
    model: NemotronH, sequences: list[torch.Tensor], truth: dict[str, Trace], monkeypatch: Patch
) -> None:
    def one_sequence(bounds: torch.Tensor, chunk: int, cut: Any, device: torch.device) -> Any:
        return packed_row(bounds[[0, -1]], chunk, cut, device)

    monkeypatch.setattr(nemotron_h, "packed_row", one_sequence)
    parity = compared(model, sequences, truth)
    assert parity.modes["packed"].maximum > 1e-2
    assert parity.modes["unpacked"].maximum < 2e-5
    assert parity.bad[0].name == "backbone.layers.0"


def test_a_value_that_is_no_number_is_a_difference(
    model: NemotronH, sequences: list[torch.Tensor], truth: dict[str, Trace]
) -> None:
    with torch.no_grad():
        model.decoder.layers[1].input_layernorm.weight[0] = torch.nan
    parity = compared(model, sequences, truth)
    assert not parity.agrees and parity.max_logprob_difference > 1e300
    assert [layer.name for layer in parity.bad] == ["backbone.layers.1"]
    assert parity.layers[2].cosine == -1.0


def test_every_mistake_is_listed() -> None:
    """A mutation that is written but not run would prove nothing."""
    here = inspect.getmodule(test_every_mistake_is_listed)
    written = {
        value for value in vars(here).values()
        if inspect.isfunction(value) and list(inspect.signature(value).parameters) == ["model", "patch"]
    }  # fmt: skip
    assert written == {mutate for mutate, _ in CASES}
