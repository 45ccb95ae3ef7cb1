"""The Learner's numbers: the same step for every number of ranks and every packing, bit-exact resume and restore."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest

from nemo_cascade.learner import forward
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.algorithms.loss import cross_entropy, policy_gradient
from nemo_cascade.config.schema import HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.learner.output import output_logprobs
from nemo_cascade.types import UserError
from tests import ranks
from tests.numerics import learner_worker
from tests.numerics.learner_worker import TINY
from tests.numerics.tiny_learner import build, flat, sequences

pytestmark = pytest.mark.usefixtures("ranks")
LAYOUTS = ("two:4096:data", "experts:64:expert_parallel", "tensor:4096:tensor_parallel")  # two ranks each


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same five steps from the same weights in several layouts; the two-rank ones in two processes of their own."""
    base = tmp_path_factory.mktemp("ranks")
    build(seed=3).export(str(base / "start"))
    folders = {name: base / name for name in ("one", "micro", "two", "experts", "tensor")}
    for folder in folders.values():
        folder.mkdir()
    with ranks.running(learner_worker.__file__, str(base), *LAYOUTS):
        learner_worker.train(folders["one"], 4096, HardwareConfig())
        learner_worker.train(folders["micro"], 32, HardwareConfig())
    return folders


CASES = [
    (other, algorithm)
    for other in ("micro", "two", "experts", "tensor")
    for algorithm in ("sft", "grpo", "grpo_groups")
]


