"""How far apart two traces of one architecture are: layer by layer, and in log-probabilities."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_cascade.models.convert import export_weights
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.trace import Trace

ROWS = 128  # positions compared at a time: bounds the memory of [rows, vocabulary] in float64
PERCENTILE = 0.99
NEAR_TIES = 0.01  # of the tokens: more of them is no accident of rounding
FAR = torch.finfo(torch.float64).max  # instead of infinity, which JSON lacks
SHOWN = 12  # tensors named on the terminal; --json has all


@dataclass(frozen=True)
class LayerDifference:
    """One point of the two models, over all positions of both ways of batching; the worst position counts.

    `cosine` is the smallest between the two outputs, `max_difference` the largest of any channel. `alone` and
    `alone_relative` (divided by the root mean square of the position's output) are those of the layer itself: B's layer
    reads what A's layer read. `rerouted` is the share of tokens that went to other experts, `alone_rerouted` the same
    from the same input; None where there are no experts.
    """

    name: str
    kind: str
    cosine: float
    max_difference: float
    alone: float
    alone_relative: float
    rerouted: float | None = None
    alone_rerouted: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether a few tokens went to other experts from the same input, as rounding decides between equal scores."""
        return self.alone_rerouted is not None and 0.0 < self.alone_rerouted < NEAR_TIES

    def worse(self, other: LayerDifference) -> LayerDifference:
        """The worst of both."""
        return LayerDifference(
            self.name,
            self.kind,
            min(self.cosine, other.cosine),
            max(self.max_difference, other.max_difference),
            max(self.alone, other.alone),
            max(self.alone_relative, other.alone_relative),
            _larger(self.rerouted, other.rerouted),
            _larger(self.alone_rerouted, other.alone_rerouted),
        )


def _larger(one: float | None, other: float | None) -> float | None:
    """The larger share, where there are experts."""
    return None if one is None or other is None else max(one, other)


@dataclass(frozen=True)
class Difference:
    """Two models over one way of batching. `positions`: per position the largest difference of a log-probability (nat)
    over the vocabulary.
    """

    layers: tuple[LayerDifference, ...]
    positions: torch.Tensor

    @property
    def maximum(self) -> float:
        """The largest difference of a log-probability."""
        return float(self.positions.max())

    @property
    def p99(self) -> float:
        """99 of 100 positions differ by at most this."""
        return float(torch.quantile(self.positions, PERCENTILE))


@torch.no_grad()
def difference(a: Trace, b: Trace, alone: Trace, points: Sequence[tuple[str, str]]) -> Difference:
    """Compare B with A; `alone` is B's trace fed with A's hidden states."""
    layers, experts = [], 0
    for index, (name, kind) in enumerate(points):
        rerouted = None
        if kind == "experts":
            rerouted = tuple(
                float((a.chosen[experts] != other.chosen[experts]).any(-1).double().mean()) for other in (b, alone)
            )
            experts += 1
        ours, theirs, lone = a.outputs[index].double(), b.outputs[index].double(), alone.outputs[index].double()
        layers.append(_compared(name, kind, ours, theirs, lone, rerouted or (None, None)))
    positions = torch.cat([
        (ours.double().log_softmax(-1) - theirs.double().log_softmax(-1)).abs().amax(-1)
        for ours, theirs in zip(a.outputs[-1].split(ROWS), b.outputs[-1].split(ROWS), strict=True)
    ])  # fmt: skip
    return Difference(tuple(layers), positions.nan_to_num(nan=FAR))


def _compared(
    name: str,
    kind: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    lone: torch.Tensor,
    rerouted: tuple[float | None, ...],
) -> LayerDifference:
    """One point; a value that is no number is the largest difference there is, never a silent agreement."""
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    both_zero = (ours.abs().amax(-1) == 0) & (theirs.abs().amax(-1) == 0)
    own = (ours - lone).abs().amax(-1)
    scale = ours.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)

    def worst(values: torch.Tensor) -> float:
        return float(values.nan_to_num(nan=FAR).max())

    return LayerDifference(
        name,
        kind,
        float(cosine.masked_fill(both_zero, 1.0).nan_to_num(nan=-1.0).min()),
        worst((ours - theirs).abs()),
        worst(own),
        worst(own / scale),
        *rerouted,
    )


@dataclass(frozen=True)
class TensorDifference:
    """One published tensor that is not the same in A and B. Equal norms: the same values in another order, or signs."""

    name: str
    norm_a: float
    norm_b: float


Prints = Mapping[str, tuple[str, float]]


