"""What every Learner promises, whatever stands behind the protocol."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, policy_gradient
from nemo_cascade.config.schema import LossConfig, OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import content_sha256
from nemo_cascade.protocols import Learner
from nemo_cascade.types import Sequence, UserError

pytestmark = pytest.mark.usefixtures("ranks")
TINY = NemotronHConfig(
    vocab_size=32, hidden_size=16, hybrid_override_pattern="ME", num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8, n_groups=1, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, chunk_size=8,
)  # fmt: skip
SEQUENCES = [
    Sequence((3, 9, 4, 11, 2), (0, 0, 1, 1, 1), (0.0, 0.0, 1.0, 1.0, 1.0)),
    Sequence((3, 7, 30), (0, 1, 1), (0.0, -0.5, -0.5), group=1),
    Sequence((5,), (0,), (0.0,), group=1),
]


def megatron(init_folder: str | None = None) -> MegatronLearner:
    settings = LearnerSettings(OptimizerConfig(lr=1e-2), num_steps=10, micro_batch_tokens=6)
    return MegatronLearner(TINY, settings, init_folder, seed=2)


@pytest.fixture(params=[megatron])
def make(request: pytest.FixtureRequest) -> Callable[..., Learner]:
    return request.param


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_weights_carry_every_published_name_and_shape(make: Callable[..., Learner]):
    assert {name: tuple(tensor.shape) for name, tensor in make().weights()} == TINY.tensor_shapes()


def test_logprobs_cover_every_token_in_input_order(make: Callable[..., Learner]):
    learner = make()
    rows = learner.logprobs(SEQUENCES)
    assert [len(row) for row in rows] == [5, 3, 1]
    assert [row[0] for row in rows] == [0.0, 0.0, 0.0]
    assert all(-2 * math.log(32) < value < 0.0 for row in rows for value in row[1:])
    alone = learner.logprobs(SEQUENCES[1:2])
    assert rows[1] == pytest.approx(alone[0], abs=1e-5)
    assert learner.logprobs([]) == []


def test_routing_names_the_experts_of_every_token_in_input_order(make: Callable[..., Learner]):
    learner = make()
    experts = learner.routing(SEQUENCES)
    assert [len(row) for row in experts] == [5, 3, 1]  # one MoE layer of top-1
    assert set(b"".join(experts)) <= {0, 1}
    assert learner.routing(SEQUENCES[1:2]) == [experts[1]]
    metrics = learner.update(
        [dataclasses.replace(row, routed_experts=own) for row, own in zip(SEQUENCES, experts, strict=True)],
        policy_gradient(LossConfig()),
    )
    assert metrics["routing_flips"] == 0.0


def test_update_raises_what_has_a_positive_advantage_and_lowers_the_rest(make: Callable[..., Learner]):
    learner = make()
    before = learner.logprobs(SEQUENCES)
    metrics = learner.update(SEQUENCES, policy_gradient(LossConfig()))
    after = learner.logprobs(SEQUENCES)
    assert sum(after[0][2:]) > sum(before[0][2:])
    assert sum(after[1][1:]) < sum(before[1][1:])
    assert metrics["trained_tokens"] == 5.0
    assert metrics["tokens"] == 9.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_update_without_sequences_takes_part_and_moves_nothing(make: Callable[..., Learner]):
    learner = make()
    before = snapshot(learner)
    assert learner.update([], cross_entropy("token"))["tokens"] == 0.0
    assert same(snapshot(learner), before)


def test_same_seed_same_training(make: Callable[..., Learner]):
    first, second = make(), make()
    for learner in (first, second):
        learner.update(SEQUENCES, cross_entropy("sequence"))
    assert same(snapshot(first), snapshot(second))


def test_save_and_load_continue_bit_for_bit(make: Callable[..., Learner], tmp_path: Path):
    first, second = make(), make()
    first.update(SEQUENCES, cross_entropy("token"))
    first.save(str(tmp_path / "step_1"), 1)
    first.finish_saving()
    assert second.load(str(tmp_path / "step_1")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    for learner in (first, second):
        learner.update(SEQUENCES, cross_entropy("token"))
    assert same(snapshot(first), snapshot(second))


def test_a_checkpoint_that_is_not_there_is_the_users_error(make: Callable[..., Learner], tmp_path: Path):
    with pytest.raises(UserError, match="absent"):
        make().load(str(tmp_path / "absent"))


def test_export_is_named_by_its_content_and_starts_the_same_policy(make: Callable[..., Learner], tmp_path: Path):
    learner = make()
    learner.update(SEQUENCES, cross_entropy("token"))
    folder = tmp_path / "hf"
    sha256 = learner.export(str(folder))
    assert sha256 == content_sha256(folder)
    assert learner.export(str(tmp_path / "again")) == sha256
    assert same(snapshot(make(str(folder))), snapshot(learner))
    learner.update(SEQUENCES, cross_entropy("token"))
    assert learner.export(str(tmp_path / "later")) != sha256


def test_using_borrows_and_gives_back_also_after_an_error(make: Callable[..., Learner], tmp_path: Path):
    learner = make()
    learner.export(str(tmp_path / "old"))
    old = snapshot(learner)
    learner.update(SEQUENCES, cross_entropy("token"))
    own = snapshot(learner)
    with pytest.raises(KeyError), learner.using(str(tmp_path / "old")):
        assert same(snapshot(learner), old)
        raise KeyError("the teacher's pass failed")
    assert same(snapshot(learner), own)
    learner.update(SEQUENCES, cross_entropy("token"))
    assert not same(snapshot(learner), own)