@pytest.mark.parametrize(("other", "algorithm"), [*CASES, ("micro", "bias"), ("two", "bias")])
def test_ranks_and_micro_batches_change_nothing(runs: dict[str, Path], other: str, algorithm: str):
    one = json.loads((runs["one"] / "results-0.json").read_text())[algorithm]
    else_ = json.loads((runs[other] / "results-0.json").read_text())[algorithm]
    for expected, found in zip(one["steps"], else_["steps"], strict=True):
        for key, value in expected.items():
            if key not in ("tokens_per_second", "micro_batches") and not key.startswith("seconds"):
                assert found[key] == pytest.approx(value, rel=2e-6, abs=1e-6), key
    for expected, found in zip(one["scores"], else_["scores"], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    weights = torch.load(runs["one"] / f"{algorithm}-0.pt")
    close = 1e-6 if other in ("micro", "two") else 5e-6  # cut matrix products round differently
    torch.testing.assert_close(torch.load(runs[other] / f"{algorithm}-0.pt"), weights, rtol=0.0, atol=close)


def test_both_ranks_hold_the_same_weights_and_report_the_same_step(runs: dict[str, Path]):
    first, second = (json.loads((runs["two"] / f"results-{rank}.json").read_text()) for rank in (0, 1))
    for algorithm in ("sft", "grpo", "grpo_groups", "bias"):
        assert torch.equal(torch.load(runs["two"] / f"{algorithm}-0.pt"), torch.load(runs["two"] / f"{algorithm}-1.pt"))
        for mine, other in zip(first[algorithm]["steps"], second[algorithm]["steps"], strict=True):
            assert [mine[key] for key in ("loss", "grad_norm", "tokens")] == [
                other[key] for key in ("loss", "grad_norm", "tokens")
            ]


@pytest.mark.parametrize("other", ["two", "experts", "tensor"])
def test_every_rank_skips_the_step_that_is_no_number_on_one_of_them(runs: dict[str, Path], other: str):
    expected = json.loads((runs["one"] / "results-0.json").read_text())["broken"]
    assert (expected["skipped"], expected["non_finite"]) == (1.0, 1.0)
    for rank in (0, 1):
        assert json.loads((runs[other] / f"results-{rank}.json").read_text())["broken"] == expected


@pytest.mark.parametrize("other", ["one", "two", "experts", "tensor"])
def test_a_checkpoint_of_any_layout_is_loaded_by_one_rank(runs: dict[str, Path], other: str):
    """test_checkpoint_layouts.py has the moments, more layouts and the other directions."""
    learner = build(seed=99)
    for algorithm in ("sft", "bias"):
        assert learner.load(str(runs[other] / algorithm)) == 5
        assert torch.equal(flat(learner), torch.load(runs[other] / f"{algorithm}-0.pt"))


def test_resume_is_bit_exact(tmp_path: Path):
    objective = policy_gradient(LossConfig())
    through = build()
    for step in range(2):
        through.update(sequences(seed=step), objective)
    through.save(str(tmp_path / "step_2"), 2)
    resumed = build(seed=99)
    assert resumed.load(str(tmp_path / "step_2")) == 2
    assert torch.equal(flat(resumed), flat(through))
    for step in range(2, 5):
        first, second = (learner.update(sequences(seed=step), objective) for learner in (through, resumed))
        assert [first[key] for key in ("loss", "grad_norm", "lr")] == [
            second[key] for key in ("loss", "grad_norm", "lr")
        ]
    assert torch.equal(flat(resumed), flat(through))
    assert resumed.updates == 5


def test_using_another_folder_gives_its_numbers_and_restores_every_bit(tmp_path: Path):
    teacher, student = build(seed=5), build(seed=6)
    teacher.update(sequences(), cross_entropy("token"))
    sha256 = teacher.export(str(tmp_path / "teacher"))
    assert len(sha256) == 64
    before, own = flat(student), student.logprobs(sequences())
    for _ in range(2):  # from the folder, then from host memory
        with student.using(str(tmp_path / "teacher")):
            assert torch.equal(flat(student), flat(teacher))
            assert student.logprobs(sequences()) == teacher.logprobs(sequences())
    assert torch.equal(flat(student), before)
    assert student.logprobs(sequences()) == own
    with pytest.raises(UserError, match="absent"), student.using(str(tmp_path / "absent")):
        pass
    assert torch.equal(flat(student), before)


def test_borrowed_weights_are_neither_trained_nor_stored(tmp_path: Path):
    learner = build()
    learner.export(str(tmp_path / "own"))
    with learner.using(str(tmp_path / "own")):
        with pytest.raises(ValueError, match="update inside using"):
            learner.update(sequences(), cross_entropy("token"))
        with pytest.raises(ValueError, match="save inside using"):
            learner.save(str(tmp_path / "x"), 1)


def test_overfitting_two_sequences_reaches_a_known_loss():
    learner = build(optimizer=OptimizerConfig(lr=1e-2))
    losses = [learner.update(sequences(2), cross_entropy("token"))["loss"] for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert losses[-1] < 0.3


def test_logprobs_are_those_of_the_configured_distribution():
    raw, cut = build(), build(distribution=Distribution(temperature=0.7, top_p=0.9))
    scores, cut_scores = raw.logprobs(sequences(2)), cut.logprobs(sequences(2))
    assert [len(row) for row in scores] == [len(s.token_ids) for s in sequences(2)]
    assert all(row[0] == 0.0 for row in scores)
    assert sum(map(sum, cut_scores)) != pytest.approx(sum(map(sum, scores)), rel=1e-3)
    tokens = torch.tensor(sequences(2)[0].token_ids)
    logits = raw.model.packed_logits(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)).detach()
    expected = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0].tolist()
    assert scores[0][1:] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("distribution", [RAW, Distribution(temperature=0.7, top_p=0.9)])
def test_long_rows_pass_the_output_layer_in_chunks(monkeypatch: pytest.MonkeyPatch, distribution: Distribution):
    """7 tokens at a time, through the policy and Megatron's gradient buffers over several micro-batches."""
    whole, chunked = (build(distribution=distribution, micro_batch_tokens=64) for _ in range(2))
    expected = whole.logprobs(sequences()), whole.update(sequences(), cross_entropy("token"))
    monkeypatch.setattr(forward, "output_logprobs", functools.partial(output_logprobs, chunk_logits=7 * 64))
    found = chunked.logprobs(sequences()), chunked.update(sequences(), cross_entropy("token"))
    for one, other in zip(expected[0], found[0], strict=True):
        assert other == pytest.approx(one, abs=1e-6)
    for key in ("loss", "grad_norm", "entropy"):
        assert found[1][key] == pytest.approx(expected[1][key], rel=1e-6)
    for one, other in zip(whole.model.parameters(), chunked.model.parameters(), strict=True):
        torch.testing.assert_close(other.main_grad, one.main_grad, rtol=0.0, atol=1e-6)
    assert chunked.model.output_layer.weight.main_grad.abs().max() > 1e-3


