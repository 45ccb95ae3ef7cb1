"""Both refits leave the sampler with exactly the learner's weights, and notice when they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_cascade.models.hf_folder import content_sha256
from nemo_cascade.refit.checksum import checksum_of
from nemo_cascade.refit.files import FileRefit
from nemo_cascade.refit.memory import MemoryRefit
from nemo_cascade.refit.nowhere import NoRefit
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.types import Request, SamplingParams, UserError
from tests.unit.rollout.standins import random_weights, tiny_config

CONFIG = tiny_config()


class Weights:
    """The part of a Learner that a refit uses."""

    def __init__(self, seed: int) -> None:
        self.named = random_weights(CONFIG, seed, scale=0.15)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.named.items()

    def export(self, folder: str) -> str:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG.to_hf_json()))
        save_file(self.named, Path(folder) / "model.safetensors")
        return content_sha256(folder)


def answers(sampler: LocalSampler) -> list[tuple[int, ...]]:
    found = dict(sampler.sample([Request((5, 6, seed), seed, 8) for seed in range(4)], SamplingParams(8)))
    return [found[index].token_ids for index in range(4)]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_refit_makes_the_sampler_answer_with_the_new_weights(kind: str, tmp_path: Path) -> None:
    refit = MemoryRefit() if kind == "memory" else FileRefit(tmp_path / "refit")
    sampler = LocalSampler(CONFIG)
    for version, seed in ((1, 11), (2, 12), (3, 13), (4, 11)):
        learner = Weights(seed)
        checksum = refit.refit(learner, sampler, version)  # type: ignore[arg-type]
        fresh = LocalSampler(CONFIG)
        fresh.load_weights(learner.weights(), version)
        assert sampler.version == version and sampler.checksum == checksum
        assert answers(sampler) == answers(fresh)
    if kind == "files":
        assert sorted(path.name for path in (tmp_path / "refit").iterdir()) == ["version_000003", "version_000004"]


def test_a_sampler_that_holds_other_weights_is_noticed() -> None:
    class Forgetful(LocalSampler):
        def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
            super().load_weights(((name, tensor + 1e-3) for name, tensor in named), version)

    with pytest.raises(UserError, match="refit of version 2: the sampler holds"):
        MemoryRefit().refit(Weights(1), Forgetful(CONFIG), 2)  # type: ignore[arg-type]


def test_checksum_ignores_order_and_sees_names_types_shapes_and_bits() -> None:
    one, two = torch.arange(6.0), torch.ones(2)
    base = checksum_of([("a", one), ("b", two)])
    assert checksum_of([("b", two), ("a", one)]) == base
    others = [
        [("a", one), ("c", two)],
        [("a", one.double()), ("b", two)],
        [("a", one.view(2, 3)), ("b", two)],
        [("a", torch.nextafter(one, one + 1)), ("b", two)],
        [("a", one)],
    ]
    assert len({base, *(checksum_of(named) for named in others)}) == 6


def test_without_a_sampler_nothing_is_brought_anywhere() -> None:
    learner = Weights(11)
    assert NoRefit().refit(learner, None, 1) == ""  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Sampler that gets no weights would sample from old ones"):
        NoRefit().refit(learner, LocalSampler(CONFIG), 1)  # type: ignore[arg-type]
