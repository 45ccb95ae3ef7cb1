"""A cascade whose policy is cut over two processes trains like that of one process: same samples, same losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_cascade.observe.record import read_metrics
from nemo_cascade.observe.rollouts import read_groups
from tests.flow.real_cascade import SAMPLING, Cascade

pytestmark = pytest.mark.slow
DATA = "data: {domains: {instruction_following: 1, mcqa: 1}}\noptimizer: {lr: 1.0e-3}\nprompts_per_step: 4\n"
STAGES = {
    "sft": "kind: sft\ninit: base\nnum_steps: 2\nsave_every: 1\ntokens_per_step: 1024\nmax_sequence_tokens: 320\n"
    "data: {domains: {instruction_following: 1, mcqa: 1}}\noptimizer: {lr: 3.0e-4}\n",
    "rl": "kind: grpo\ninit: sft\nnum_steps: 2\ngroup_size: 4\nloss: {kl: 0.03}\n" + SAMPLING + DATA,
    "mopd": "kind: mopd\ninit: rl\nnum_steps: 1\ngroup_size: 2\nteachers: {candidates: [sft, rl]}\n" + SAMPLING + DATA,
}
HEAD = (
    "name: real\nmodel: nano\nbase: hf:nano\nhardware: cpu1\nstages: [sft, rl, mopd]\n"
    "evaluation: {select: 4, report: 0, domains: [instruction_following, mcqa], max_new_tokens: 32}\n"
)
CUTS = ("pipeline_parallel", "context_parallel", "tensor_parallel")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return finished(tmp_path_factory.mktemp("whole"))


def finished(folder: Path, *overrides: str) -> Cascade:
    cascade = Cascade(folder, HEAD, STAGES)
    done = cascade.run(*overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return cascade


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_policy_goes_through_the_same_cascade(whole: Cascade, tmp_path: Path, cut: str) -> None:
    cascade = finished(tmp_path, "hardware.ranks_per_node=2", f"hardware.{cut}=2")
    for stage in STAGES:
        expected, found = read_metrics(whole.stage(stage).path), read_metrics(cascade.stage(stage).path)
        assert len(found) == len(expected)
        for one, two in zip(expected, found, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert two.get("reward") == one.get("reward")
            assert two.get("gap_abs", 0.0) < 1e-5
    assert answers(cascade) == answers(whole)


def answers(cascade: Cascade) -> list[Sequence[int]]:
    """The token ids of the rollouts of the first RL step."""
    groups = read_groups(cascade.stage("rl").path, 0)
    return [rollout.token_ids for group in groups for rollout in group.rollouts]
