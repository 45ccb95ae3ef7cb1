"""The built model has the dtypes of the table, at every layout, and the emulated FP8 policy trains as bf16 does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.models import dtypes
from nemo_cascade.models.fp8_emulation import BLOCKWISE, fp8_linear
from nemo_cascade.models.hf_folder import read_header
from nemo_cascade.refit.memory import MemoryRefit
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.types import UserError
from tests import ranks
from tests.numerics import precision_ranks
from tests.numerics.precision_ranks import CUTS, DEEP, EVEN, rounded_products, rows, three_steps

pytestmark = pytest.mark.usefixtures("ranks")
ON_CPU = ("fp32", "bf16", "hopper_fp8_emulated", "blackwell_mxfp8_emulated")
STORED = {"F32": "float32", "BF16": "bfloat16"}


def build(precision: str, bf16_layers: int = 2, export: str = "fp32", **optimizer: float) -> MegatronLearner:
    hardware = HardwareConfig(precision=precision, fp8_bf16_layers=bf16_layers)
    cfg = OptimizerConfig(**{"lr": 1e-3, **optimizer})
    return MegatronLearner(DEEP, LearnerSettings(cfg, 20, hardware=hardware, precision_export=export), seed=3)


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("precision", ON_CPU)
def test_weights_masters_moments_and_gradients_are_those_of_the_table(precision: str) -> None:
    learner = build(precision)
    learner.update(rows(), cross_entropy("token"))
    found = {name: dtype_name(tensor) for name, tensor in learner.weights()}
    assert found == {name: dtypes.learner_dtype(dtypes.kind_of(name), precision) for name in DEEP.tensor_shapes()}
    assert {parameter.main_grad.dtype for parameter in learner.model.parameters()} == {torch.float32}
    inner = learner.trainer.optimizer.optimizer
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    assert len(masters) == len(list(learner.model.parameters()))
    assert {parameter.dtype for parameter in masters} == {torch.float32}
    moments = [value for state in inner.state.values() for key, value in state.items() if key.startswith("exp_avg")]
    assert len(moments) == 2 * len(masters) and {moment.dtype for moment in moments} == {torch.float32}


def test_masters_take_steps_that_bf16_cannot_hold() -> None:
    learner = build("bf16", lr=1e-5, weight_decay=0.0, warmup_steps=0)
    before = {name: tensor for name, tensor in learner.weights()}
    head = learner.model.output_layer.weight
    for _ in range(4):
        learner.update(rows(), cross_entropy("token"))
    after = dict(learner.weights())
    name = "backbone.layers.0.norm.weight"
    moved = (after[name] - before[name]).abs().max()
    assert 2e-5 < moved < 5e-5  # four steps of 1e-5; in bf16 the next number below 1 is 1 - 2^-8
    master = head.main_param
    assert torch.equal(master.to(torch.bfloat16), head) and not torch.equal(master, head.float())


def test_the_distributed_optimizer_finds_the_master_of_each_parameter() -> None:
    """Megatron counts them in another order than it lists them where fp32 and bf16 parameters share a group."""
    hardware = HardwareConfig(precision="bf16", distributed_optimizer=True)
    learner = MegatronLearner(DEEP, LearnerSettings(OptimizerConfig(lr=1e-3), 20, hardware=hardware), seed=3)
    learner.update(rows(), cross_entropy("token"))
    optimizer, seen = learner.trainer.optimizer, 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in part.model_param_group_index_map:
            master = part._get_main_param_and_optimizer_states(parameter)["param"]
            assert torch.equal(master.to(parameter.dtype), parameter.detach().flatten())
            seen += 1
    assert seen == len(list(learner.model.parameters()))


@pytest.mark.parametrize("export", dtypes.EXPORTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exports_are_those_of_the_table_and_say_what_they_round(
    precision: str, export: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "nemo_cascade.learner.megatron"):
        build(precision, export=export).export(str(tmp_path / "hf"))
    found = {name: STORED[header.dtype] for name, header in read_header(tmp_path / "hf").items()}
    assert found == {name: dtypes.export_dtype(dtypes.kind_of(name), export) for name in DEEP.tensor_shapes()}
    rounds = [message for message in caplog.messages if "precision_export: bf16 rounds" in message]
    assert len(rounds) == (precision == "fp32" and export == "bf16")
    assert all("1 embedding" in message and "norm" not in message for message in rounds)


def test_a_model_cast_after_it_was_built_is_neither_refitted_nor_exported(tmp_path: Path) -> None:
    learner, sampler = build("bf16"), LocalSampler(DEEP)
    MemoryRefit().refit(learner, sampler, 1)
    held = sampler.checksum
    layer = learner.model.decoder.layers[0]
    layer.norm.weight.data = layer.norm.weight.data.to(torch.bfloat16)
    message = "bf16 keeps backbone.layers.0.norm.weight in float32, but the Learner holds it in bfloat16"
    with pytest.raises(UserError, match=message):
        MemoryRefit().refit(learner, sampler, 2)
    assert sampler.checksum == held and sampler.version == 1
    with pytest.raises(UserError, match=message):
        learner.export(str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


def test_fp8_covers_the_projections_and_experts_of_the_middle_layers() -> None:
    inner = {
        "2.mixer.in_proj", "2.mixer.out_proj", "3.mlp.experts", "3.mlp.shared_experts.linear_fc1",
        "3.mlp.shared_experts.linear_fc2", "4.self_attention.linear_qkv", "4.self_attention.linear_proj",
    }  # fmt: skip
    assert rounded_products(build("hopper_fp8_emulated")) == inner
    everywhere = rounded_products(build("hopper_fp8_emulated", bf16_layers=0))
    assert {name.split(".")[0] for name in everywhere} == {str(layer) for layer in range(7)}
    assert not [name for name in everywhere if "router" in name or "embedding" in name or "output" in name]
    assert rounded_products(build("hopper_fp8_emulated", bf16_layers=4)) == rounded_products(build("bf16")) == set()


def test_a_layer_of_the_model_multiplies_as_the_emulation_does() -> None:
    model = build("hopper_fp8_emulated").model
    x = torch.randn(37, 1, DEEP.hidden_size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        layer, first = model.decoder.layers[4].self_attention.linear_qkv, model.decoder.layers[0].mixer.in_proj
        assert torch.equal(layer(x)[0], fp8_linear(x, layer.weight, BLOCKWISE))
        assert torch.equal(first(x)[0], x @ first.weight.t())


def test_packed_rows_are_filled_up_to_whole_blocks_of_tokens() -> None:
    for precision, multiple in (("bf16", 1), ("blackwell_mxfp8_emulated", 32), ("hopper_fp8_emulated", 128)):
        model, seen = build(precision).model, []
        model.decoder.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append(args), with_kwargs=True)
        model.decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
        )
        with torch.no_grad():
            logits = model.packed_logits(torch.arange(45) + 3, torch.tensor([0, 20, 45]))
        assert logits.shape == (45, DEEP.vocab_size)
        assert seen[-1] == -(-45 // multiple) * multiple


def test_every_profile_learns_and_fp8_is_coarser_than_bf16() -> None:
    gaps, last = {}, {}
    exact = build("fp32", bf16_layers=0)
    scores = exact.logprobs(rows())
    for precision in ON_CPU:
        learner = build(precision, bf16_layers=0)
        found = learner.logprobs(rows())
        pairs = [(a, b) for mine, theirs in zip(found, scores, strict=True) for a, b in zip(mine, theirs, strict=True)]
        gaps[precision] = sum(abs(a - b) for a, b in pairs) / len(pairs)
        losses = [learner.update(rows(), cross_entropy("token"))["loss"] for _ in range(6)]
        last[precision] = losses[-1]
        assert losses[-1] < losses[0] - 0.1
    assert gaps["fp32"] == 0.0 < gaps["bf16"] < gaps["blackwell_mxfp8_emulated"] < 0.1
    assert gaps["bf16"] < gaps["hopper_fp8_emulated"] < 0.1
    for precision in ON_CPU:
        assert last[precision] == pytest.approx(last["fp32"], abs=0.03)


def test_ranks_exchange_bf16_weights_and_fp8_products(tmp_path: Path) -> None:
    """Cut over ranks, blocks end elsewhere and sums of bf16 round differently; in stages each layer is whole."""
    hardware, cfg = HardwareConfig(precision="hopper_fp8_emulated"), OptimizerConfig(lr=1e-3)
    build("bf16").export(str(tmp_path / "start"))
    MegatronLearner(EVEN, LearnerSettings(cfg, 1), seed=3).export(str(tmp_path / "even"))
    ranks.run(precision_ranks.__file__, str(tmp_path))
    found = {name: [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)] for name in CUTS}
    for model, folder, names, gap in ((DEEP, "start", CUTS[:-1], 5e-3), (EVEN, "even", CUTS[-1:], 1e-6)):
        one = MegatronLearner(model, LearnerSettings(cfg, 20, hardware=hardware), init_folder=str(tmp_path / folder))
        layers, expected = rounded_products(one), three_steps(one)
        for name in names:
            assert set.union(*(rounded for rounded, _ in found[name])) == layers, name
            for _, steps in found[name]:
                for (loss, norm), (own_loss, own_norm) in zip(expected, steps, strict=True):
                    assert own_loss == pytest.approx(loss, abs=gap), name
                    assert own_norm == pytest.approx(norm, rel=10 * gap), name
    stages = [{name.split(".")[0] for name in rounded} for rounded, _ in found["pipeline"]]
    assert stages == [{"2", "3"}, {"4", "5"}]
