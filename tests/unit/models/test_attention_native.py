"""The C attention against softmax in float64, and against PyTorch's inside a model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import attention, nemotron_h
from nemo_cascade.models.attention import CoreAttention
from nemo_cascade.models.attention_native import attend, library, usable
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.packed import packed_row

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(library() is None, reason="no C compiler, or neither AVX2 nor AVX-512"),
]

CONFIG = NemotronHConfig(
    vocab_size=32, hidden_size=24, hybrid_override_pattern="M*E*", num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=6, n_groups=2, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=4, moe_shared_expert_intermediate_size=4, chunk_size=8,
)  # fmt: skip
LENGTHS = [1, 2, 15, 16, 17, 128, 300, 1]
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
TOKENS = BOUNDS[-1]


def drawn(heads: int, groups: int, width: int) -> list[torch.Tensor]:
    """Query, key, value: parts of one projection, as Megatron cuts it."""
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(TOKENS, groups, (heads // groups + 2) * width, generator=generator)
    query, key, value = projected.split([heads // groups * width, width, width], dim=2)
    return [query.reshape(TOKENS, heads, width), key, value]


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float
) -> torch.Tensor:
    """By the formula, sequence by sequence."""
    ratio, outputs = query.shape[1] // key.shape[1], []
    for begin, end in itertools.pairwise(bounds):
        keys, values = (part[begin:end].repeat_interleave(ratio, dim=1) for part in (key, value))
        scores = scale * torch.einsum("ihd,khd->hik", query[begin:end], keys)
        future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hik,khd->ihd", weights, values).flatten(1))
    return torch.cat(outputs)


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float
) -> torch.Tensor:
    """The same for one group, query by query, so that no token meets what it may not see, not even times 0."""
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        for token in range(begin, end):
            weights = (scale * query[token] @ key[begin : token + 1, 0].T).softmax(dim=-1)
            outputs.append((weights @ value[begin : token + 1, 0]).flatten())
    return torch.stack(outputs)


def differentiated(compute, parts: list[torch.Tensor], bounds: list[int], scale: float) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [part.detach().requires_grad_() for part in parts]
    output = compute(*leaves, bounds, scale)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    (output * upstream).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(2, 2, 16), (4, 2, 32), (4, 1, 32), (2, 1, 48), (2, 1, 64), (1, 1, 128), (2, 2, 256)]
)
@pytest.mark.parametrize("sharpness", [1, 6])
def test_values_and_gradients_equal_softmax_in_float64(heads: int, groups: int, width: int, sharpness: int) -> None:
    """To 1e-5 of a sequence's largest entry, or 1e-6 of the row's: one token has the gradient 0 but for rounding.

    Six times the usual scale makes scores of up to +-25 and weights near 0 and 1.
    """
    parts, scale = drawn(heads, groups, width), sharpness * width**-0.5
    assert usable(*parts) and not parts[1].is_contiguous()
    found = differentiated(attend, parts, BOUNDS, scale)
    expected = differentiated(softmax_attention, [part.double() for part in parts], BOUNDS, scale)
    for name, value, wanted in zip(("output", "query", "key", "value"), found, expected, strict=True):
        for begin, end in itertools.pairwise(BOUNDS):
            bound = 1e-5 * max(wanted[begin:end].abs().max(), 0.1 * wanted.abs().max())
            assert (value[begin:end] - wanted[begin:end]).abs().max() < bound, (name, end - begin)


def test_a_sequence_has_the_same_bits_alone_and_packed() -> None:
    parts = drawn(4, 2, 32)
    packed = differentiated(attend, parts, BOUNDS, 0.2)
    upstream = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(4))
    for begin, end in itertools.pairwise(BOUNDS):
        leaves = [part[begin:end].detach().requires_grad_() for part in parts]
        output = attend(*leaves, [0, end - begin], 0.2)
        (output * upstream[begin:end]).sum().backward()
        for whole, alone in zip(packed, [output.detach(), *(leaf.grad for leaf in leaves)], strict=True):
            assert torch.equal(whole[begin:end], alone)


def test_huge_scores_are_a_choice_of_the_largest_and_later_tokens_never_count() -> None:
    """Scores of thousands neither overflow nor lose the others; a value of 1e30 behind a query adds exactly nothing."""
    parts = drawn(2, 1, 32)
    found = attend(*parts, BOUNDS, 300.0)
    expected = softmax_attention(*(part.double() for part in parts), BOUNDS, 300.0)
    assert (found - expected).abs().max() < 1e-2  # a score of 10,000 is known to 1e-3 in fp32
    query, key, value = (part.clone() for part in parts)
    before = attend(query, key, value, BOUNDS, 0.2)
    last = BOUNDS[7] - 1
    key[last], value[last] = 100.0, 1e30
    after = attend(query, key, value, BOUNDS, 0.2)
    assert torch.equal(after[:last], before[:last]) and torch.equal(after[last + 1 :], before[last + 1 :])
    assert after[last].abs().max() > 1e25


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_and_infinity_come_out_where_pytorch_has_them_and_nowhere_else(bad: float, part: int) -> None:
    """In the query, key or value of a token in the middle of the longest sequence; backward as well."""
    parts = [tensor.clone() for tensor in drawn(2, 1, 32)]
    token = BOUNDS[6] + 100
    parts[part][token, 0, 5] = bad
    found, expected = (differentiated(compute, parts, BOUNDS, 0.2) for compute in (attend, one_by_one))
    outputs = [~result[0].isfinite() for result in (found, expected)]
    assert outputs[0][token : BOUNDS[7]].any()
    assert torch.equal(outputs[0][token:], outputs[1][token:])
    for value, wanted in zip(found, expected, strict=True):
        assert value[: BOUNDS[6]].isfinite().all() and value[BOUNDS[7] :].isfinite().all()
        assert not value[~wanted.isfinite()].isfinite().any()


def test_a_model_has_the_loss_and_gradients_of_pytorchs_attention(
    layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = nemotron_h.build(CONFIG, layout), []
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(CONFIG.vocab_size, (1, TOKENS), generator=generator)
    row = packed_row(torch.tensor(BOUNDS).int(), CONFIG.chunk_size)

    def results() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(tokens, torch.arange(TOKENS)[None], None, packed_seq_params=row)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        return grads | {"loss": loss.detach()}

    monkeypatch.setattr(attention, "attend", lambda *args: ran.append(1) or attend(*args))
    native = results()
    monkeypatch.setattr(attention, "usable", lambda *args: False)
    plain = results()
    assert ran == [1, 1]
    for name, value in plain.items():
        assert (native[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


def test_what_it_does_not_take_goes_to_pytorch() -> None:
    parts = drawn(4, 2, 32)
    assert usable(*parts)
    assert not usable(*(part.double() for part in parts))
    assert not usable(parts[0], parts[1], parts[2].bfloat16())
    assert not usable(*(part[..., :24] for part in parts))
    assert not usable(*(torch.zeros(3, 1, 272) for _ in range(3)))
    torch.set_num_threads(2)
    assert not usable(*parts)


def test_without_a_compiler_or_short_vectors_pytorch_attends(
    layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    core = CoreAttention(nemotron_h.transformer_config(CONFIG, layout))
    parts, row = drawn(4, 2, 16), packed_row(torch.tensor(BOUNDS).int(), CONFIG.chunk_size)
    native = core(*parts, packed_seq_params=row)

    def stays_with_pytorch() -> None:
        library.cache_clear()
        assert not usable(*parts)
        torch.testing.assert_close(core(*parts, packed_seq_params=row), native, atol=2e-6, rtol=1e-5)

    for variable, value in (("NEMO_CASCADE_NATIVE", "0"), ("CC", "/bin/false")):
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            patch.setenv(variable, value)
            stays_with_pytorch()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        stays_with_pytorch()
    library.cache_clear()
    assert usable(*parts)
