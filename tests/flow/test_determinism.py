"""The same seed gives the same bits: weights, metrics, rollouts and scores of every stage, whatever the threads do.

Two ranks; the second run has another hash seed and another number of reward threads, so that no order of a set, of
thread timing or of the judge's batches may leak into what is computed.
"""

import pytest

from tests.flow.real_cascade import STAGES, Cascade

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(uninterrupted: Cascade) -> Cascade:
    return uninterrupted


def test_the_same_seed_gives_the_same_bits(first, tmp_path):
    again = Cascade(tmp_path)
    done = again.run("hardware.reward_workers=1", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in STAGES:
        assert again.outcome(name) == first.outcome(name), name
    assert len(first.outcome("rl").metrics) == 3
    assert first.outcome("rl").sha256 != first.outcome("sft").sha256


def test_another_seed_gives_other_bits(first, tmp_path):
    other = Cascade(tmp_path)
    done = other.run("seed=2", "--until", "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert other.outcome("sft").sha256 != first.outcome("sft").sha256
