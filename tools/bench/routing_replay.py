"""How far are Sampler and Learner apart, and how much of it is experts? `python -m tools.bench.routing_replay`

In each precision the shipped base answers prompts of the nano tasks; the Sampler computes in fp32 with the weights that
a refit gives it, the Learner in the precision. Printed: the share of the Sampler's choices that the Learner's routers
would not make (`routing_flips`), and the mean and largest distance of the sampled tokens' log-probabilities in nats,
with the update's own experts (`loss.routing_replay: none`) and with the Sampler's (`sampler`).
"""

from __future__ import annotations

import argparse

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade import domains
from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.paths import hf_folder
from nemo_cascade.config.schema import HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.stages.sequences import with_routing
from nemo_cascade.types import Request, SamplingParams, Sequence

PRECISIONS = ("fp32", "bf16", "hopper_fp8_emulated", "blackwell_mxfp8_emulated")
PROMPT_DOMAINS = ("instruction_following", "mcqa", "tool_use", "structured_output", "math", "long_context", "code")
MAX_NEW_TOKENS = 48
COLUMNS = ("tokens", "flips", "gap none", "max none", "gap sampler", "max sampler")


def base(precision: str) -> MegatronLearner:
    """The shipped base in a precision."""
    folder = str(hf_folder("hf:nano"))
    hardware = HardwareConfig(precision=precision)
    settings = LearnerSettings(OptimizerConfig(lr=0.0), num_steps=1, hardware=hardware)
    return MegatronLearner(read_config(folder), settings, init_folder=folder)


def answers(learner: MegatronLearner, per_domain: int, seed: int) -> list[Sequence]:
    """One answer to each prompt, sampled with the Learner's weights, with the experts that sampled it."""
    chat = ChatTokenizer(hf_folder("hf:nano"))
    prompts = [
        tuple(chat.prompt_ids(task))
        for name in PROMPT_DOMAINS
        for task in domains.load(name, domains.Services(), None).tasks("select", per_domain, seed)
    ]
    sampler = LocalSampler(learner.config)
    sampler.load_weights(learner.weights(), 0)
    requests = [Request(prompt, seed * 1000 + index, MAX_NEW_TOKENS) for index, prompt in enumerate(prompts)]
    params = SamplingParams(MAX_NEW_TOKENS, stop_ids=tuple(chat.stop_ids), routed_experts=True)
    found = dict(sampler.sample(requests, params))
    rows = []
    for index, prompt in enumerate(prompts):
        own = found[index]
        mask = (0,) * len(prompt) + (1,) * len(own.token_ids)
        rows.append(
            Sequence(
                prompt + own.token_ids, mask, tuple(map(float, mask)), (0.0,) * len(prompt) + own.logprobs,
                group=index, routed_experts=own.routed_experts,
            )
        )  # fmt: skip
    return rows


def measure(precision: str, per_domain: int, seed: int) -> list[str]:
    """One line of the table."""
    learner = base(precision)
    rows = answers(learner, per_domain, seed)
    plain, replayed = (
        learner.update(with_routing(rows, learner, replay), policy_gradient(LossConfig()))
        for replay in ("none", "sampler")
    )
    gaps = [metrics[name] for metrics in (plain, replayed) for name in ("gap_abs", "gap_abs_max")]
    return [f"{replayed['trained_tokens']:.0f}", f"{replayed['routing_flips']:.2%}", *(f"{gap:.2g}" for gap in gaps)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-domain", type=int, default=24, help="prompts of each domain")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel.start(seed=1)
    print(f"{'precision':26}" + "".join(f"{column:>13}" for column in COLUMNS))
    for precision in PRECISIONS:
        line = measure(precision, options.per_domain, options.seed)
        print(f"{precision:26}" + "".join(f"{value:>13}" for value in line), flush=True)
    parallel.stop()


if __name__ == "__main__":
    main()
