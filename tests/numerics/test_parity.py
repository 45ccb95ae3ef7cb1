"""The policy against implementations that share no code with it: transformers, and a float64 recurrence."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.scan import causal_conv_silu, chunked_scan
from tests.numerics.shaken import packed_tokens, shaken

LENGTHS = [1, 31, 32, 33, 100, 2, 65, 7]
LOGPROB_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of the largest gradient in the tensor


@dataclass(frozen=True)
class Pair:
    """A policy and transformers' model, loaded from its export."""

    ours: NemotronH
    theirs: Any
    folder: Path
    config: NemotronHConfig


def read(folder: Path) -> Any:
    """transformers' model of a folder, nothing missing and nothing left over."""
    transformers = pytest.importorskip("transformers")
    loaded, report = transformers.NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded.eval()


@pytest.fixture(scope="module", params=["nano", pytest.param("nemotron_h_50m", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, layout: ParallelLayout, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = NemotronHConfig.preset(request.param)
    ours = shaken(config, layout, scale=4.0 if request.param == "nano" else 2.0, bias=0.05)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    convert.save_folder(ours, config, folder)
    return Pair(ours, read(folder), folder, config)


def separately(model: Any, tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """transformers' log-probabilities [T, V], one sequence at a time."""
    parts = [model(tokens[begin:end][None]).logits[0] for begin, end in itertools.pairwise(bounds)]
    return torch.cat(parts).log_softmax(-1)


def padded(model: Any, tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """transformers' log-probabilities [T, V] of one right-padded batch."""
    rows = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
    grid = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(grid.shape[1]) < torch.diff(bounds)[:, None]
    return model(grid, attention_mask=real.long()).logits[real].log_softmax(-1)


def test_log_probabilities_and_gradients_agree_with_transformers(pair: Pair) -> None:
    config = pair.config
    tokens, bounds = packed_tokens(config.vocab_size, LENGTHS)
    targets = tokens.roll(-1)
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    ours = pair.ours.packed_logits(tokens, bounds).log_softmax(-1)
    (-ours.gather(1, targets[:, None]).mean()).backward()
    theirs = separately(pair.theirs, tokens, bounds)
    (-theirs.gather(1, targets[:, None]).mean()).backward()
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < LOGPROB_TOLERANCE
    with torch.no_grad():
        assert (ours - padded(pair.theirs, tokens, bounds)).abs().max() < LOGPROB_TOLERANCE
    check_gradients(pair)


def check_gradients(pair: Pair) -> None:
    """Every tensor under its published name: what our slots say lies where, read from the gradients."""
    by_parameter = {id(parameter): parameter.grad for parameter in pair.ours.parameters()}
    assert all(gradient is not None for gradient in by_parameter.values())
    values = {id(parameter): parameter.detach().clone() for parameter in pair.ours.parameters()}
    with torch.no_grad():
        for parameter in pair.ours.parameters():
            parameter.copy_(by_parameter[id(parameter)])
        gradients = dict(convert.export_weights(pair.ours, pair.config))
        for parameter in pair.ours.parameters():
            parameter.copy_(values[id(parameter)])
    compared = set()
    for name, parameter in pair.theirs.named_parameters():
        for published, gradient in convert._canonical(name, parameter.grad):
            largest = gradient.abs().max()
            assert largest > 0, published  # every expert is chosen by some token
            assert (gradients[published] - gradient).abs().max() <= GRADIENT_TOLERANCE * largest, published
            compared.add(published)
    assert compared == {name for name in pair.config.tensor_shapes() if "e_score_correction_bias" not in name}


@torch.no_grad()
def test_unpacked_log_probabilities_agree_with_transformers(pair: Pair) -> None:
    tokens, bounds = packed_tokens(pair.config.vocab_size, LENGTHS)
    for begin, end in itertools.pairwise(bounds.tolist()):
        alone = torch.tensor([0, end - begin]).int()
        ours = pair.ours.packed_logits(tokens[begin:end], alone).log_softmax(-1)
        theirs = pair.theirs(tokens[begin:end][None]).logits[0].log_softmax(-1)
        assert (ours - theirs).abs().max() < LOGPROB_TOLERANCE, end - begin


@torch.no_grad()
def test_what_transformers_saves_is_the_same_model_for_us(pair: Pair, layout: ParallelLayout, tmp_path: Path) -> None:
    """The other direction: weights that transformers drew and saved, in its own names, read by us and given back."""
    torch.manual_seed(9)
    for parameter in pair.theirs.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    pair.theirs.save_pretrained(tmp_path / "saved", max_shard_size="50MB")
    ours = nemotron_h.build(pair.config, layout)
    convert.load_folder(ours, tmp_path / "saved")
    tokens, bounds = packed_tokens(pair.config.vocab_size, LENGTHS)
    difference = ours.packed_logits(tokens, bounds).log_softmax(-1) - separately(pair.theirs, tokens, bounds)
    assert difference.abs().max() < LOGPROB_TOLERANCE

    convert.save_folder(ours, pair.config, tmp_path / "again")
    state, again = pair.theirs.state_dict(), read(tmp_path / "again").state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


@torch.no_grad()
def test_import_of_export_is_bit_exact(pair: Pair, layout: ParallelLayout) -> None:
    other = nemotron_h.build(pair.config, layout)
    convert.load_folder(other, pair.folder)
    tensors, again = (dict(convert.export_weights(model, pair.config)) for model in (pair.ours, other))
    assert tensors.keys() == pair.config.tensor_shapes().keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    parameters = dict(other.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in pair.ours.named_parameters())


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


def test_exported_config_is_read_as_the_same_model(pair: Pair) -> None:
    config = pair.config
    assert pair.theirs.config.hybrid_override_pattern == config.hybrid_override_pattern
    again = json.loads(pair.theirs.config.to_json_string(use_diff=False))
    read = NemotronHConfig.from_hf_json(again)
    assert read.tensor_shapes() == config.tensor_shapes()
    assert (read.routed_scaling_factor, read.time_step_min) == (2.5, config.time_step_min)
