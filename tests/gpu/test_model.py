"""The model on a GPU: the local spec against the CPU, te against local, the 30B preset, a full-width stack trained.

python -m pytest tests/gpu/test_model.py -m gpu
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.learner import parallel

import torch  # isort: skip

from nemo_cascade.algorithms.kept import RAW
from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.data.packing import to_batch
from nemo_cascade.learner.forward import on_device, target_logprobs
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models import convert, moe, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.norms import RMSNorm
from nemo_cascade.models.packed import packed_row
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.routing import Routing
from nemo_cascade.types import NO_CHOICE, Sequence
from tests.gpu import cpu_side

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]
FULL = "nemotron_3_nano_30b_a3b"
CUDA = torch.device("cuda")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def layout() -> Iterator[ParallelLayout]:
    """One rank; memory of the test before is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield parallel.start(seed=3)
    parallel.stop()


def tokens(count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(torch.randint(16, vocabulary, (count,), generator=torch.Generator().manual_seed(4)).tolist())


def test_local_on_cuda_is_the_cpu_in_fp32(layout: ParallelLayout, tmp_path: Path) -> None:
    config = NemotronHConfig.preset("nano")
    convert.save_folder(nemotron_h.build(config, layout), config, tmp_path / "hf")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = str(Path(cpu_side.__file__))
    subprocess.run([sys.executable, "-W", "ignore", script, str(tmp_path)], env=environment, check=True, timeout=300)
    cpu = torch.load(tmp_path / "cpu.pt")
    gpu = cpu_side.run(tmp_path, cpu["experts"])
    mine, other = b"".join(gpu["experts"]), b"".join(cpu["experts"])
    assert sum(a == b for a, b in zip(mine, other, strict=True)) > 0.999 * len(other)
    assert gpu["losses"] == pytest.approx(cpu["losses"], abs=1e-4)
    own, expected = ([value for row in side["logprobs"] for value in row] for side in (gpu, cpu))
    gaps = sorted(abs(a - b) for a, b in zip(own, expected, strict=True))
    assert gaps[int(0.99 * len(gaps))] < 1e-4


@pytest.mark.skipif(not installed("transformer_engine"), reason="transformer_engine is not installed")
def test_te_is_local_in_bf16(layout: ParallelLayout) -> None:
    """Same weights, same experts: log-probabilities and gradients differ by bf16 rounding."""
    config = NemotronHConfig.preset("nemotron_h_50m")
    local, other = (nemotron_h.build(config, layout, "bf16", spec) for spec in ("local", "te"))
    convert.import_weights(other, config, convert.export_weights(local, config))
    exported = dict(convert.export_weights(local, config))
    for name, tensor in convert.export_weights(other, config):  # norms are fp32 in local and bf16 in te
        assert torch.equal(tensor, exported[name].to(tensor.dtype)), name
    row = torch.tensor(tokens(1500, config.vocab_size), device=CUDA)
    bounds = torch.tensor([0, 700, 701, 1500], dtype=torch.int32, device=CUDA)
    free = Routing()
    expected = local.packed_logits(row, bounds, routing=free)
    logits = other.packed_logits(row, bounds, routing=Routing(free.chosen()))
    gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert gap.mean() < 0.01 and gap.amax(-1).quantile(0.99) < 0.1, (gap.mean(), gap.max())
    grads = []
    for model, values in ((local, expected), (other, logits)):
        torch.nn.functional.cross_entropy(values, row).backward()
        grads.append({name: parameter.grad.float() for name, parameter in model.named_parameters()})
    for name in grads[0].keys() & grads[1].keys():
        first, second = (grad[name].flatten() for grad in grads)
        assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.98, name


@pytest.mark.skipif(not installed("mamba_ssm"), reason="mamba_ssm is not installed")
@pytest.mark.parametrize("lengths", [[600], [300, 1, 3, 129, 64, 103]], ids=["one sequence", "packed"])
def test_the_kernel_mixer_is_the_pytorch_one(layout: ParallelLayout, lengths: list[int]) -> None:
    """Output and all gradients, within bf16 rounding of the PyTorch mixer's: kernels for the whole row start afresh at
    each boundary.
    """
    from nemo_cascade.models.mamba_kernels import KernelMixer

    config = NemotronHConfig.preset("nemotron_h_50m")
    mixer = nemotron_h.build(config, layout, "bf16").decoder.layers[0].mixer
    bounds = torch.tensor([0, *lengths], device=CUDA).cumsum(0).int()
    x = torch.randn(sum(lengths), 1, config.hidden_size, device=CUDA).bfloat16()
    upstream = torch.randn(x.shape, device=CUDA)
    found = []
    for kind in (Mamba2Mixer, KernelMixer):  # by class: which of the two the mixer is depends on what is installed
        mixer.__class__ = kind
        mixer.zero_grad()
        own = x.clone().requires_grad_()
        out, _ = mixer(own, packed_seq_params=packed_row(bounds, config.chunk_size))
        (out.float() * upstream).sum().backward()
        gradients = {name: parameter.grad.float() for name, parameter in mixer.named_parameters()}
        found.append({"output": out.detach().float(), "input": own.grad.float(), **gradients})
    for name, value in found[0].items():
        gap = (found[1][name] - value).norm() / value.norm()
        assert gap < 0.03, (name, float(gap))


@pytest.mark.skipif(not installed("mamba_ssm"), reason="mamba_ssm is not installed")
def test_the_kernel_norm_is_the_pytorch_one(layout: ParallelLayout) -> None:
    from nemo_cascade.models.mamba_kernels import KernelRMSNorm

    norm = nemotron_h.build(NemotronHConfig.preset("nemotron_h_50m"), layout, "bf16").decoder.layers[0].norm
    assert type(norm) is KernelRMSNorm and norm.weight.dtype == torch.float32
    x, upstream = (torch.randn(700, 1, norm.weight.shape[0], device=CUDA).bfloat16() for _ in range(2))
    found = []
    for kind in (RMSNorm, KernelRMSNorm):
        norm.__class__, own = kind, x.clone().requires_grad_()
        norm.zero_grad()
        out = norm(own)
        out.backward(upstream)
        found.append([out.detach(), own.grad, norm.weight.grad])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() < 5e-3 * one.float().norm()


def test_experts_at_once_are_experts_in_turn() -> None:
    """In bf16 a card runs one kernel for all experts of a product; one product an expert is the reference."""
    generator = torch.Generator("cuda").manual_seed(7)
    counts = torch.tensor([100, 0, 700, 224], device=CUDA)
    shapes = ((1024, 256), (4, 512, 256), (4, 256, 512), (1024,))
    found = []
    operands = [torch.randn(shape, generator=generator, device=CUDA).bfloat16() for shape in shapes]
    for experts in (moe.expert_kernel(operands[0], operands[1], counts), moe._InTurn(counts.tolist())):
        inputs = [tensor.clone().requires_grad_() for tensor in operands]
        y = moe._GroupedSquaredReluMLP.apply(*inputs, experts)
        (y.float() * torch.linspace(-1.0, 1.0, y.numel(), device=CUDA).view_as(y)).sum().backward()
        found.append([y.detach(), *(tensor.grad for tensor in inputs)])
    assert isinstance(moe.expert_kernel(operands[0], operands[1], counts), moe._AtOnce)
    for one, other in zip(*found, strict=True):
        assert (one.float() - other.float()).norm() < 5e-3 * other.float().norm()
    assert not found[0][2][1].any() and not found[0][3][1].any()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="experts at once need Hopper"
)
def test_experts_on_one_rank_never_wait_for_the_device(layout: ParallelLayout) -> None:
    """A layer's forward and backward in bf16, with a row's padding out of the counts, against megatron's alltoall."""
    config = NemotronHConfig.preset("nemotron_h_50m")
    place, count = config.layers("E")[0], 1024
    x = torch.randn(count, 1, config.hidden_size, generator=torch.Generator("cuda").manual_seed(7), device=CUDA)
    real = torch.arange(count, device=CUDA) < count - 24
    models = {name: nemotron_h.build(config, ParallelLayout(dispatcher=name), "bf16") for name in ("local", "alltoall")}
    convert.import_weights(models["alltoall"], config, convert.export_weights(models["local"], config))

    def passed(name: str) -> dict[str, torch.Tensor]:
        layer, own = models[name].decoder.layers[place].mlp, x.bfloat16().requires_grad_()
        layer.zero_grad()
        layer.router.local_tokens_per_expert.zero_()
        with moe.counting_only(models[name], real):
            output = layer(own)[0]
        (output.float() * x).sum().backward()
        found = {key: parameter.grad for key, parameter in layer.named_parameters()}
        counts = layer.router.local_tokens_per_expert.clone()
        return found | {"output": output.detach(), "x": own.grad, "counts": counts}

    expected, first = passed("alltoall"), passed("local")  # what is compiled at first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = passed("local")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found["counts"], expected["counts"])
    assert int(found["counts"].sum()) == (count - 24) * config.num_experts_per_tok
    for name, value in found.items():
        assert (value.float() - expected[name].float()).norm() < 1e-2 * expected[name].float().norm(), name
    assert torch.equal(found["output"], first["output"]) and torch.equal(found["x"], first["x"])


