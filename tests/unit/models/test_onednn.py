"""oneDNN's products against float64, in every order in memory, and when they are used at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_cascade.models import onednn
from nemo_cascade.models.moe import expert_kernel
from tests import ranks
from tests.unit.models import linear_over_ranks

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")
CPUINFO = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A : B\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
LARGE = 160  # its third power is worth a call


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor: oneDNN computes on all of them."""
    monkeypatch.setattr(onednn, "here", lambda: True)
    assert onednn.WORTH <= LARGE**3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """[M, K, N] of each product that goes to oneDNN."""
    seen = []
    product = onednn._product

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append((*left.shape, right.shape[1]))
        return product(left, right)

    monkeypatch.setattr(onednn, "_product", counted)
    return seen


def stored(matrix: torch.Tensor, order: str) -> torch.Tensor:
    """The same numbers, lying differently in memory."""
    rows, columns = matrix.shape
    if order == "columns":
        return matrix.t().contiguous().t()
    if order == "gaps":
        return torch.cat([matrix, torch.full((rows, 3), torch.nan)], dim=1)[:, :columns]
    if order == "gaps in columns":
        return stored(matrix.t(), "gaps").t()
    return matrix.contiguous()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To fp32's rounding over some hundred additions."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found.double() - expected).abs().max() <= 3e-6 * expected.abs().max()


ORDERS = ("rows", "columns", "gaps", "gaps in columns")


