"""One rank of two that share linear layers, against the whole layers in float64.

Run as a script with RANK and WORLD_SIZE set: linear_over_ranks.py FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_cascade.models import parallel

import torch  # isort: skip
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from nemo_cascade.models import onednn
from nemo_cascade.models.linear import LocalColumnLinear, LocalRowLinear
from nemo_cascade.models.parallel import ParallelLayout

TOKENS, NARROW, WIDE = 256, 160, 192  # `WIDE` is cut


def stored(value: torch.Tensor, order: str) -> torch.Tensor:
    """[T, 1, C] by rows, by columns, or as one number that stands for all."""
    if order == "expanded":
        return torch.full((), 0.5).expand(value.shape)
    return value if order == "rows" else value.transpose(0, 2).contiguous().transpose(0, 2)


def close(found: torch.Tensor | None, expected: torch.Tensor, what: str) -> None:
    assert found is not None
    gap = float((found.detach() - expected).abs().max() / expected.abs().max())
    assert gap < 3e-6, f"{what}: {gap}"


Slices = tuple[slice, ...]


def check(
    layer: torch.nn.Module, whole: torch.Tensor, own: Slices, case: tuple[str, str], own_in: Slices, own_out: Slices
) -> None:
    """Output and both gradients on a rank that has the parts `own` of the weight, `own_in` of x and `own_out` of the
    output; `case` says how x and the output's gradient lie in memory.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1, whole.shape[1], generator=generator)
    grad = torch.randn(TOKENS, 1, whole.shape[0], generator=generator)
    x, grad = stored(x, case[0]), stored(grad, case[1])
    with torch.no_grad():
        layer.weight.copy_(whole[own])
    layer.weight.grad = None
    own_x = stored(x[own_in].clone(), case[0]).requires_grad_()
    out = layer(own_x)[0]
    out.backward(stored(grad[own_out].clone(), case[1]))
    wide = [value.double().requires_grad_() for value in (x, whole)]
    expected = torch.nn.functional.linear(*wide)
    expected.backward(grad.double())
    name = f"{type(layer).__name__} {case}"
    close(out, expected[own_out], f"{name}: output")
    close(own_x.grad, wide[0].grad[own_in], f"{name}: gradient of x")
    close(layer.weight.grad, wide[1].grad[own], f"{name}: gradient of the weight")


def both_layers(sequence_parallel: bool) -> None:
    """With whole tokens on each rank, or with half of them."""
    config = TransformerConfig(
        num_layers=1, hidden_size=NARROW, num_attention_heads=2, tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel, use_cpu_initialization=True,
    )  # fmt: skip
    shared = {
        "config": config, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False,
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
    }  # fmt: skip
    column = LocalColumnLinear(NARROW, WIDE, gather_output=False, **shared)
    row = LocalRowLinear(WIDE, NARROW, input_is_parallel=True, **shared)
    rank = torch.distributed.get_rank()
    part = slice(rank * WIDE // 2, (rank + 1) * WIDE // 2)
    tokens = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2) if sequence_parallel else slice(None)
    whole = torch.randn(WIDE, NARROW, generator=torch.Generator().manual_seed(2))
    for case in [(x, grad) for x in ("rows", "columns") for grad in ("rows", "columns", "expanded")]:
        narrow, wide = (tokens,), (slice(None), slice(None), part)
        check(column, whole, (part, slice(None)), case, narrow, wide)
        check(row, whole.t(), (slice(None), part), case, wide, narrow)


def main(folder: Path) -> None:
    parallel.start(ParallelLayout(tensor=2), rendezvous=folder / "rendezvous", threads=1)
    onednn.here = lambda: True
    calls = []
    product = onednn._product
    onednn._product = lambda *factors: calls.append(1) or product(*factors)
    for sequence_parallel in (False, True):
        both_layers(sequence_parallel)
    assert len(calls) >= 72, f"oneDNN was to compute 72 products and more, and computed {len(calls)}"
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