def test_a_row_is_planned_without_a_wait_for_the_device() -> None:
    rows = [Sequence(tokens(length, 512), (1,) * length) for length in (700, 1, 799)]
    batch = on_device(to_batch(rows), CUDA)
    assert batch.tokens_T.is_cuda and not batch.cu_seqlens.is_cuda and not batch.group_S.is_cuda
    assert batch.trained_N.is_cuda and torch.equal(batch.trained_N, batch.loss_mask_T.nonzero()[:, 0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = packed_row(batch.cu_seqlens, 128, None, CUDA)
        layout, numbers = row.layout, row.sequence_1T
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = packed_row(batch.cu_seqlens, 128)
    assert layout.blocks == host.layout.blocks and row.cu_seqlens_q.tolist() == [0, 700, 701, 1500]
    for own, other in (
        (layout.to_flat, host.layout.to_flat), (layout.to_row, host.layout.to_row), (numbers, host.sequence_1T)
    ):  # fmt: skip
        assert own.is_cuda and torch.equal(own.cpu(), other)


def needs(gib: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if total < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, this one has {total:.0f}")


@torch.no_grad()
def test_the_30b_preset_scores_98k_tokens(layout: ParallelLayout) -> None:
    """63 GiB of random weights. What comes later cannot change what came before, so a prefix alone is the reference."""
    needs(100)
    config = NemotronHConfig.preset(FULL)
    model = nemotron_h.build(config, layout, "bf16").eval()
    long = tokens(98304, config.vocab_size)
    found, chosen = [], torch.full((len(long), len(config.layers("E")), config.num_experts_per_tok), NO_CHOICE)
    for row in (long[:4096], long):
        batch = on_device(to_batch([Sequence(row, (1,) * len(row))]), CUDA)
        # Random routers nearly tie, so that rounding alone moves tokens to other experts: the prefix keeps its own.
        routing = Routing(chosen.to(CUDA, torch.uint8)) if found else Routing()
        logprobs_T, entropy_T = target_logprobs(model, batch, RAW, True, routing)
        assert torch.isfinite(logprobs_T).all() and torch.isfinite(entropy_T).all()
        assert abs(float(logprobs_T[:-1].mean()) + math.log(config.vocab_size)) < 1.5
        found.append(logprobs_T)
        if len(found) == 1:
            chosen[: len(row)] = routing.chosen().cpu()
    gap = (found[1][:4095] - found[0][:4095]).abs()
    print(f"gap of the prefix: mean {gap.mean():.4f}, median {gap.median():.4f}, most {gap.max():.3f} nats")  # noqa: T201
    assert gap.mean() < 0.05 and gap.median() < 0.05, (gap.mean(), gap.max())
    assert torch.cuda.max_memory_allocated() < 135 * 2**30


def test_a_full_width_stack_is_trained(layout: ParallelLayout) -> None:
    """One layer of each kind at the published widths and vocabulary: 2B parameters, AdamW in fp32."""
    needs(70)
    config = dataclasses.replace(NemotronHConfig.preset(FULL), hybrid_override_pattern="M*E")
    hardware = HardwareConfig(name="one_gpu", precision="bf16")
    learner = MegatronLearner(config, LearnerSettings(OptimizerConfig(lr=1e-3), 8, hardware=hardware), seed=3)
    rows = [Sequence(tokens(length, 4096), (1,) * length) for length in (100, 700, 1200)]
    steps = [learner.update(rows, cross_entropy("token")) for _ in range(8)]
    losses = [metrics["loss"] for metrics in steps]
    assert abs(losses[0] - math.log(config.vocab_size)) < 1.0, losses
    assert losses[-1] < losses[0] - 1.0 and all(math.isfinite(metrics["grad_norm"]) for metrics in steps), losses
