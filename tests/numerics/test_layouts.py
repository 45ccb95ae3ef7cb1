"""The same checkpoint on one rank and cut over several: same logits, same export, same training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_cascade.config.schema import OptimizerConfig
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.parallel import ParallelLayout
from tests import ranks
from tests.numerics import cut_learner, cut_over_ranks
from tools.bench import layouts

FAST = ("dp2_distributed_optimizer", "pp2", "cp2_packed")


def test_tensor_and_expert_parallel_ranks_compute_what_one_rank_does(
    model: NemotronH, config: NemotronHConfig, tmp_path: Path
) -> None:
    convert.save_folder(model, config, tmp_path / "hf")
    expected = []
    for lengths in ([40, 13, 24], [31]):
        tokens = torch.randint(0, config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(2))
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        with torch.no_grad():
            expected.append((tokens, bounds, model.packed_logits(tokens, bounds)))
    torch.save(expected, tmp_path / "expected.pt")
    ranks.run(cut_over_ranks.__file__, str(tmp_path))


def test_borrowed_weights_distillation_checkpoint_and_export_in_every_cut(
    layout: ParallelLayout, tmp_path: Path
) -> None:
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), 1)
    for name, seed in (("start", 3), ("teacher", 4)):
        MegatronLearner(layouts.MODEL, settings, seed=seed).export(str(tmp_path / name))
    expected = cut_learner.exercise(tmp_path, layouts.ONE)
    ranks.run(cut_learner.__file__, str(tmp_path), *FAST)
    for name in FAST:
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            for key in ("taught", "pieces"):
                for one, other in zip(expected[key], found[key], strict=True):
                    assert other == pytest.approx(one, abs=1e-5)
            assert found["experts"] == (expected["experts"] if name.startswith("dp") else None)
            assert found["half"] == pytest.approx(expected["half"], abs=2e-2)
            assert found["distilled"] == pytest.approx(expected["distilled"], rel=1e-5, abs=1e-6)
            assert found["chosen"] == pytest.approx(expected["chosen"], rel=1e-5, abs=1e-6)


def check(table: dict[str, dict[str, float]], names: tuple[str, ...]) -> None:
    assert tuple(table) == names
    assert {name: row for name, row in table.items() if not layouts.within(row)} == {}
    for row in table.values():
        assert max(row.values()) > 0.0  # sums over ranks round otherwise: it really ran


def test_the_row_of_a_layout_that_is_wrong_is_out_of_tolerance(tmp_path: Path) -> None:
    step = {"loss": 4.0, "grad_norm": 1.0}
    kept = {"steps": {"sft": [step]}, "gradients": {"sft w": torch.ones(2)}, "weights": {"sft w": torch.ones(2)},
            "scores": {"sft": [[0.0, -1.0]]}}  # fmt: skip
    torch.save(kept, tmp_path / "one-0.pt")
    wrong = {"steps": {"sft": [step | {"grad_norm": 1.001}]}, "gradients": {"sft w": torch.tensor([1.0, 0.5])},
             "weights": {"sft w": torch.tensor([1.0, 1.25])}, "scores": {"sft": [[0.0, -1.5]]}}  # fmt: skip
    torch.save(kept, tmp_path / "dp2-0.pt")
    torch.save(wrong, tmp_path / "dp2-1.pt")
    row = layouts.compare(tmp_path, layouts.LAYOUTS[0])
    assert row == pytest.approx(
        {"loss_difference": 0.0, "grad_norm_difference": 1 - 1 / 1.001, "weight_difference": 0.25,
         "gradient_difference": 0.5, "logprob_difference": 0.5}
    )  # fmt: skip
    assert not layouts.within(row)
    assert not layouts.within(dict.fromkeys(row, float("nan")))


def test_training_over_stages_and_context_is_training_on_one_process() -> None:
    check(layouts.measure(["pp2", "cp2_packed"]), ("pp2", "cp2_packed"))


@pytest.mark.slow
def test_every_layout_trains_like_one_process() -> None:
    check(layouts.measure([]), tuple(layout.name for layout in layouts.LAYOUTS))
