"""The numbers of a comparison, from traces small enough to compute by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nemo_cascade.models.parity import FAR, Difference, LayerDifference, Parity, difference, tensor_differences
from nemo_cascade.models.trace import Trace

POINTS = [("backbone.embeddings", "embedding"), ("backbone.layers.0", "experts"), ("lm_head", "head")]


def trace(layer: list[list[float]], logits: list[list[float]], chosen: list[int]) -> Trace:
    """Two tokens, two channels, two experts."""
    experts = torch.nn.functional.one_hot(torch.tensor(chosen), 2).bool()
    return Trace([torch.ones(2, 2), torch.tensor(layer), torch.tensor(logits)], [experts])


A = trace([[3.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, math.log(3.0)]], [0, 1])


def test_cosine_differences_and_log_probabilities() -> None:
    b = trace([[4.0, 3.0], [1.0, 0.0]], [[5.0, 5.0], [0.0, 0.0]], [1, 1])
    alone = trace([[3.0, 4.5], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [0, 1])
    found = difference(A, b, alone, POINTS)
    embedding, layer, head = found.layers
    assert (embedding.max_difference, embedding.alone, embedding.rerouted) == (0.0, 0.0, None)
    assert embedding.cosine == pytest.approx(1.0)
    assert (layer.name, layer.kind) == ("backbone.layers.0", "experts")
    assert layer.cosine == pytest.approx(24 / 25)
    assert (layer.max_difference, layer.alone) == (1.0, 0.5)
    assert layer.alone_relative == pytest.approx(0.5 / math.sqrt(12.5))
    assert (layer.rerouted, layer.alone_rerouted) == (0.5, 0.0)
    assert head.max_difference == 5.0
    # a constant added to all logits changes no log-probability; [1/4, 3/4] against [1/2, 1/2] differs by log 2
    assert found.positions.tolist() == pytest.approx([0.0, math.log(2.0)])
    assert found.maximum == pytest.approx(math.log(2.0))
    assert found.p99 == pytest.approx(0.99 * math.log(2.0))


def test_nothing_is_hidden_by_zeros_or_by_what_is_no_number() -> None:
    b = trace([[math.nan, 4.0], [0.0, 0.0]], [[math.nan, 0.0], [0.0, math.log(3.0)]], [0, 1])
    found = difference(A, b, b, POINTS)
    layer = found.layers[1]
    assert (layer.cosine, layer.max_difference, layer.alone_relative) == (-1.0, FAR, FAR)
    assert found.maximum == FAR
    assert "Infinity" not in json.dumps(Parity({"packed": found, "unpacked": found}, 1e-4).to_json(), allow_nan=False)
    zero = trace([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [0, 1])
    assert difference(zero, zero, zero, POINTS).layers[1].cosine == 1.0
    assert difference(A, zero, zero, POINTS).layers[1].cosine == 0.0


def layer(name: str, alone: float, rerouted: float | None = None) -> LayerDifference:
    return LayerDifference(name, "experts", 1.0, alone, alone, alone, rerouted, rerouted)


def parity(*layers: LayerDifference, maximum: float) -> Parity:
    mode = Difference(layers, torch.tensor([0.0, maximum]))
    return Parity({"packed": mode, "unpacked": Difference(layers, torch.zeros(2))}, tolerance=1e-4)


def test_the_verdict_names_the_first_layer_or_says_why_there_is_none() -> None:
    assert parity(layer("one", 0.0), maximum=5e-5).verdict() == "A and B agree: 5.0e-05 at most, tolerance 1.0e-04"
    found = parity(layer("one", 1e-6), layer("two", 1e-2), layer("three", 1e-3), maximum=0.5)
    assert found.verdict().endswith("the first layer that differs is two, experts (and 1 more after it)")
    assert found.max_logprob_difference == 0.5 and not found.agrees
    small = parity(layer("one", 1e-6), layer("two", 9e-5), maximum=0.5)
    assert small.verdict().endswith("no layer alone differs by more than that, the largest is two, experts")
    assert small.to_json()["first_bad_layer"] is None


def test_a_few_rerouted_tokens_are_called_near_ties_and_many_are_not() -> None:
    few = parity(layer("one", 1e-2, rerouted=0.002), maximum=0.5)
    assert "as rounding does: read the p99" in few.verdict() and not few.agrees
    for other in (layer("one", 1e-2, rerouted=0.2), layer("one", 1e-2, rerouted=0.0), layer("one", 1e-2)):
        assert "rounding" not in parity(other, maximum=0.5).verdict()
    mixed = parity(layer("one", 1e-2, rerouted=0.002), layer("two", 1e-2, rerouted=0.0), maximum=0.5)
    assert "rounding" not in mixed.verdict()


def test_both_modes_count() -> None:
    one, other = layer("one", 1e-3, rerouted=0.25), layer("one", 2e-3, rerouted=0.5)
    both = Parity({"packed": Difference((one,), torch.zeros(2)), "unpacked": Difference((other,), torch.ones(2))}, 1e-4)
    assert both.layers[0].alone == 2e-3 and both.layers[0].rerouted == 0.5
    assert (both.max_logprob_difference, both.p99) == (1.0, 1.0)


def test_tensors_that_differ_keep_the_order_of_the_checkpoint() -> None:
    a = {"first": ("x", 1.0), "second": ("y", 2.0), "third": ("z", 3.0)}
    found = tensor_differences(a, a | {"third": ("q", 3.0), "first": ("p", 4.0)})
    assert [(one.name, one.norm_a, one.norm_b) for one in found] == [("first", 1.0, 4.0), ("third", 3.0, 3.0)]
