"""What FP8 does to a matrix product, shown without a GPU: quantise both operands in blocks, dequantise, multiply.

An e4m3 number has 4 bits of exponent and 3 of mantissa: 256 codes, largest 448, smallest 2^-9. A block of values shares
one scale, chosen so that its largest magnitude lands on 448. Transformer Engine multiplies the codes and adds in fp32;
here the dequantised operands are fp32 numbers and so are the sums: the same products, added in another order. What is
quantised, in which blocks, with which scales and how it is rounded is exact, and that is where FP8 loses information.

Every operand is quantised from the high-precision tensor along the dimension that its product sums over, as Transformer
Engine does: y = x W^T sums over K, dx = dy W over N, dW = dy^T x over tokens. So x has two quantised forms, W has one
with square blocks and two with vectors. A dimension that is no multiple of the block is filled with zeros, which moves
no maximum: the last block is just shorter.

Not emulated: FP8 weights kept between steps (`fp8_param`), FP8 attention, FP8 communication; no profile has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# the number behind each code; looking up is six times faster than torch's conversion on a CPU
_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
# fp32 as bits: 8 of exponent above 23 of mantissa. e8m0 has the exponent alone, so 2^-127 is its smallest number: in
# fp32 a subnormal one, with only the highest bit of the mantissa.
_MANTISSA_BITS = 23
_MANTISSA = 0x7FFFFF
_SMALLEST_E8M0 = 0x400000


@dataclass(frozen=True)
class BlockRecipe:
    """How operands are cut into blocks and scaled.

    `block`: values along the summed dimension that share a scale. `weight_rows`: rows of a weight that share it as well
    (128: squares; 1: vectors). `scale`: fp32 = 448 / max; power_of_two = that rounded down; e8m0 = the MX format, an
    8-bit exponent rounded up, so that the maximum still fits.
    """

    name: str
    block: int
    weight_rows: int
    scale: str


BLOCKWISE = BlockRecipe("blockwise", block=128, weight_rows=128, scale="fp32")
MXFP8 = BlockRecipe("mxfp8", block=32, weight_rows=1, scale="e8m0")
RECIPES = {recipe.name: recipe for recipe in (BLOCKWISE, MXFP8)}


@dataclass(frozen=True)
class Quantised:
    """e4m3 codes in blocks [block rows, rows, block columns, columns] and the dequantisation scale of each block.

    value = code * scale; `shape` is that of the matrix, without what fills its last blocks up.
    """

    blocks: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]

    @property
    def codes(self) -> torch.Tensor:
        """The codes as a matrix."""
        return self._matrix(self.blocks)

    def dequantised(self) -> torch.Tensor:
        """The fp32 numbers that the codes stand for."""
        index = self.blocks.view(torch.uint8).flatten().int()
        values = _VALUES.to(index.device).index_select(0, index).view(self.blocks.shape)
        return self._matrix(values.mul_(self.scales.float()[:, None, :, None]))

    def _matrix(self, blocks: torch.Tensor) -> torch.Tensor:
        down, rows, across, columns = blocks.shape
        return blocks.view(down * rows, across * columns)[: self.shape[0], : self.shape[1]]


def quantise(tensor: torch.Tensor, rows: int, columns: int, scale: str) -> Quantised:
    """A matrix [R, C] in blocks of `rows` x `columns`; the blocks at the edges may be smaller."""
    R, C = tensor.shape
    fill = (0, -C % columns, 0, -R % rows)
    padded = F.pad(tensor.float(), fill) if any(fill) else tensor.float().contiguous()
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = blocks.abs().amax(dim=(1, 3))
    up, down = _scales(largest, scale, torch.finfo(tensor.dtype).max)
    scaled = (blocks * up[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return Quantised(scaled.to(E4M3), down, (R, C))


def _scales(largest: torch.Tensor, kind: str, ceiling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a block is multiplied by, what its codes are multiplied by) from its largest magnitude.

    An all-zero block has scale 1 (e8m0: 2^-127). `ceiling` bounds 448 / max for a block of vanishing values.
    """
    if kind == "e8m0":
        exponent = _exponent_above(largest * torch.tensor(1.0 / E4M3_MAX))
        return _power_of_two(254 - exponent), _power_of_two(exponent).to(torch.float8_e8m0fnu)
    assert kind in ("fp32", "power_of_two"), kind
    # a true division: `number / tensor` is a reciprocal times a number in torch, rounded twice
    up = torch.full_like(largest, E4M3_MAX).div(largest).clamp(max=ceiling)
    if kind == "power_of_two":
        up = (up.view(torch.int32) & ~_MANTISSA).view(torch.float32)
    up = torch.where(largest == 0.0, 1.0, up)
    return up, up.reciprocal()


