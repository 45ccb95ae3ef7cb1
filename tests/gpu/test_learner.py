"""The Learner on a card: a GRPO step with the Sampler on the CPU, borrowed teachers, training checkpoints.

python -m pytest tests/gpu/test_learner.py -m gpu
"""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.learner import parallel

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, distillation
from nemo_cascade.config.schema import DistillConfig, HardwareConfig, OptimizerConfig
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.stages.sequences import with_teachers
from nemo_cascade.types import Sequence
from tests.gpu.cpu_side import sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]
STEP = Path(__file__).parents[2] / "examples" / "01_one_grpo_step.py"


@pytest.fixture(autouse=True)
def rank() -> Iterator[None]:
    """One rank on the first card."""
    parallel.start(seed=3)
    yield
    parallel.stop()


def learner(folder: Path | None = None, seed: int = 3, async_save: bool = False) -> MegatronLearner:
    """A nano policy in fp32 on the card."""
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), 8, hardware=HardwareConfig(async_save=async_save))
    return MegatronLearner(NemotronHConfig.preset("nano"), settings, str(folder) if folder else None, seed=seed)


def weights(policy: MegatronLearner) -> dict[str, torch.Tensor]:
    """A copy of everything that is published."""
    return {name: tensor.clone() for name, tensor in policy.weights()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_sampler_on_the_cpu_and_the_learner_on_the_card_agree(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(STEP), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    metrics = {name: float(value) for name, _, value in (line.partition(": ") for line in printed[-6:-1])}
    assert metrics["trained_tokens"] > 100.0 and metrics["grad_norm"] > 0.01
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-3) and metrics["gap_abs"] < 1e-4
    first, second = (line.split()[-1] for line in printed if line.startswith("refit"))
    assert first != second


def test_a_teacher_borrows_the_parameters_and_leaves_no_trace(tmp_path: Path) -> None:
    teacher = learner(seed=4)
    teacher.export(str(tmp_path / "teacher"))
    expected = teacher.logprobs(sequences())
    policy = learner()
    before = weights(policy)
    with policy.using(str(tmp_path / "teacher")):
        found = policy.logprobs(sequences())
    assert same(weights(policy), before)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("kind", ["sampled", "full_vocab", "topk"])
def test_a_student_that_is_its_own_teacher_gets_no_gradient(kind: str, tmp_path: Path) -> None:
    policy, other = learner(), learner(seed=4)
    norms = []
    for name, teacher in (("own", policy), ("other", other)):
        folder = str(tmp_path / name)
        teacher.export(folder)
        objective = distillation(DistillConfig(kind=kind))
        norms.append(policy.update(taught(policy, folder, objective.needs_teacher_vocabulary), objective)["grad_norm"])
    assert norms[0] < 1e-3 * norms[1], norms


def taught(policy: MegatronLearner, folder: str, vocabulary: bool) -> list[Sequence]:
    """The sequences as MOPD hands them over: with a teacher, and sampled by the policy itself."""
    rows = [
        dataclasses.replace(row, sampler_logprobs=tuple(values), teacher=folder)
        for row, values in zip(sequences(), policy.logprobs(sequences()), strict=True)
    ]
    return rows if vocabulary else with_teachers(rows, [folder], policy)


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "beside training"])
def test_a_checkpoint_from_a_card_goes_on_where_it_was_taken(async_save: bool, tmp_path: Path) -> None:
    policy = learner(async_save=async_save)
    for _ in range(2):
        policy.update(sequences(), cross_entropy("token"))
    taken = weights(policy)
    policy.save(str(tmp_path / "step"), 2)
    following = [policy.update(sequences(), cross_entropy("token"))["loss"] for _ in range(3)]
    policy.finish_saving()
    resumed = learner(seed=5)
    assert resumed.load(str(tmp_path / "step")) == 2
    assert same(weights(resumed), taken)
    again = [resumed.update(sequences(), cross_entropy("token"))["loss"] for _ in range(3)]
    assert again == pytest.approx(following, abs=1e-5)