def test_update_and_logprobs_agree_on_the_policy():
    learner = build(optimizer=OptimizerConfig(lr=1e-3))
    scored = [dataclasses.replace(s, sampler_logprobs=tuple(row))
              for s, row in zip(sequences(), learner.logprobs(sequences()), strict=True)]  # fmt: skip
    metrics = learner.update(scored, policy_gradient(LossConfig()))
    assert metrics["gap_abs_max"] < 1e-5
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert 0.0 < metrics["entropy"] < math.log(64) + 1e-3


def test_frozen_router_and_expert_bias():
    learner = build(optimizer=OptimizerConfig(lr=1e-2, router_frozen=True, expert_bias_rate=0.125))
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    learner.update(sequences(), cross_entropy("token"))
    after = dict(learner.weights())
    gate = next(name for name in after if name.endswith("gate.weight"))
    bias = next(name for name in after if name.endswith("e_score_correction_bias"))
    assert torch.equal(after[gate], before[gate])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert set((after[bias] - before[bias]).abs().tolist()) <= {0.0, 0.125}
    assert (after[bias] - before[bias]).abs().max() == 0.125
    still = build(optimizer=OptimizerConfig(lr=1e-2))
    still.update(sequences(), cross_entropy("token"))
    assert torch.equal(dict(still.weights())[bias], before[bias])


def test_clipping_bounds_the_step():
    free, clipped = (
        build(optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0)),
        build(optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.01)),
    )
    norms = [learner.update(sequences(), cross_entropy("token"))["grad_norm"] for learner in (free, clipped)]
    assert norms[0] == norms[1] > 0.1
    grads = [parameter.main_grad.norm() ** 2 for parameter in clipped.model.parameters()]
    assert math.sqrt(sum(grads)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("hardware", "key"),
    [
        ({"precision": "hopper_fp8"}, "hardware.precision: hopper_fp8 needs a GPU .* hopper_fp8_emulated"),
        ({"precision": "blackwell_mxfp8", "layer_spec": "te"}, "hardware.precision: blackwell_mxfp8"),
        ({"precision": "hopper_fp8_emulated", "layer_spec": "te"}, "hardware.layer_spec: te"),
        ({"layer_spec": "te"}, "hardware.layer_spec: te"),
        ({"pipeline_parallel": 2}, "hardware.pipeline_parallel: 2 does not divide the 3 layers"),
        ({"context_parallel": 2}, "the model is built for"),
    ],
)
def test_what_cannot_be_honoured_is_refused(hardware: dict[str, object], key: str):
    if torch.cuda.is_available() and "parallel" not in key:
        pytest.skip("this machine has a GPU, which can honour it")
    with pytest.raises(UserError, match=key):
        build(hardware=HardwareConfig(**hardware))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    build().save(str(tmp_path / "step_1"), 1)
    other = MegatronLearner(dataclasses.replace(TINY, vocab_size=128), LearnerSettings(OptimizerConfig(lr=1e-3), 1))
    with pytest.raises(UserError, match="another model"):
        other.load(str(tmp_path / "step_1"))


def test_bf16_follows_fp32_and_resumes_bit_for_bit(tmp_path: Path):
    half = HardwareConfig(precision="bf16")
    cfg = OptimizerConfig(lr=1e-2, clip_grad=0.5, expert_bias_rate=1e-2)
    single, mixed, resumed = (
        build(optimizer=cfg),
        build(optimizer=cfg, hardware=half),
        build(9, optimizer=cfg, hardware=half),
    )
    objective = cross_entropy("token")
    for step in range(4):
        losses = [learner.update(sequences(seed=step % 2), objective)["loss"] for learner in (single, mixed)]
        assert losses[1] == pytest.approx(losses[0], abs=0.02)
    mixed.save(str(tmp_path / "step_4"), 4)
    resumed.load(str(tmp_path / "step_4"))
    for step in range(2):
        first, second = (learner.update(sequences(seed=step), objective) for learner in (mixed, resumed))
        assert (first["loss"], first["grad_norm"]) == (second["loss"], second["grad_norm"])
    assert next(mixed.model.parameters()).dtype == torch.bfloat16
