"""NemotronH for generation: plain functional PyTorch over Hugging Face named tensors, batched, with caches.

Sampling is most of the wall-clock time of reinforcement learning, and on a CPU a decoding step is many small
operations. So the weights are stacked once at load (experts side by side, q|k|v in one matrix), states are updated in
place, prompts that occur several times (the rollouts of one group) are read once, and token-wise work never touches
padding. `decode_layers.py` holds the layers.

A row's result does not depend on its batch mates (see `decode_layers.py`), so the same request gives the same tokens
alone and in a batch; prompts are read in groups of equal padded length for the same reason.

Padding cannot leak: prompts are right-padded, attention and convolution are causal, and a padded position has time step
0, which leaves the SSM state exactly as it was. Logits equal those of a full recompute to 1e-5 in fp32.

Not here: rotary positions (NemotronH has none), group-limited routing (n_group > 1), dense MLP layers, quantised
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode_layers import (
    AttentionLayer,
    Layer,
    LayerState,
    MambaLayer,
    MoeLayer,
    Noted,
    Rows,
    blocks,
    project,
)
from nemo_cascade.types import UserError

LAYERS: dict[str, type[MambaLayer] | type[AttentionLayer] | type[MoeLayer]] = {
    "M": MambaLayer,
    "*": AttentionLayer,
    "E": MoeLayer,
}


def check_weights(config: NemotronHConfig, named: Mapping[str, torch.Tensor]) -> None:
    """Refuse an incomplete or misshapen set of weights with one line that names the first offender."""
    expected = config.tensor_shapes()
    missing = sorted(expected.keys() - named.keys())
    unknown = sorted(named.keys() - expected.keys())
    if missing or unknown:
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise UserError(f"weights: {first} ({len(missing)} missing, {len(unknown)} unknown of {len(expected)} tensors)")
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            found = tuple(named[name].shape)
            raise UserError(f"weights: {name} has shape {found}, the model's configuration says {shape}")


@dataclass
class Cache:
    """What decoding remembers of a batch of sequences: one state per layer, and how many tokens each sequence has.

    Rows are sequences. `keep` picks or repeats rows, `drop` removes finished ones, `join` puts a freshly read batch
    below: continuous batching is the three together.
    """

    lengths: list[int]
    states: list[LayerState]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may be named more than once."""
        index = torch.tensor(rows, dtype=torch.int64)
        self.lengths = [self.lengths[row] for row in rows]
        self.states = [state.keep(index) for state in self.states]

    @torch.inference_mode()
    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove rows by moving the last ones into the holes; returns for each new row the old one.

        Costs a copy of the moved rows only, which matters because at nearly every step of a large batch some row ends.
        """
        order, holes, movers = compaction(len(self.lengths), rows)
        size = len(order)
        source, target = torch.tensor(movers, dtype=torch.int64), torch.tensor(holes, dtype=torch.int64)
        for state in self.states:
            state.move(source, target, size)
        self.lengths = [self.lengths[row] for row in order]
        return order

    @classmethod
    @torch.inference_mode()
    def join(cls, caches: Sequence[Cache]) -> Cache:
        """The rows of several caches, in order."""
        if len(caches) == 1:
            return caches[0]
        columns = zip(*(cache.states for cache in caches), strict=True)
        lengths = [length for cache in caches for length in cache.lengths]
        return cls(lengths, [column[0].join(column[1:]) for column in columns])


def compaction(count: int, rows: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """How to remove `rows` of `count`, the last ones filling the holes: (old row of each new row, holes, movers)."""
    gone = set(rows)
    size = count - len(gone)
    holes = [row for row in sorted(gone) if row < size]
    movers = [row for row in range(size, count) if row not in gone]
    order = list(range(size))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    return order, holes, movers


PREFILL_POSITIONS = 16384  # padded positions read at once; bounds the memory of a prefill


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped by padded length, each group small enough for one pass."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(blocks(length), []).append(index)
    batches: list[list[int]] = []
    for padded, indices in sorted(groups.items()):
        size = max(1, PREFILL_POSITIONS // max(padded, 1))
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


class DecodeModel:
    """NemotronH weights arranged for decoding. Immutable: new weights make a new DecodeModel."""

    def __init__(self, config: NemotronHConfig, named: Mapping[str, torch.Tensor]) -> None:
        check_weights(config, named)
        weights = {name: tensor.detach().to(torch.float32) for name, tensor in named.items()}
        self.config = config
        self.embeddings = weights["backbone.embeddings.weight"].clone()
        self.norm_f = weights["backbone.norm_f.weight"].clone()
        self.lm_head = weights["lm_head.weight"].t().contiguous()
        self.layers: list[Layer] = []
        for index, kind in enumerate(config.hybrid_override_pattern):
            prefix = f"backbone.layers.{index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            self.layers.append(LAYERS[kind](config, own))

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], room: int = 0, experts: list[bytes] | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Read prompts of any lengths; logits [B, V] after each one's last token, and the cache to decode from.

        `room` is how many more tokens a row may get before its attention cache has to grow. `experts` gets for each
        prompt the experts that its tokens used, uint8 [tokens, MoE layers, top-k].
        """
        found = [b""] * len(prompts)
        last: list[torch.Tensor] = []
        caches: list[Cache] = []
        order: list[int] = []
        for group in batches_by_length([len(prompt) for prompt in prompts]):
            noted: Noted = None if experts is None else []
            hidden_N, rows, cache = self._read([prompts[index] for index in group], room, noted)
            for index, own in zip(group, _by_row(noted, rows.lengths), strict=True):
                found[index] = own
            last.append(hidden_N[torch.tensor(rows.lengths).cumsum(0) - 1])
            caches.append(cache)
            order += group
        cache = Cache.join(caches)
        if experts is not None:
            experts += found
        back = sorted(range(len(order)), key=order.__getitem__)
        if back != list(range(len(order))):
            cache.keep(back)
        return self._logits(torch.cat(last)[back]), cache

    @torch.inference_mode()
    def forward(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits [T, V] at every position of every prompt: the full recompute that decoding is checked against."""
        hidden_N, rows, _ = self._read(prompts, 0, None)
        return list(self._logits(hidden_N).split(rows.lengths))

    @torch.inference_mode()
    def step(self, tokens_B: torch.Tensor, cache: Cache, experts: list[bytes] | None = None) -> torch.Tensor:
        """Feed one token per row; logits [B, V] of the next one. Updates the cache in place.

        `experts` gets for each row those that this token used, uint8 [MoE layers, top-k].
        """
        hidden_BH = F.embedding(tokens_B, self.embeddings)
        noted: Noted = None if experts is None else []
        for layer, state in zip(self.layers, cache.states, strict=True):
            hidden_BH = layer.step(hidden_BH, state, cache.lengths, noted)
        if experts is not None:
            experts += _by_row(noted, [1] * len(cache.lengths))
        cache.lengths = [length + 1 for length in cache.lengths]
        return self._logits(hidden_BH)

    def _read(self, prompts: Sequence[Sequence[int]], room: int, noted: Noted) -> tuple[torch.Tensor, Rows, Cache]:
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("prefill: every prompt needs at least one token")
        rows = Rows.of([len(prompt) for prompt in prompts])
        flat = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        hidden_N = F.embedding(flat, self.embeddings)
        states: list[LayerState] = []
        for layer in self.layers:
            hidden_N, state = layer.prefill(hidden_N, rows, room, noted)
            states.append(state)
        return hidden_N, rows, Cache(list(rows.lengths), states)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden, (self.config.hidden_size,), self.norm_f, self.config.layer_norm_epsilon)
        return project(normed, self.lm_head)


def _by_row(noted: Noted, lengths: Sequence[int]) -> list[bytes]:
    """The choices of all layers [N, top-k], row by row: uint8 [tokens, MoE layers, top-k]; empty when not noted."""
    if not noted:
        return [b""] * len(lengths)
    return [part.numpy().tobytes() for part in torch.stack(noted, 1).split(list(lengths))]


def named_from(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collect a stream of named tensors; a name that comes twice is an error, not a silent overwrite."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in named:
            raise UserError(f"weights: {name} was sent twice")
        named[name] = tensor
    return named
