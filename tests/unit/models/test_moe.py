"""The mixture of experts against a hand-written one in float64, the dispatchers, and routing replay."""

from __future__ import annotations

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import _AtOnce, _GroupedSquaredReluMLP, _InTurn, expert_kernel, routers
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.routing import Routing
from nemo_cascade.types import NO_CHOICE, UserError

Tensors = dict[str, torch.Tensor]
TOKENS = torch.randint(0, 512, (90,), generator=torch.Generator().manual_seed(3))
BOUNDS = torch.tensor([0, 30, 77, 90]).int()


def hidden_rows(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 1, 128, generator=torch.Generator().manual_seed(0)) * 1.5


def reference(weights: Tensors, hidden: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """y_t = shared(x_t) + sum_e w_te down_e relu(up_e x_t)^2, one token and one expert at a time.

    s_te = sigmoid(gate_e x_t); chosen: the k largest s_te + bias_e; w_te = 2.5 s_te / sum of the chosen s.
    """
    rows = []
    for t, x in enumerate(hidden[:, 0]):
        scores = 1.0 / (1.0 + torch.exp(-(weights["gate"] @ x)))
        experts = chosen[t].tolist() if chosen is not None else (scores + weights["bias"]).argsort()[-2:].tolist()
        total = sum(scores[e] for e in experts)
        y = weights["shared_down"] @ torch.clamp(weights["shared_up"] @ x, min=0.0) ** 2
        for e in experts:
            inner = torch.clamp(weights["up"][e] @ x, min=0.0) ** 2
            y = y + 2.5 * scores[e] / total * (weights["down"][e] @ inner)
        rows.append(y)
    return torch.stack(rows)[:, None]


def parts(layer: torch.nn.Module) -> Tensors:
    """The layer's parameters under the names of `reference`."""
    return {
        "gate": layer.router.weight, "bias": layer.router.expert_bias, "up": layer.experts.up,
        "down": layer.experts.down, "shared_up": layer.shared_experts.linear_fc1.weight,
        "shared_down": layer.shared_experts.linear_fc2.weight,
    }  # fmt: skip


def test_the_layer_is_the_formula_with_its_gradients(model: NemotronH) -> None:
    """In fp32 against float64: outputs and the gradient of every parameter and of the input, 1e-5 of the largest."""
    layer = model.decoder.layers[2].mlp
    exact = {name: value.detach().double().requires_grad_(name != "bias") for name, value in parts(layer).items()}
    x, x64 = hidden_rows().requires_grad_(), hidden_rows().double().requires_grad_()
    pull = torch.randn(40, 1, 128, generator=torch.Generator().manual_seed(1))
    output, expected = layer(x)[0], reference(exact, x64)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    (output * pull).sum().backward()
    (expected * pull.double()).sum().backward()
    pairs = {name: (value.grad, exact[name].grad) for name, value in parts(layer).items() if name != "bias"}
    for name, (own, other) in (pairs | {"x": (x.grad, x64.grad)}).items():
        assert (own - other).abs().max() < 1e-5 * other.abs().max(), name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("scale", lambda layer: setattr(layer.router.config, "moe_router_topk_scaling_factor", 1.0)),
        ("bias", lambda layer: layer.router.expert_bias.zero_()),
        ("expert", lambda layer: layer.experts.up.copy_(layer.experts.up.roll(1, 0))),
        ("shared", lambda layer: layer.shared_experts.linear_fc2.weight.zero_()),
    ],
)
@torch.no_grad()
def test_the_formula_notices_a_mutation(model: NemotronH, name: str, wrong) -> None:
    layer = model.decoder.layers[2].mlp
    exact = {key: value.double().clone() for key, value in parts(layer).items()}
    expected = reference(exact, hidden_rows().double())
    wrong(layer)
    assert (layer(hidden_rows())[0] - expected).abs().max() > 0.05 * expected.abs().max(), name


@torch.no_grad()
def test_scores_are_fp32_in_a_bf16_model(config: NemotronHConfig, layout: ParallelLayout) -> None:
    torch.manual_seed(0)
    router = routers(nemotron_h.build(config, layout, precision="bf16"))[0]
    hidden = hidden_rows().bfloat16()
    weights, chosen = router(hidden)
    assert weights.dtype == torch.float32
    scores = torch.sigmoid(hidden[:, 0].double() @ router.weight.double().t())
    expected = torch.where(chosen, scores, 0.0)
    expected = 2.5 * expected / expected.sum(1, keepdim=True)
    assert (weights - expected).abs().max() < 1e-6  # bf16 scores would be 4e-3 off


def test_all_dispatchers_give_the_same_numbers(model: NemotronH, config: NemotronHConfig) -> None:
    results = []
    for dispatcher, kind in (
        ("allgather", "MoEAllGatherTokenDispatcher"), ("alltoall", "MoEAlltoAllTokenDispatcher"),
        ("local", "LocalDispatcher"),
    ):  # fmt: skip
        built = nemotron_h.build(config, ParallelLayout(dispatcher=dispatcher))
        convert.import_weights(built, config, convert.export_weights(model, config))
        assert type(built.decoder.layers[2].mlp.token_dispatcher).__name__ == kind
        logits = built.packed_logits(TOKENS, BOUNDS)
        torch.nn.functional.cross_entropy(logits, TOKENS).backward()
        results.append((logits, {name: parameter.grad for name, parameter in built.named_parameters()}))
    logits, grads = results[0]
    for other, others in results[1:]:
        assert (logits - other).abs().max() < 1e-5
        for name, grad in grads.items():
            assert (grad - others[name]).abs().max() <= 1e-5 * grad.abs().max(), name


