"""What a model computes layer by layer, in the same terms for Megatron-core and for transformers.

`nemo-cascade parity` compares two such traces. A trace can be fed with the hidden states of another one: then each
layer reads what the other model's layer read, and its difference is its own, not inherited from the layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import read_header
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import UserError

KINDS = {"M": "mamba", "*": "attention", "E": "experts"}


def points(config: NemotronHConfig) -> list[tuple[str, str]]:
    """(published name, kind) of every place where a trace looks, in the order of the computation."""
    letters = enumerate(config.hybrid_override_pattern)
    layers = [(f"backbone.layers.{index}", KINDS[letter]) for index, letter in letters]
    return [("backbone.embeddings", "embedding"), *layers, ("backbone.norm_f", "norm"), ("lm_head", "head")]


@dataclass
class Trace:
    """The output of every point for the tokens of all sequences, end to end, in fp32 on the CPU.

    `outputs`: per point [T, width], the residual stream after a layer and the logits [T, V] at the last one. `chosen`:
    per experts layer [T, experts], whether the token was sent there.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Trace]) -> Trace:
        """The traces of several forward passes as one, tokens in order."""
        outputs = [torch.cat(columns) for columns in zip(*(part.outputs for part in parts), strict=True)]
        return cls(outputs, [torch.cat(columns) for columns in zip(*(part.chosen for part in parts), strict=True)])

    def rows(self, begin: int, end: int) -> list[torch.Tensor]:
        """The outputs of some tokens."""
        return [output[begin:end] for output in self.outputs]


class Engine(Protocol):
    """A model that can be traced."""

    def trace(self, sequences: Sequence[torch.Tensor], packed: bool, feed: Trace | None = None) -> Trace:
        """Run token sequences together (`packed`) or one by one; with `feed` every layer reads what it did there."""


@dataclass(frozen=True)
class _Shape:
    """How a framework lays tokens out: its tensors to rows [T, width] and back."""

    to_row: Callable[[torch.Tensor], torch.Tensor]
    from_row: Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def _watched(
    modules: Sequence[torch.nn.Module],
    routers: Sequence[torch.nn.Module],
    shape: _Shape,
    chosen: Callable[[Any], torch.Tensor],
    feed: Sequence[torch.Tensor] | None,
) -> Iterator[Trace]:
    """Record the output of each module while the block runs; `feed` replaces the input of all but the first."""
    trace = Trace()

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        trace.outputs.append(shape.to_row(tensor.detach()).float().cpu())

    def route(module: torch.nn.Module, args: Any, output: Any) -> None:
        trace.chosen.append(chosen(output).cpu())

    def fed(row: torch.Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def replace(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (shape.from_row(row).to(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": shape.from_row(row).to(kwargs["hidden_states"])}

        return replace

    handles = [module.register_forward_hook(record) for module in modules]
    handles += [router.register_forward_hook(route) for router in routers]
    if feed is not None:
        handles += [
            module.register_forward_pre_hook(fed(row), with_kwargs=True)
            for module, row in zip(modules[1:], feed[:-1], strict=True)
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _each(
    run: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor] | None], Trace],
    sequences: Sequence[torch.Tensor],
    packed: bool,
    feed: Trace | None,
) -> Trace:
    """One forward pass over all sequences, or one for each."""
    if packed:
        return run(sequences, feed.outputs if feed else None)
    traces, begin = [], 0
    for sequence in sequences:
        end = begin + len(sequence)
        traces.append(run([sequence], feed.rows(begin, end) if feed else None))
        begin = end
    return Trace.joined(traces)


class MegatronEngine:
    """The policy as it is trained. Packed: one row with state reset at the boundaries. One rank only."""

    def __init__(self, model: NemotronH) -> None:
        self.model = model.eval()

    def trace(self, sequences: Sequence[torch.Tensor], packed: bool, feed: Trace | None = None) -> Trace:
        """As Engine."""
        return _each(self._run, sequences, packed, feed)

    @torch.no_grad()
    def _run(self, sequences: Sequence[torch.Tensor], feed: Sequence[torch.Tensor] | None) -> Trace:
        model = self.model
        device = next(model.parameters()).device
        layers = list(model.decoder.layers)
        modules = [model.embedding, *layers, model.decoder.final_norm, model.output_layer]
        routers = [layer.mlp.router for layer in layers if hasattr(layer, "mlp") and hasattr(layer.mlp, "router")]
        bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).int().to(device)
        shape = _Shape(lambda tensor: tensor.reshape(int(bounds[-1]), -1), lambda row: row.unsqueeze(1))
        with _watched(modules, routers, shape, lambda output: output[1], feed) as trace:
            model.packed_logits(torch.cat(list(sequences)).to(device), bounds)
        return trace


class TransformersEngine:
    """transformers' NemotronHForCausalLM, which shares no code with ours. Packed: one right-padded batch with its mask.

    fp32, read from a Hugging Face folder with the folder's own config.json.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from transformers import NemotronHForCausalLM
        except ImportError as error:
            raise UserError(f"transformers has no NemotronHForCausalLM here ({error}); compare in megatron") from error
        read_header(folder)  # a missing or truncated file is said in our words
        try:
            model, report = NemotronHForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: transformers cannot read it: {str(error).splitlines()[0]}") from error
        wrong = {what: sorted(names)[0] for what, names in report.items() if names and what.endswith("_keys")}
        if wrong:
            raise UserError(f"{folder}: transformers reads it only in part: {wrong}; export the checkpoint again")
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def trace(self, sequences: Sequence[torch.Tensor], packed: bool, feed: Trace | None = None) -> Trace:
        """As Engine."""
        return _each(self._run, sequences, packed, feed)

    @torch.no_grad()
    def _run(self, sequences: Sequence[torch.Tensor], feed: Sequence[torch.Tensor] | None) -> Trace:
        model = self.model
        blocks = list(model.model.layers)
        modules = [model.model.embeddings, *blocks, model.model.norm_f, model.lm_head]
        routers = [block.mixer.gate for block in blocks if hasattr(block.mixer, "gate")]
        grid = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(model.device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=model.device)
        real = torch.arange(grid.shape[1], device=model.device) < lengths[:, None]

        def from_row(row: torch.Tensor) -> torch.Tensor:
            whole = row.new_zeros(*real.shape, row.shape[-1])
            whole[real.to(row.device)] = row
            return whole

        def chosen(output: Any) -> torch.Tensor:
            logits, _, experts = output
            return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, experts, True)[real.flatten()]

        with _watched(modules, routers, _Shape(lambda tensor: tensor[real], from_row), chosen, feed) as trace:
            model(grid, attention_mask=real.long() if len(sequences) > 1 else None, use_cache=False)
        return trace
