"""The learner's benchmark on a GPU: both sides compute the same, and no more than the card can.

python -m pytest tests/gpu/test_bench.py -m gpu -s
"""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from nemo_cascade.learner import parallel
from tools.bench import learner
from tools.bench.training_step import Machine, Workload, compare, grpo_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]


@pytest.fixture
def machine():
    """One rank on the first card; memory of the test before is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    parallel.start(seed=1)
    yield Machine(torch.device("cuda"), "bf16")
    parallel.stop()


def test_sft_and_grpo_of_the_1b_model_print_tokens_per_second_and_mfu(machine) -> None:
    numbers = learner.on_gpu(machine, repeats=5)
    sys.stdout.write("\n".join(learner.line(*item) for item in numbers.items()) + "\n")
    assert numbers["sft_tokens_per_second"] > 1000 and numbers["grpo_update_tokens_per_second"] > 1000
    if machine.peak() is not None:
        assert 0.01 < numbers["sft_mfu_ours_update"] < 1.0
        assert 0.01 < numbers["grpo_update_mfu"] < 1.0
    assert 0.0 < numbers["share_of_limit"] < 1.0


def test_both_sides_have_the_same_loss_in_bf16(machine) -> None:
    numbers = compare(Workload("nemotron_h_50m"), machine, repeats=1, warmup=0)
    assert numbers["loss_difference_vs_transformers"] < 5e-3
    assert grpo_training(Workload("nemotron_h_50m"), machine, repeats=1)["tokens_per_second"] > 0.0