def _exponent_above(value: torch.Tensor) -> torch.Tensor:
    """The biased exponent e of the smallest power of two 2^(e - 127) that is not below a non-negative fp32 value."""
    bits = value.view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_BITS, bits & _MANTISSA
    above = (mantissa > 0) & ((exponent > 0) | (mantissa > _SMALLEST_E8M0))
    return (exponent + above.int()).clamp(max=254)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^(e - 127) of biased exponents 0..254, exactly."""
    return torch.where(exponent == 0, _SMALLEST_E8M0, exponent << _MANTISSA_BITS).int().view(torch.float32)


def rounded(tensor: torch.Tensor, rows: int, columns: int, recipe: BlockRecipe) -> torch.Tensor:
    """What is left of a matrix after FP8, in fp32."""
    return quantise(tensor, rows, columns, recipe.scale).dequantised()


class _Fp8Linear(torch.autograd.Function):
    """y = Q(x) Q(W)^T, dx = Q(dy) Q(W), dW = Q(dy)^T Q(x); x [T, K], W [N, K], sums in fp32, results in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: BlockRecipe) -> torch.Tensor:
        operand = rounded(weight, recipe.weight_rows, recipe.block, recipe)
        # square blocks are the same from both sides
        ctx.save_for_backward(x, weight, operand if recipe.weight_rows == recipe.block else None)
        ctx.recipe = recipe
        return (rounded(x, 1, recipe.block, recipe) @ operand.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, operand_of_x = ctx.saved_tensors
        recipe: BlockRecipe = ctx.recipe
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if operand_of_x is None:
                operand_of_x = rounded(weight, recipe.block, recipe.weight_rows, recipe)
            grad_x = (rounded(grad, 1, recipe.block, recipe) @ operand_of_x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            operand = rounded(x, recipe.block, 1, recipe)
            grad_weight = (rounded(grad, recipe.block, 1, recipe).t() @ operand).to(weight.dtype)
        return grad_x, grad_weight, None


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, recipe: BlockRecipe) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed, with both operands (and those of the gradients) rounded to FP8."""
    flat = x.reshape(-1, x.shape[-1])
    output: torch.Tensor = _Fp8Linear.apply(flat, weight, recipe)
    return output.view(*x.shape[:-1], weight.shape[0])


def expert_products(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    probs: torch.Tensor,
    counts: list[int],
    recipe: BlockRecipe,
) -> torch.Tensor:
    """p_t down_e relu(up_e x_t)^2 of tokens sorted by expert, both products in FP8; blocks never cross experts.

    x [T, h], up [E, f, h], down [E, h, f], p [T]. The router's weight p multiplies before the second product, as in
    Megatron's grouped experts.
    """
    outputs = []
    for expert, (part, weights) in enumerate(zip(x.split(counts), probs.split(counts), strict=True)):
        inner = torch.relu(fp8_linear(part, up[expert], recipe)).square()
        outputs.append(fp8_linear(inner * weights[:, None], down[expert], recipe))
    return torch.cat(outputs)