def tensor_prints(model: NemotronH) -> Prints:
    """Published name -> (sha256 of the values in fp32, norm): what is left of a model that had to make room."""
    prints = {}
    for name, tensor in export_weights(model, model.hf_config):
        values = tensor.float().cpu().contiguous()
        digest = hashlib.sha256(values.numpy()).hexdigest()
        prints[name] = (digest, float(values.double().norm()))
    return prints


def tensor_differences(a: Prints, b: Prints) -> list[TensorDifference]:
    """The tensors that are not bit-equal, in the order of the checkpoint."""
    return [TensorDifference(name, a[name][1], b[name][1]) for name in a if a[name][0] != b[name][0]]


@dataclass(frozen=True)
class Parity:
    """The whole comparison. `modes`: `packed` (sequences together) and `unpacked` (one by one).

    `tensors`: those that differ; None where a side was not read by Megatron and its tensors are not known.
    """

    modes: Mapping[str, Difference]
    tolerance: float
    tensors: tuple[TensorDifference, ...] | None = None

    @property
    def layers(self) -> list[LayerDifference]:
        """Per layer the worst of both modes."""
        packed, unpacked = (mode.layers for mode in self.modes.values())
        return [one.worse(other) for one, other in zip(packed, unpacked, strict=True)]

    @property
    def max_logprob_difference(self) -> float:
        """The largest difference of a log-probability of any token at any position (nat)."""
        return max(mode.maximum for mode in self.modes.values())

    @property
    def p99(self) -> float:
        """Over positions, of the largest difference at each."""
        return max(mode.p99 for mode in self.modes.values())

    @property
    def agrees(self) -> bool:
        """Whether every log-probability agrees within the tolerance."""
        return self.max_logprob_difference <= self.tolerance

    @property
    def bad(self) -> list[LayerDifference]:
        """The layers that compute something else from the same input, relative to the size of their output."""
        return [layer for layer in self.layers if layer.alone_relative > self.tolerance]

    def to_json(self) -> dict[str, object]:
        """Everything, for programs."""
        bad = self.bad
        return {
            "max_logprob_difference": self.max_logprob_difference,
            "p99": self.p99,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
            "first_bad_layer": bad[0].name if bad else None,
            "bad_layers": [layer.name for layer in bad],
            "positions": len(next(iter(self.modes.values())).positions),
            "modes": {
                name: {"max_logprob_difference": mode.maximum, "p99": mode.p99} for name, mode in self.modes.items()
            },
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "tensors": None if self.tensors is None else [dataclasses.asdict(tensor) for tensor in self.tensors],
        }

    def table(self) -> str:
        """The comparison as lines for a terminal."""
        bad = {layer.name for layer in self.bad}
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  kind       1 - cosine  max difference   same input  other experts"]
        for layer in self.layers:
            rerouted = "" if layer.rerouted is None else f"{layer.rerouted:.2%}"
            line = (
                f"{layer.name:{width}}  {layer.kind:9}  {1.0 - layer.cosine:10.1e}  {layer.max_difference:14.1e}  "
                f"{layer.alone:11.1e}  {rerouted:>13}{'  differs' if layer.name in bad else ''}"
            )
            lines.append(line.rstrip())
        lines.append("")
        lines.append("log-probabilities   maximum       p99")
        lines += [f"{name:17}  {mode.maximum:8.1e}  {mode.p99:8.1e}" for name, mode in self.modes.items()]
        return "\n".join([*lines, *self._tensor_lines(), "", self.verdict()])

    def _tensor_lines(self) -> list[str]:
        """The first tensors that differ."""
        if self.tensors is None:
            return []
        if not self.tensors:
            return ["", "every tensor is bit-equal"]
        width = max(len(tensor.name) for tensor in self.tensors[:SHOWN])
        lines = ["", f"{f'{len(self.tensors)} tensors differ':{width}}      norm in A      norm in B"]
        lines += [f"{one.name:{width}}  {one.norm_a:13.6g}  {one.norm_b:13.6g}" for one in self.tensors[:SHOWN]]
        return lines

    def verdict(self) -> str:
        """What follows, in one line."""
        if self.agrees:
            return f"A and B agree: {self.max_logprob_difference:.1e} at most, tolerance {self.tolerance:.1e}"
        bad = self.bad
        start = f"A and B differ by {self.max_logprob_difference:.1e}, tolerance {self.tolerance:.1e}"
        if bad:
            more = f" (and {len(bad) - 1} more after it)" if len(bad) > 1 else ""
            verdict = f"{start}; the first layer that differs is {bad[0].name}, {bad[0].kind}{more}"
            if all(layer.is_near_tie for layer in bad):
                verdict += "; a few tokens chose other experts from the same input, as rounding does: read the p99"
            return verdict
        largest = max(self.layers, key=lambda layer: layer.alone_relative)
        return f"{start}; no layer alone differs by more than that, the largest is {largest.name}, {largest.kind}"
