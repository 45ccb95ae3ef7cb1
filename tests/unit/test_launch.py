"""What launch picks from a stage's config, without running one."""

from __future__ import annotations

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.config.schema import GrpoConfig, SamplingConfig, SftConfig
from nemo_cascade.launch import trained_distribution


def grpo(**sampling: object) -> GrpoConfig:
    config = SamplingConfig(max_new_tokens=8, temperature=0.7, top_p=0.9, top_k=5, **sampling)
    return GrpoConfig("grpo", "base", 1, prompts_per_step=1, group_size=2, sampling=config)


def test_the_learner_scores_under_the_distribution_that_sampled_unless_told_raw() -> None:
    assert trained_distribution(grpo()) == Distribution(0.7, 0.9, 5)
    assert trained_distribution(grpo(logprobs="raw")) == RAW == Distribution(1.0, 1.0, 0)
    assert trained_distribution(SftConfig("sft", "base", 1, tokens_per_step=64)) == RAW
