"""The policy against implementations that share no code with it: transformers, and a float64 recurrence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.scan import causal_conv_silu, chunked_scan

LENGTHS = [1, 31, 32, 33, 100, 2, 65, 7]


def packed_tokens(vocabulary: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture
def oracle(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> torch.nn.Module:
    """transformers' model, loaded from our export."""
    transformers = pytest.importorskip("transformers")
    convert.save_folder(model, config, tmp_path / "hf")
    loaded, report = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded.eval()


def test_log_probabilities_and_gradients_agree_with_transformers(
    model: NemotronH, config: NemotronHConfig, oracle: torch.nn.Module, tmp_path: Path
) -> None:
    tokens, bounds = packed_tokens(config.vocab_size, LENGTHS)
    weights = torch.randn(tokens.shape[0], config.vocab_size, generator=torch.Generator().manual_seed(5))
    ours = model.packed_logits(tokens, bounds).log_softmax(-1)
    (ours * weights).mean().backward()
    theirs = torch.cat(
        [oracle(tokens[begin:end][None]).logits[0].log_softmax(-1) for begin, end in itertools.pairwise(bounds)]
    )
    (theirs * weights).mean().backward()
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-4

    # gradients, compared under published names: put ours where the weights are, export, and let transformers load them
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    gradients = dict(convert.export_weights(model, config))
    compared = 0
    for name, parameter in oracle.named_parameters():
        for published, gradient in convert._canonical(name, parameter.grad):
            scale = gradient.abs().max()  # 0 for an expert that no token chose
            assert (gradients[published] - gradient).abs().max() <= 2e-3 * scale, published
            compared += bool(scale > 0)
    assert compared > 60


def test_packed_equals_separate(model: NemotronH, config: NemotronHConfig) -> None:
    tokens, bounds = packed_tokens(config.vocab_size, LENGTHS)
    with torch.no_grad():
        packed = model.packed_logits(tokens, bounds).log_softmax(-1)
        for index, length in enumerate(LENGTHS):
            begin, end = int(bounds[index]), int(bounds[index + 1])
            alone = model.packed_logits(tokens[begin:end], torch.tensor([0, length]).int()).log_softmax(-1)
            assert (packed[begin:end] - alone).abs().max() < 2e-5, length


def test_state_does_not_cross_a_boundary(model: NemotronH, config: NemotronHConfig) -> None:
    tokens, bounds = packed_tokens(config.vocab_size, LENGTHS)
    other = tokens.clone()
    other[int(bounds[3]) : int(bounds[4])] = (other[int(bounds[3]) : int(bounds[4])] + 1) % config.vocab_size
    with torch.no_grad():
        change = (model.packed_logits(tokens, bounds) - model.packed_logits(other, bounds)).abs().amax(-1)
    inside = torch.zeros(tokens.shape[0], dtype=torch.bool)
    inside[int(bounds[3]) : int(bounds[4])] = True
    assert change[inside].min() > 1e-3
    assert change[~inside].max() < 1e-5


def naive_scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence as written in the Mamba-2 paper, one token at a time."""
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("length", [1, 7, 8, 10, 12, 32])
def test_scan_agrees_with_the_float64_recurrence_in_values_and_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        draw(3, length, 4, 5),
        draw(3, length, 4).exp(),
        -draw(4).exp(),
        draw(3, length, 2, 6),
        draw(3, length, 2, 6),
    ]
    weight = draw(3, length, 4, 5)
    results = []
    for function in (lambda *args: chunked_scan(*args, 8), naive_scan):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        (y * weight).sum().backward()
        results.append((y.detach(), [leaf.grad for leaf in leaves]))
    (ours, our_grads), (naive, naive_grads) = results
    assert (ours - naive).abs().max() < 1e-12
    for ours_g, naive_g in zip(our_grads, naive_grads, strict=True):
        assert (ours_g - naive_g).abs().max() < 1e-11


def test_scan_does_not_overflow_where_the_decay_is_strong() -> None:
    x = torch.ones(1, 32, 1, 2)
    dt = torch.full((1, 32, 1), 50.0, requires_grad=True)
    y = chunked_scan(x, dt, torch.tensor([-16.0]), torch.ones(1, 32, 1, 2), torch.ones(1, 32, 1, 2), 32)
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 100.0))  # every state is forgotten: dt * x * (B . C)
    assert torch.equal(dt.grad, torch.full_like(dt, 4.0))


@pytest.mark.parametrize("length", [1, 3, 9])
def test_convolution_agrees_with_torch(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = causal_conv_silu(x, weight, bias)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    reference = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6)).transpose(
        1, 2
    )
    assert (ours - reference).abs().max() < 1e-13
    assert torch.autograd.gradcheck(causal_conv_silu, (x, weight, bias))


def test_exported_config_is_read_as_the_same_model(oracle: torch.nn.Module, config: NemotronHConfig) -> None:
    assert oracle.config.hybrid_override_pattern == config.hybrid_override_pattern
    again = json.loads(oracle.config.to_json_string(use_diff=False))
    read = NemotronHConfig.from_hf_json(again)
    assert read.tensor_shapes() == config.tensor_shapes()
    assert (read.routed_scaling_factor, read.time_step_min) == (2.5, config.time_step_min)