def test_replaying_own_choices_changes_nothing(model: NemotronH) -> None:
    free = Routing()
    expected = model.packed_logits(TOKENS, BOUNDS, routing=free)
    assert torch.equal(expected, model.packed_logits(TOKENS, BOUNDS))
    replay = Routing(free.chosen())
    logits = model.packed_logits(TOKENS, BOUNDS, routing=replay)
    assert torch.equal(logits, expected)
    assert free.chosen().shape == (90, 2, 2) and replay.difference().tolist() == [0, 360]
    assert torch.equal(replay.chosen(), free.chosen())
    grads = []
    for values in (expected, logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(values, TOKENS).backward()
        grads.append([router.weight.grad.clone() for router in routers(model)])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_replaying_other_choices_changes_the_output_as_the_formula_says(model: NemotronH) -> None:
    layer = model.decoder.layers[2]
    other = torch.randperm(8, generator=torch.Generator().manual_seed(2))[:2].repeat(40, 2, 1).to(torch.uint8)
    other[7:9] = NO_CHOICE  # there the router chooses
    routing = Routing(other)
    row = model.row(torch.zeros(40, dtype=torch.long), torch.tensor([0, 40]).int(), routing=routing)
    x = hidden_rows()
    output = layer(hidden_states=x, attention_mask=None, packed_seq_params=row.packed)[0] - x
    normed = layer.pre_mlp_layernorm(x).double()
    exact = {name: value.double() for name, value in parts(layer.mlp).items()}
    scores = torch.sigmoid(normed[:, 0] @ exact["gate"].t()) + exact["bias"]
    own = scores.topk(2, dim=-1).indices
    used = other[:, 0].long()
    used[7:9] = own[7:9]
    assert (output - reference(exact, normed, used)).abs().max() < 1e-4
    free = reference(exact, normed)
    assert (output - free).abs().amax((1, 2)).gt(0.1).sum() > 30
    flips = sum(len(set(used[t].tolist()) - set(own[t].tolist())) for t in range(40))
    assert routing.difference().tolist() == [flips, 76] and flips > 40


@torch.no_grad()
def test_models_and_calls_do_not_interfere(
    model: NemotronH, config: NemotronHConfig, layout: ParallelLayout
) -> None:
    """A teacher's pass between two of the policy's, same parameters or another model, leaves no trace."""
    twin = nemotron_h.build(config, layout)
    free = Routing()
    plain, twins = model.packed_logits(TOKENS, BOUNDS, routing=free), twin.packed_logits(TOKENS, BOUNDS)
    other = (free.chosen() + 1) % 8
    forced = model.packed_logits(TOKENS, BOUNDS, routing=Routing(other))
    assert (forced - plain).abs().max() > 0.1
    assert torch.equal(twin.packed_logits(TOKENS, BOUNDS), twins)
    assert torch.equal(model.packed_logits(TOKENS, BOUNDS), plain)
    with pytest.raises(ValueError, match="does not fit 90 tokens"):
        model.packed_logits(TOKENS, BOUNDS, routing=Routing(other[:50]))
    assert torch.equal(model.packed_logits(TOKENS, BOUNDS), plain)
    assert all(router.router_replay is None for router in routers(model))
    from megatron.core.transformer.moe.router_replay import RouterReplay

    assert RouterReplay.global_router_replay_instances == []


def test_an_unknown_dispatcher_is_refused() -> None:
    from nemo_cascade.config.schema import HardwareConfig

    with pytest.raises(UserError, match="hardware.moe_dispatcher: 'deepep' is not one of auto, local, allgather"):
        HardwareConfig(moe_dispatcher="deepep")
    assert ParallelLayout.from_hardware(HardwareConfig(moe_dispatcher="alltoall")).dispatcher == "alltoall"


def operands(dtype: torch.dtype, width: int = 24) -> tuple[torch.Tensor, ...]:
    """x [50, 16], up [5, width, 16], down [5, 16, width], weights [50], each with a gradient."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((50, 16), (5, width, 16), (5, 16, width), (50,))
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("counts", [[10, 0, 25, 15, 0], [0, 0, 50, 0, 0]], ids=["two without tokens", "one has all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_experts_at_once_are_experts_in_turn(dtype: torch.dtype, counts: list[int]) -> None:
    found = []
    for experts in (_InTurn(counts), _AtOnce(torch.tensor(counts).cumsum(0).int())):
        inputs = operands(dtype)
        y = _GroupedSquaredReluMLP.apply(*inputs, experts)
        (y * torch.linspace(-1.0, 1.0, y.numel()).view_as(y).to(dtype)).sum().backward()
        found.append([y.detach(), *(tensor.grad for tensor in inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.0, atol=1e-6 * float(one.abs().max()))
    empty = [expert for expert, count in enumerate(counts) if not count]
    assert not found[1][2][empty].any() and not found[1][3][empty].any()


def test_experts_are_computed_in_turn_but_in_bf16_on_a_card() -> None:
    x, up, *_ = operands(torch.bfloat16)
    counts = torch.tensor([10, 0, 25, 15, 0])
    assert expert_kernel(x, up, counts) == _InTurn(counts.tolist())