@pytest.mark.parametrize("left_order", ORDERS)
@pytest.mark.parametrize("right_order", ORDERS)
@pytest.mark.parametrize("shape", [(LARGE, LARGE, LARGE), (700, 129, 24), (24, 129, 700), (1, 1449, 1450)])
def test_every_order_in_memory_gives_the_product(
    calls: list[tuple[int, int, int]], left_order: str, right_order: str, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    close(onednn.multiply(stored(left, left_order), stored(right, right_order)), left.double() @ right.double())
    assert calls, "the test must not be about MKL"


@pytest.mark.parametrize("rows", [0, 1, onednn.ROWS - 1, 4 * onednn.ROWS, 4 * onednn.ROWS + 1, 6 * onednn.ROWS - 1])
def test_rows_that_change_are_cut_and_none_is_lost(calls: list[tuple[int, int, int]], rows: int) -> None:
    """Values and the sum over the rows; oneDNN meets multiples of ROWS only."""
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(rows, LARGE, generator=generator), torch.randn(LARGE, LARGE, generator=generator)
    out = torch.full((rows, LARGE), torch.nan)
    onednn.multiply_rows(left, right, out)
    if rows:
        close(out, left.double() @ right.double())
    others, summed = torch.randn(rows, LARGE, generator=generator), torch.full((LARGE, LARGE), torch.nan)
    onednn.multiply_over_rows(left, others, summed)
    expected = left.double().t() @ others.double()
    close(summed, expected) if rows else torch.testing.assert_close(summed, torch.zeros_like(summed))
    cut = rows // onednn.ROWS * onednn.ROWS
    assert calls == ([(cut, LARGE, LARGE), (LARGE, cut, LARGE)] if rows >= 4 * onednn.ROWS else [])


def test_experts_get_their_own_rows(calls: list[tuple[int, int, int]]) -> None:
    """Sorted rows of three experts, one of them without any."""
    counts, generator = [300, 0, 137], torch.Generator().manual_seed(3)
    rows, weights = torch.randn(437, LARGE, generator=generator), torch.randn(3, LARGE, LARGE, generator=generator)
    kernel = expert_kernel(rows, weights, torch.tensor(counts))
    parts = rows.double().split(counts)
    expected = [part @ weight.double() for part, weight in zip(parts, weights, strict=True)]
    close(kernel.rows(rows, weights), torch.cat(expected))
    close(kernel.outer(rows, rows), torch.stack([part.t() @ part for part in parts]))
    assert {call[0] for call in calls} == {256, 128, LARGE}


@pytest.mark.parametrize("upstream", ["dense", "expanded", "turned"])
def test_values_and_gradients_are_those_of_the_linear_layer(upstream: str) -> None:
    """Also from a gradient that is one number in memory, as a sum gives it; output and gradient lie row by row."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(320, LARGE, generator=generator, requires_grad=True)
    weight = torch.randn(200, LARGE, generator=generator, requires_grad=True)
    grad = torch.randn(320, 200, generator=generator)
    grad = {"dense": grad, "expanded": torch.ones(()).expand(320, 200), "turned": stored(grad, "columns")}[upstream]
    out = onednn.linear(x if upstream == "dense" else stored(x, "columns"), weight)
    found = torch.autograd.grad(out, (x, weight), grad)
    wide = [value.detach().double().requires_grad_() for value in (x, weight)]
    expected = torch.nn.functional.linear(*wide)
    close(out, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        close(ours, theirs)
    assert out.is_contiguous() and found[0].is_contiguous()


def test_more_dimensions_and_change_in_place() -> None:
    """As with torch's layer, what comes out may be overwritten by what follows."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(5, 64, LARGE, generator=generator), torch.randn(200, LARGE, generator=generator)
    weight.requires_grad_()
    out = onednn.linear(x, weight).mul_(2.0)
    assert out.shape == (5, 64, 200)
    out.sum().backward()
    close(weight.grad, 2.0 * x.double().sum((0, 1)).expand(200, LARGE))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """The node knows first derivatives only; silence would be a wrong number."""
    x = torch.randn(LARGE, LARGE, requires_grad=True)
    first = torch.autograd.grad(onednn.linear(x, x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_ranks_that_share_a_layer_add_up(tmp_path: Path) -> None:
    """Columns and rows of a weight on two ranks: values and gradients of one, however tensors lie in memory."""
    ranks.run(linear_over_ranks.__file__, str(tmp_path))


def test_only_the_gradient_that_is_wanted_is_computed(calls: list[tuple[int, int, int]]) -> None:
    x = torch.randn(LARGE, LARGE, requires_grad=True)
    onednn.linear(x, torch.randn(LARGE, LARGE)).sum().backward()
    assert len(calls) == 2 and x.grad is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_comes_out(value: float) -> None:
    """A broken step must be seen."""
    left = torch.ones(LARGE, LARGE)
    left[7, 9] = value
    found = onednn.multiply(left, torch.ones(LARGE, LARGE))
    torch.testing.assert_close(found[7], torch.full((LARGE,), value), equal_nan=True)
    assert found[:7].eq(LARGE).all() and found[8:].eq(LARGE).all()


def test_the_same_bits_every_time() -> None:
    left, right = torch.randn(333, LARGE), torch.randn(LARGE, LARGE)
    assert torch.equal(onednn.multiply(left, right), onednn.multiply(left.clone(), right.clone()))


def test_mkl_where_it_is_asked_for_or_as_good(
    calls: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = torch.randn(LARGE, LARGE), torch.randn(16, 16)
    assert torch.equal(onednn.multiply(small, small), small @ small)
    assert torch.equal(onednn.multiply(large.double(), large.double()), large.double() @ large.double())
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(onednn.multiply(large, large), large @ large)
        assert torch.equal(onednn.linear(large, large), torch.nn.functional.linear(large, large))
    monkeypatch.setattr(onednn, "here", lambda: False)
    assert torch.equal(onednn.linear(large, large), torch.nn.functional.linear(large, large))
    assert calls == []


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512bw", True), ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False), ("AuthenticAMD", "avx512fake", False),
    ],
)  # fmt: skip
def test_which_processors(vendor: str, flags: str, expected: bool) -> None:
    assert onednn.amd_with_avx512(CPUINFO.format(vendor=vendor, flags=flags)) is expected


@pytest.mark.parametrize("text", ["", "\n\n", "processor : 0", "Features : fp asimd\nCPU implementer : 0x41"])
def test_a_processor_that_says_something_else(text: str) -> None:
    assert onednn.amd_with_avx512(text) is False


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux says there what the processor is")
def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor, the environment, and whether this PyTorch has oneDNN."""
    monkeypatch.undo()
    monkeypatch.delenv("NEMO_CASCADE_NATIVE", raising=False)
    decide = onednn.here.__wrapped__
    monkeypatch.setattr(onednn, "amd_with_avx512", lambda _: False)
    assert decide() is False
    monkeypatch.setattr(onednn, "amd_with_avx512", lambda _: True)
    assert decide() is True
    monkeypatch.setenv("NEMO_CASCADE_NATIVE", "0")
    assert decide() is False
    monkeypatch.delenv("NEMO_CASCADE_NATIVE")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert decide() is False
