"""Dispatch on one rank: the rows, outputs and gradients of Megatron's dispatchers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from nemo_cascade.cascade.checks import check_hardware
from nemo_cascade.config.schema import HardwareConfig
from nemo_cascade.models import convert, dispatch, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.routing import Routing
from nemo_cascade.types import NO_CHOICE, UserError

DISPATCHERS = ("local", "allgather", "alltoall")
TOKENS = torch.randint(0, 512, (90,), generator=torch.Generator().manual_seed(3))
BOUNDS = torch.tensor([0, 30, 77, 90]).int()


@pytest.fixture
def models(model: NemotronH, config: NemotronHConfig) -> dict[str, NemotronH]:
    """The same model under each dispatcher."""
    built = {name: nemotron_h.build(config, ParallelLayout(dispatcher=name)) for name in DISPATCHERS}
    for other in built.values():
        convert.import_weights(other, config, convert.export_weights(model, config))
    return built


def passed(model: NemotronH) -> dict[str, torch.Tensor]:
    """What the experts of a layer get, its output, and all gradients; expert 3 is never chosen."""
    layer, found = model.decoder.layers[2].mlp, {}
    with torch.no_grad():
        layer.router.expert_bias[3] = -10.0

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.update(zip(("rows", "counts", "weights"), inputs, strict=True))

    handle = layer.experts.register_forward_pre_hook(keep)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 1, 128, generator=generator) * 1.5).requires_grad_()
    output = layer(x)[0]
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    handle.remove()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return found | {"output": output, "x": x.grad} | grads


def test_a_layer_is_that_of_megatrons_dispatchers(models: dict[str, NemotronH]) -> None:
    local, *others = (passed(models[name]) for name in DISPATCHERS)
    assert local["counts"].sum() == 80 and local["counts"][3] == 0
    assert not local["experts.up"][3].any() and local["router.weight"].any()
    for other in others:
        for name in ("rows", "counts", "weights"):
            assert torch.equal(local[name], other[name]), name
        for name, value in local.items():
            assert (value - other[name]).abs().max() <= 1e-6 * other[name].abs().max(), name


@torch.no_grad()
def test_replayed_choices_reach_the_same_experts(models: dict[str, NemotronH]) -> None:
    free = Routing()
    models["alltoall"].packed_logits(TOKENS, BOUNDS, routing=free)
    other = (free.chosen() + 3) % 8
    other[60:] = NO_CHOICE
    logits, expected = (models[name].packed_logits(TOKENS, BOUNDS, routing=Routing(other)) for name in DISPATCHERS[::2])
    assert (logits - expected).abs().max() < 1e-5
    assert (logits - models["local"].packed_logits(TOKENS, BOUNDS)).abs().max() > 0.1


def routing_map(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, True)


def test_gradients_are_those_of_the_functions() -> None:
    places = dispatch.Places.of(routing_map(7, 5, 3), 3)
    indices = (places.token_R, places.rows_Tk)
    hidden, rows = (torch.randn(count, 2, dtype=torch.double, requires_grad=True) for count in (7, 21))
    assert torch.autograd.gradcheck(lambda x: dispatch._Spread.apply(x, *indices), hidden)
    assert torch.autograd.gradcheck(lambda x: dispatch._Gather.apply(x, *indices), rows)
    assert torch.equal(places.token_R[places.rows_Tk], torch.arange(7)[:, None].expand(7, 3))


def test_bf16_outputs_are_rounded_once() -> None:
    places = dispatch.Places.of(routing_map(200, 16, 6), 6)
    rows = torch.randn(1200, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    added = dispatch._Gather.apply(rows, places.token_R, places.rows_Tk)
    exact = torch.zeros(200, 32, dtype=torch.double).index_add_(0, places.token_R, rows.double())
    assert torch.equal(added, exact.float().bfloat16())
    one_by_one = sum(rows[places.rows_Tk[:, place]] for place in range(6))
    assert (one_by_one != added).sum() > 1000


def test_experts_on_other_ranks_are_refused(config: NemotronHConfig) -> None:
    said = "local moves no token to other ranks and expert_parallel is 2; set it to auto"
    with pytest.raises(UserError, match=f"hardware.moe_dispatcher: {said}"):
        nemotron_h.build(config, ParallelLayout(expert=2, dispatcher="local"))
    hardware = HardwareConfig(ranks_per_node=2, expert_parallel=2, moe_dispatcher="local")
    with pytest.raises(UserError, match=f"two.yaml: key 'moe_dispatcher': {said}"):
        check_hardware(hardware, config, "two.yaml")
    check_hardware(HardwareConfig(ranks_per_node=2, moe_dispatcher="local"), config, "two.yaml")


@pytest.mark.parametrize(
    ("cuda", "layout", "chosen"),
    [
        (False, ParallelLayout(), "allgather"),
        (True, ParallelLayout(), "local"),
        (True, ParallelLayout(tensor=2, pipeline=2), "local"),
        (True, ParallelLayout(expert=2), "alltoall"),
        (True, ParallelLayout(dispatcher="allgather"), "allgather"),
    ],
)
def test_auto_is_local_on_a_card_with_all_experts(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, layout: ParallelLayout, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert layout.dispatcher_here() == chosen
