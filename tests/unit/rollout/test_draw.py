"""Random streams belong to requests, and what is drawn agrees with what the Learner will compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_cascade.algorithms.kept import kept_logprobs
from nemo_cascade.rollout.draw import draw, uniforms
from nemo_cascade.types import SamplingParams


def test_uniforms_are_a_function_of_seed_and_position() -> None:
    long = uniforms(12345678901234567890, 5000)
    assert np.array_equal(uniforms(12345678901234567890, 17), long[:17])
    assert long.dtype == np.float32 and 0.0 <= long.min() and long.max() < 1.0
    assert abs(float(long.mean()) - 0.5) < 0.02
    assert abs(float(np.corrcoef(long[:-1], long[1:])[0, 1])) < 0.05
    firsts = np.array([uniforms(seed, 1)[0] for seed in range(4000)])
    assert np.histogram(firsts, 8, (0, 1))[0].min() > 420  # consecutive seeds are unrelated streams


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.9), (1.3, 7, 1.0), (0.8, 20, 0.7)]
)
def test_logprobs_agree_with_the_learners(temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BV = torch.randn(200, 64, generator=generator) * 3
    logits_BV[:50] = logits_BV[:50].round()  # many ties
    params = SamplingParams(1, temperature, top_p, top_k)
    tokens_B, logprobs_B = draw(logits_BV, torch.rand(200, generator=generator), params)
    expected_B = kept_logprobs(logits_BV, tokens_B, temperature, top_k, top_p)
    torch.testing.assert_close(logprobs_B, expected_B, atol=1e-5, rtol=0)


def test_the_last_uniform_never_draws_an_impossible_token() -> None:
    logits_BV = torch.full((3, 8), -torch.inf)
    logits_BV[:, :3] = torch.tensor([1.0, 2.0, 3.0])
    tokens_B, _ = draw(logits_BV, torch.tensor([0.0, 0.5, 1.0 - 2.0**-24]), SamplingParams(1))
    assert tokens_B.tolist() == [0, 2, 2]


def test_greedy_takes_the_first_of_equals() -> None:
    tokens_B, logprobs_B = draw(torch.tensor([[0.0, 1.0, 1.0]]), torch.zeros(1), SamplingParams(1, temperature=0.0))
    assert tokens_B.tolist() == [1]
    assert logprobs_B.tolist() == pytest.approx([float(torch.log_softmax(torch.tensor([0.0, 1.0, 1.0]), -1)[1])])
