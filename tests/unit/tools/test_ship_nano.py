"""The shipped weights are those of the recipe beside them, and the recipe is the one in conf/ on today's generators."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.paths import NANO_TOKENIZER, PACKAGED
from nemo_cascade.config.schema import SftConfig, StageRun
from nemo_cascade.config.strict import build
from nemo_cascade.models.hf_folder import content_sha256
from tools.ship_nano import data_fingerprint

SHIPPED = [("nano", "nano_base"), ("nano_judge", "nano_judge")]
pytestmark = pytest.mark.parametrize(("weights", "cascade"), SHIPPED)


def shipped(weights: str) -> dict[str, Any]:
    path = PACKAGED[weights] / "training.json"
    if not path.is_file():
        pytest.skip(f"{path.parent} is not trained yet: make nano-base nano-judge")
    return json.loads(path.read_text())


def test_the_recipe_is_the_stage_file_of_today(weights: str, cascade: str) -> None:
    """Read through today's schema: a key that is newer than the weights counts with its default."""
    told, loaded = shipped(weights), load_cascade(cascade)
    assert told["seed"] == loaded.cascade.seed
    assert told["ranks"] == loaded.hardware.world_size
    assert build(SftConfig, told["recipe"], "training.json") == loaded.stages[cascade]


def test_the_generators_give_the_data_that_trained_it(weights: str, cascade: str) -> None:
    loaded = load_cascade(cascade)
    run = StageRun(config=loaded.stages[cascade], seed=loaded.cascade.seed, tokenizer=str(NANO_TOKENIZER))
    assert data_fingerprint(run) == shipped(weights)["data_fingerprint"]
    run.seed += 1  # no other draw gives this fingerprint
    assert data_fingerprint(run) != shipped(weights)["data_fingerprint"]


def test_the_weights_are_those_that_were_trained(weights: str, cascade: str) -> None:
    told = shipped(weights)
    assert content_sha256(PACKAGED[weights]) == told["sha256"]
    steps, losses = zip(*told["loss_curve"], strict=True)
    assert losses[-1] < losses[0] / 5
    assert steps[-1] > 0.98 * told["recipe"]["num_steps"] - 1
