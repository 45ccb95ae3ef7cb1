from __future__ import annotations

import dataclasses

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert, cpu, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import freeze_routers, routers, update_expert_bias
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.norms import RMSNorm, gated_rms_norm
from nemo_cascade.types import UserError


def row(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()


def test_the_model_is_megatrons(model: NemotronH) -> None:
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm.mamba_block import MambaStack
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.moe.moe_layer import MoELayer

    assert isinstance(model, MambaModel) and isinstance(model.decoder, MambaStack)
    counts = {kind: sum(isinstance(module, kind) for module in model.modules()) for kind in
              (MambaLayer, MoELayer, ColumnParallelLinear, RowParallelLinear)}  # fmt: skip
    assert list(counts.values()) == [2, 2, 7, 6]


def test_every_parameter_gets_a_gradient_and_counts_match(model: NemotronH, config: NemotronHConfig) -> None:
    tokens, bounds = row([60, 45, 70, 3, 200])
    loss = torch.nn.functional.cross_entropy(model.packed_logits(tokens, bounds), tokens)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    trained = sum(parameter.numel() for parameter in model.parameters())
    bias = sum(router.expert_bias.numel() for router in routers(model))
    assert trained + bias == config.parameter_count()


def test_the_model_learns_to_copy(config: NemotronHConfig, layout: ParallelLayout) -> None:
    torch.manual_seed(0)
    model = nemotron_h.build(config, layout)
    tokens, bounds = row([24] * 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model.packed_logits(tokens, bounds)[:-1], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5.8
    assert losses[-1] < 1.5


def test_the_same_seed_gives_the_same_weights(config: NemotronHConfig, layout: ParallelLayout) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(nemotron_h.build(config, layout).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if "_extra_state" not in name)


def test_expert_bias_moves_towards_idle_experts(model: NemotronH) -> None:
    router = routers(model)[0]
    router.local_tokens_per_expert.copy_(torch.tensor([0.0, 8, 4, 4, 4, 4, 4, 4]))
    before = router.expert_bias.clone()
    update_expert_bias(model, 0.001)
    moved = router.expert_bias - before
    assert torch.allclose(moved, torch.tensor([0.001, -0.001, 0, 0, 0, 0, 0, 0]), atol=1e-7)
    assert router.local_tokens_per_expert.sum() == 0


def test_expert_bias_chooses_but_does_not_weigh(model: NemotronH) -> None:
    router = routers(model)[0]
    with torch.no_grad():
        router.expert_bias.zero_()[3] = 5.0
    hidden = torch.randn(10, 1, 128, generator=torch.Generator().manual_seed(0))
    weights, chosen = router(hidden)
    scores = torch.sigmoid(hidden.squeeze(1) @ router.weight.t())
    assert chosen[:, 3].all() and (chosen.sum(1) == 2).all()
    expected = torch.where(chosen, scores, 0.0)
    assert torch.allclose(weights, 2.5 * expected / expected.sum(1, keepdim=True), atol=1e-6)


def test_tokens_are_counted_only_while_training(model: NemotronH) -> None:
    tokens, bounds = row([40])
    with torch.no_grad():
        model.packed_logits(tokens, bounds)
    assert [router.local_tokens_per_expert.sum().item() for router in routers(model)] == [0, 0]
    model.packed_logits(tokens, bounds)
    assert [router.local_tokens_per_expert.sum().item() for router in routers(model)] == [80, 80]


def test_frozen_routers_get_no_gradient(model: NemotronH) -> None:
    freeze_routers(model)
    tokens, bounds = row([40])
    model.packed_logits(tokens, bounds).sum().backward()
    assert all(router.weight.grad is None for router in routers(model))
    assert model.decoder.layers[2].mlp.experts.up.grad is not None


@torch.no_grad()
def test_experts_agree_with_a_plain_loop(model: NemotronH) -> None:
    layer = model.decoder.layers[2].mlp
    hidden = torch.randn(33, 1, 128, generator=torch.Generator().manual_seed(0))
    weights, chosen = layer.router(hidden)
    expected = layer.shared_experts(hidden).squeeze(1).detach().clone()
    for token, expert in chosen.nonzero().tolist():
        inner = torch.relu(layer.experts.up[expert] @ hidden[token, 0]).square()
        expected[token] = expected[token] + weights[token, expert] * (layer.experts.down[expert] @ inner)
    output, _ = layer(hidden)
    assert (output.squeeze(1) - expected).abs().max() < 2e-5


def test_norm_gradients(model: NemotronH) -> None:
    norm = RMSNorm(model.config, 12).double()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    z = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: gated_rms_norm(*args, 3, 1e-5), (x, z, weight))


def test_bf16_keeps_router_norms_and_heads_in_fp32(config: NemotronHConfig, layout: ParallelLayout) -> None:
    torch.manual_seed(0)
    reference = nemotron_h.build(config, layout)
    model = nemotron_h.build(config, layout, precision="bf16")
    convert.import_weights(model, config, convert.export_weights(reference, config))
    wide = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    kept = {".".join(name.split(".")[-2:]) for name in wide}
    assert kept == {
        "mixer.A_log", "mixer.D", "mixer.dt_bias", "router.weight", "norm.weight", "input_layernorm.weight",
        "pre_mlp_layernorm.weight", "final_norm.weight",
    }  # fmt: skip
    tokens, bounds = row([40, 50])
    with torch.no_grad():
        gap = model.packed_logits(tokens, bounds).log_softmax(-1) - reference.packed_logits(tokens, bounds).log_softmax(
            -1
        )
    assert (
        0 < gap.abs().mean() < 0.005
    )  # logits have a spread of 0.2; the largest gap is that of a token whose experts differ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "te", "precision": "bf16"}, "te needs the package transformer_engine (2.9 to 2.11)"),
        ({"spec": "te"}, "te has no attention kernel for packed rows in fp32; set precision: bf16"),
        ({"precision": "hopper_fp8"}, "hopper_fp8 needs hardware.layer_spec: te"),
        ({"precision": "int4"}, "'int4' is not one of"),
        ({"layout": ParallelLayout(tensor=4)}, "tensor_parallel: 4 does not divide the model's n_groups 2"),
        ({"layout": ParallelLayout(tensor=2)}, "started with tensor, expert, pipeline, context (1, 1, 1, 1)"),
        ({"layout": ParallelLayout(context=2)}, "the model is built for (1, 1, 1, 2)"),
        ({"layout": ParallelLayout(context=2), "spec": "te"}, "context_parallel: 2 needs hardware.layer_spec: local"),
        ({"layout": ParallelLayout(pipeline=4)}, "pipeline_parallel: 4 does not divide"),
        ({"layout": ParallelLayout(expert=3)}, "expert_parallel: 3 does not divide"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    config: NemotronHConfig, layout: ParallelLayout, options: dict[str, object], message: str
) -> None:
    arguments = {"config": config, "layout": layout, **options}
    with pytest.raises(UserError) as caught:
        nemotron_h.build(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_cuda_names_reach_the_cpu_only_inside_the_context(layout: ParallelLayout) -> None:
    with cpu.cuda_as_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_experts_are_not_cut_over_tensor_parallel_ranks() -> None:
    with pytest.raises(UserError, match="expert tensor parallelism is not supported"):
        ParallelLayout(expert_tensor=2)
    assert dataclasses.asdict(ParallelLayout())["expert_tensor"] == 1
