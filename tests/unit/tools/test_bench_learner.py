"""The learner's benchmark: the list of matrix products, what it says without TRL, and that both sides do the same."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_cascade.models.config import NemotronHConfig
from tools.bench import learner
from tools.bench.clock import in_turn, median_ratio
from tools.bench.products import Product, forward_products, runner, step_products, total_flops

ROOT = Path(__file__).resolve().parents[3]
NANO = NemotronHConfig.preset("nano")


def test_products_of_whole_rows_are_the_weights_that_a_token_meets():
    """A linear layer multiplies and adds once per weight and token; of the experts a token meets top-k of n."""
    weights = 0.0
    for name, shape in NANO.tensor_shapes().items():
        if len(shape) != 2 or "embeddings" in name:
            continue
        share = NANO.num_experts_per_tok / NANO.n_routed_experts if ".experts." in name else 1.0
        weights += math.prod(shape) * share
    linear = [product for product in forward_products(NANO, 16, 128, 16 * 128) if product.batch == 1]
    assert sum(product.flops for product in linear) == 2 * 16 * 128 * weights


def test_products_of_attention_and_scan_by_hand():
    """Nano, 2 sequences of 64 tokens: 2 attention layers of 4 heads of 32; 2 scans of 2 chunks of 32 tokens, 8 heads of
    32 in 2 groups with states of 32.
    """
    batched = [product for product in forward_products(NANO, 2, 64, 1) if product.batch > 1]
    assert batched.count(Product(64, 32, 64, 8)) == 2 and batched.count(Product(64, 64, 32, 8)) == 2
    # C B^T, then inside the chunk, then the state made and read (4 heads of a group side by side)
    assert batched.count(Product(32, 32, 32, 8)) == 2 and batched.count(Product(32, 32, 32, 32)) == 2
    assert batched.count(Product(32, 32, 128, 8)) == 4
    assert len(batched) == 12


def test_a_backward_pass_doubles_the_work_and_one_chunk_carries_no_state():
    forward = sum(product.flops for product in forward_products(NANO, 2, 32, 64))
    assert total_flops(step_products(NANO, 2, 32, 64)) == 3 * forward
    assert Product(32, 32, 128, 4) not in step_products(NANO, 2, 32, 64)


def test_the_runner_computes_each_product_as_often_as_listed(monkeypatch):
    done = []
    multiply = {name: getattr(torch, name) for name in ("mm", "bmm")}
    for name, real in multiply.items():
        monkeypatch.setattr(torch, name, lambda a, b, out, real=real: done.append((a.shape, real(a, b, out=out).shape)))
    products = step_products(NANO, 2, 32, 64)
    runner(products, torch.float32, torch.device("cpu"))()
    assert len(done) == products.total()
    assert sum(2 * math.prod(left) * out[-1] for left, out in done) == total_flops(products)


def test_sides_take_turns_and_the_warm_up_is_forgotten():
    order: list[str] = []

    def side(name: str, slow: float):
        def run() -> dict[str, float]:
            order.append(name)
            return {name: slow * (100.0 if len(order) <= 2 else 1.0)}

        return run

    seconds = in_turn([side("ours", 1.0), side("theirs", 3.0)], repeats=2, warmup=1)
    assert order == ["ours", "theirs"] * 3
    assert seconds == {"ours": [1.0, 1.0], "theirs": [3.0, 3.0]}
    assert median_ratio(seconds, "theirs", "ours") == 3.0


def test_without_trl_one_line_says_how_to_get_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else real(name, *more))
    assert learner.main(["--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "error: trl is not installed, which grpo and agreement need: run `make bench` (it installs it)\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_cuda_is_refused(capsys):
    assert learner.main(["--device", "cuda"]) == 2
    assert "--device: cuda needs an NVIDIA GPU" in capsys.readouterr().err


def test_targets_are_shown_as_reached_or_missed():
    assert learner.line("train_vs_transformers", 1.6).endswith("at least 1.5: reached")
    assert learner.line("train_vs_transformers", 1.4).endswith("at least 1.5: MISSED")
    assert learner.line("loss_difference_vs_trl", 1e-4).endswith("at most 1e-05: MISSED")
    assert learner.line("loss_difference_vs_trl", 1e-6).endswith("at most 1e-05: reached")


@pytest.mark.slow
def test_both_sides_of_the_training_step_compute_the_same_loss():
    """One round of the real thing: the same first loss, and ratios that follow from the tokens per second."""
    words = ["tools/bench/learner.py", "--json", "--repeats", "1", "--parts", "train", "packing"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=570, check=True
    )
    numbers = json.loads(done.stdout)
    assert numbers["train_loss_difference_vs_transformers"] < 1e-5
    ours, theirs = numbers["train_tokens_per_second_ours"], numbers["train_tokens_per_second_theirs"]
    assert numbers["train_vs_transformers"] == pytest.approx(ours / theirs)
    assert numbers["share_of_limit"] == pytest.approx(ours / numbers["train_tokens_per_second_limit"])
    assert ours > numbers["train_tokens_per_second_ours_update"]
    assert numbers["packing_fill"] >= 0.95
