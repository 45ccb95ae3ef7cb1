"""Gradients depend on neither packing order, micro-batches nor data-parallel ranks, whatever the objective."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.config.schema import OptimizerConfig
from tests import ranks
from tests.numerics import invariance_worker
from tests.numerics.invariance_worker import OBJECTIVES, gradients, share
from tests.numerics.learner_worker import TINY

CLOSE = 1e-5  # of the largest entry of a tensor's gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights to start from and of the teacher, and the gradients that two ranks found."""
    base = tmp_path_factory.mktemp("invariance")
    started = parallel.is_started()
    if not started:
        parallel.start()
    for name, seed in (("start", 3), ("teacher", 4)):
        MegatronLearner(TINY, LearnerSettings(OptimizerConfig(lr=1e-3), 1), seed=seed).export(str(base / name))
    ranks.run(invariance_worker.__file__, str(base))
    yield base
    if not started:
        parallel.stop()


def differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, relative to its largest gradient."""
    assert list(found) == list(expected)
    worst = {}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0.0, name
        worst[name] = float((found[name] - gradient).abs().max() / gradient.abs().max())
    return worst


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_one_row_on_one_rank(folder: Path, name: str):
    """One micro-batch of all sequences against six or so, one per sequence, another order, and two ranks."""
    everything = share(folder, 0, 1)
    one = gradients(folder, OBJECTIVES[name], everything, 4096)
    shuffled = random.Random(0).sample(everything, len(everything))
    others = {
        "micro-batches of 64": gradients(folder, OBJECTIVES[name], everything, 64),
        "a sequence each": gradients(folder, OBJECTIVES[name], everything, 1),
        "another order": gradients(folder, OBJECTIVES[name], shuffled, 64),
        "rank 0 of two": torch.load(folder / "gradients-0.pt")[name],
        "rank 1 of two": torch.load(folder / "gradients-1.pt")[name],
    }
    for case, found in others.items():
        worst = differences(one, found)
        assert max(worst.values()) < CLOSE, (case, max(worst, key=worst.__getitem__))


def test_a_lost_sequence_and_a_swapped_group_would_be_seen(folder: Path):
    """What the bound above is worth: one of 18 sequences missing, or two of another group, moves gradients far."""
    everything = share(folder, 0, 1)
    objective = OBJECTIVES["grpo by group_tokens"]
    one = gradients(folder, objective, everything, 4096)
    regrouped = [*everything[1:], everything[0]]
    regrouped = [replace(row, group=old.group) for row, old in zip(regrouped, everything, strict=True)]
    for wrong in (everything[1:], regrouped):
        assert max(differences(one, gradients(folder, objective, wrong, 4096)).values()) > 100 * CLOSE
