"""The matrix products of one training step of a NemotronH, and the time they take alone: what no implementation beats.

The list follows from the config and the batch, not from anybody's code: every linear layer, the scan's four products a
chunk (state-space duality), the attention's two a head over whole sequences, each expert with its even share of the
tokens. A product of the forward pass [m, k] x [k, n] has two in the backward pass: [m, n] x [n, k] and [k, m] x [m, n].
Left out, because they are no products: the depthwise convolution, norms, activations, softmax, the embedding, AdamW.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nemo_cascade.models import onednn
from nemo_cascade.models.config import NemotronHConfig


@dataclass(frozen=True)
class Product:
    """`batch` products [rows, inner] x [inner, columns] in one call."""

    rows: int
    inner: int
    columns: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    def backward(self) -> tuple[Product, Product]:
        """The gradients of both factors."""
        return (
            Product(self.rows, self.columns, self.inner, self.batch),
            Product(self.inner, self.rows, self.columns, self.batch),
        )


def forward_products(config: NemotronHConfig, sequences: int, length: int, scored: int) -> Iterator[Product]:
    """Those of one forward pass over `sequences` of `length` tokens, `scored` of which pass the output layer."""
    for kind in config.hybrid_override_pattern:
        if kind == "M":
            yield from mamba_products(config, sequences, length)
        elif kind == "*":
            yield from attention_products(config, sequences, length)
        else:
            yield from expert_products(config, sequences * length)
    yield Product(scored, config.hidden_size, config.vocab_size)


def mamba_products(config: NemotronHConfig, sequences: int, length: int) -> Iterator[Product]:
    """in_proj, the scan in chunks of Q tokens, out_proj."""
    tokens, heads, width = sequences * length, config.mamba_num_heads, config.mamba_head_dim
    groups, state, chunk = config.n_groups, config.ssm_state_size, min(config.chunk_size, length)
    inner, chunks = heads * width, sequences * -(-length // chunk)
    yield Product(tokens, config.hidden_size, 2 * inner + 2 * groups * state + heads)
    yield Product(chunk, state, chunk, chunks * groups)  # C B^T
    yield Product(chunk, chunk, width, chunks * heads)  # inside the chunk
    if length > chunk:
        yield Product(state, chunk, inner // groups, chunks * groups)  # the state that a chunk makes
        yield Product(chunk, state, inner // groups, chunks * groups)  # what the state before it gives
    yield Product(tokens, inner, config.hidden_size)


def attention_products(config: NemotronHConfig, sequences: int, length: int) -> Iterator[Product]:
    """q, k and v in one, scores, values, the output projection. Scores are counted whole, not their causal half."""
    heads, width = config.num_attention_heads, config.head_dim
    yield Product(sequences * length, config.hidden_size, (heads + 2 * config.num_key_value_heads) * width)
    yield Product(length, width, length, sequences * heads)
    yield Product(length, length, width, sequences * heads)
    yield Product(sequences * length, heads * width, config.hidden_size)


def expert_products(config: NemotronHConfig, tokens: int) -> Iterator[Product]:
    """The router, each expert on its even share of the tokens, the shared expert."""
    hidden, experts = config.hidden_size, config.n_routed_experts
    yield Product(tokens, hidden, experts)
    share = tokens * config.num_experts_per_tok // experts
    widths = [(share, config.moe_intermediate_size)] * experts
    widths += [(tokens, config.moe_shared_expert_intermediate_size)] * config.n_shared_experts
    for rows, width in widths:
        yield Product(rows, hidden, width)
        yield Product(rows, width, hidden)


def step_products(config: NemotronHConfig, sequences: int, length: int, scored: int) -> Counter[Product]:
    """Forward and backward: product -> how often it is computed."""
    counted: Counter[Product] = Counter()
    for product in forward_products(config, sequences, length, scored):
        counted.update([product, *product.backward()])
    return counted


def total_flops(products: Counter[Product]) -> int:
    """Of the whole list."""
    return sum(product.flops * count for product, count in products.items())


def runner(
    products: Counter[Product], dtype: torch.dtype, device: torch.device, as_ours: bool = False
) -> Callable[[], None]:
    """A function that computes exactly these products, by torch.mm and torch.bmm into memory that is there already.

    `as_ours`: by what our layers call, which on some processors is another library (models/onednn.py).
    """
    generator = torch.Generator().manual_seed(1)
    prepared = []
    for product, count in products.items():
        batch = () if product.batch == 1 else (product.batch,)
        left = torch.randn(*batch, product.rows, product.inner, generator=generator).to(device, dtype)
        right = torch.randn(*batch, product.inner, product.columns, generator=generator).to(device, dtype)
        out = torch.empty(*batch, product.rows, product.columns, dtype=dtype, device=device)
        if as_ours and not batch:
            prepared.append((functools.partial(onednn.multiply, left, right), count))
        else:
            prepared.append((functools.partial(torch.bmm if batch else torch.mm, left, right, out=out), count))

    def run() -> None:
        for multiply, count in prepared:
            for _ in range(count):
                multiply()

    return run
