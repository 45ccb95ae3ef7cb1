"""The FP8 emulation against a reference of loops and a table of all e4m3 numbers: equal to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_cascade.models.fp8_emulation import (
    BLOCKWISE,
    MXFP8,
    BlockRecipe,
    expert_products,
    fp8_linear,
    quantise,
)

POWERS = BlockRecipe("powers", block=128, weight_rows=128, scale="power_of_two")
RECIPES = [BLOCKWISE, MXFP8, POWERS]


def e4m3_numbers() -> np.ndarray:
    """The value of each of the 256 codes by definition: 1 bit of sign, 4 of exponent (bias 7), 3 of mantissa."""
    values = np.full(256, np.nan, dtype=np.float32)
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
        if exponent == 15 and mantissa == 7:
            continue  # the only codes that are no numbers; there is no infinity
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[code] = sign * size
    return values


TABLE = e4m3_numbers()
POSITIVE = TABLE[:127]  # codes 0..126 in rising order


def nearest_e4m3(value: np.float32) -> np.float32:
    """The nearest number of the format; of two equally near ones that with the even code."""
    size = min(abs(float(value)), 448.0)
    above = int(np.searchsorted(POSITIVE, np.float64(size)))
    below = above if POSITIVE[above] == size else above - 1
    left, right = size - float(POSITIVE[below]), float(POSITIVE[above]) - size
    chosen = below if left < right or (left == right and below % 2 == 0) else above
    return np.float32(math.copysign(float(POSITIVE[chosen]), float(value)))


def reference_scales(largest: np.float32, kind: str, ceiling: float) -> tuple[np.float32, np.float32]:
    """(up, down) of a block, in single precision as a kernel computes them."""
    if kind == "e8m0":
        wanted = float(largest * np.float32(1.0 / 448.0))
        exponent = -127
        while 2.0**exponent < wanted:
            exponent += 1
        return np.float32(2.0**-exponent), np.float32(2.0**exponent)
    if largest == 0:
        return np.float32(1), np.float32(1)
    with np.errstate(over="ignore"):
        up = np.minimum(np.float32(448.0) / largest, np.float32(ceiling))
    if kind == "power_of_two":
        up = np.float32(2.0 ** math.floor(math.log2(float(up))))
    return up, np.float32(1) / up


def reference(matrix: np.ndarray, rows: int, columns: int, kind: str, ceiling: float) -> np.ndarray:
    """Round a matrix to FP8 block by block, number by number."""
    out = np.empty_like(matrix)
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            block = matrix[top : top + rows, left : left + columns]
            up, down = reference_scales(np.abs(block).max(), kind, ceiling)
            for row in range(block.shape[0]):
                for column in range(block.shape[1]):
                    code = nearest_e4m3(block[row, column] * up)
                    out[top + row, left + column] = code * down
    return out


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values of very different sizes, with zeros and a block of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values = values * torch.exp(3.0 * torch.randn(rows, 1, generator=generator))
    values[torch.rand(rows, columns, generator=generator) < 0.05] = 0.0
    values[0, :] = 0.0
    return values.to(dtype)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def check(tensor: torch.Tensor, rows: int, columns: int, kind: str) -> None:
    found = quantise(tensor, rows, columns, kind).dequantised()
    expected = reference(as_numpy(tensor), rows, columns, kind, torch.finfo(tensor.dtype).max)
    np.testing.assert_array_equal(as_numpy(found), expected)


def test_the_codes_are_those_of_the_format() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(codes, TABLE)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=generator) * torch.exp(4 * torch.randn(4000, generator=generator))
    halves = torch.tensor(POSITIVE[:-1] + np.diff(POSITIVE) / 2)  # exactly between two numbers
    values = torch.cat([values.clamp(-448, 448), halves, -halves])
    expected = [nearest_e4m3(value) for value in values.numpy()]
    np.testing.assert_array_equal(values.to(torch.float8_e4m3fn).float().numpy(), np.array(expected))


@pytest.mark.parametrize("kind", ["fp32", "power_of_two", "e8m0"])
@pytest.mark.parametrize("shape", [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1)])
def test_blocks_are_rounded_as_by_the_reference(shape: tuple[int, int], kind: str) -> None:
    check(matrix(37, 150, seed=1), *shape, kind)  # neither side a multiple of any block
    check(matrix(150, 37, seed=2, dtype=torch.float32), *shape, kind)


@pytest.mark.parametrize("kind", ["fp32", "power_of_two", "e8m0"])
def test_extreme_blocks(kind: str) -> None:
    for size in (2.0**-149, 2.0**-127, 3 * 2.0**-128, 1e-38, 448.0, 449.0, 3.0e38):
        check(torch.tensor([[size, -size / 3, 0.0, size / 2]]), 1, 4, kind)
    assert quantise(torch.zeros(1, 32), 1, 32, kind).dequantised().abs().max() == 0.0
    assert quantise(torch.tensor([[1.0, math.nan]]), 1, 2, kind).dequantised().isnan().any()


def test_a_shorter_last_block_is_a_block_filled_with_zeros() -> None:
    short = matrix(40, 200, seed=3)
    whole = torch.nn.functional.pad(short, (0, 56, 0, 88))
    for rows, columns in ((1, 128), (128, 128), (128, 1)):
        padded = quantise(whole, rows, columns, "fp32").dequantised()
        assert torch.equal(quantise(short, rows, columns, "fp32").dequantised(), padded[:40, :200])
        assert padded[40:].abs().max() == 0.0 and padded[:, 200:].abs().max() == 0.0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_linear_layer_and_both_gradients(recipe: BlockRecipe) -> None:
    tokens, inner, outer = 70, 150, 45
    x, weight, grad = matrix(tokens, inner, 4), matrix(outer, inner, 5), matrix(tokens, outer, 6)
    x, weight = (x / 50).requires_grad_(), (weight / 50).requires_grad_()
    output = fp8_linear(x, weight, recipe)
    output.backward(grad)
    ceiling, block, tall = torch.finfo(torch.bfloat16).max, recipe.block, recipe.weight_rows

    def left(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return torch.tensor(reference(as_numpy(tensor), rows, columns, recipe.scale, ceiling))

    expected = {
        "y": left(x, 1, block) @ left(weight, tall, block).t(),
        "dx": left(grad, 1, block) @ left(weight, block, tall),
        "dW": left(grad, block, 1).t() @ left(x, block, 1),
    }
    assert x.grad is not None and weight.grad is not None
    for name, found in (("y", output), ("dx", x.grad), ("dW", weight.grad)):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected[name].to(torch.bfloat16)), name
    exact = (as_numpy(x) @ as_numpy(weight).T).astype(np.float32)
    error = np.linalg.norm(as_numpy(output) - exact) / np.linalg.norm(exact)
    assert 0.005 < error < 0.06  # three bits of mantissa: 2^-4 at most per operand, and independent


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_numbers_that_fp8_holds_pass_unchanged(recipe: BlockRecipe) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-8, 9, (33, 128), generator=generator).float()
    weight = torch.randint(-8, 9, (20, 128), generator=generator).float()
    x[:, ::32] = weight[:, ::32] = 14.0  # 448 = 14 * 2^5: every scale is a power of two
    assert torch.equal(fp8_linear(x, weight, recipe), x @ weight.t())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_experts_are_two_linear_layers_each_on_its_own_tokens(recipe: BlockRecipe) -> None:
    counts, hidden, width = [30, 0, 5], 48, 80
    x = (matrix(35, hidden, 8) / 50).requires_grad_()
    up, down = matrix(3 * width, hidden, 9).view(3, width, hidden), matrix(3 * hidden, width, 10).view(3, hidden, width)
    probs = torch.rand(35, generator=torch.Generator().manual_seed(11)).to(torch.bfloat16)
    output = expert_products(x, up, down, probs, counts, recipe)
    begin = 0
    for expert, count in enumerate(counts):
        rows = slice(begin, begin + count)
        begin += count
        inner = torch.relu(fp8_linear(x[rows], up[expert], recipe)).square() * probs[rows, None]
        assert torch.equal(output[rows], fp8_linear(inner, down[expert], recipe))
    output.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[-1].abs().max() > 0
