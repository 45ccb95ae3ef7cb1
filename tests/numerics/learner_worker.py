"""One rank of the equivalence test: five steps of each algorithm in several layouts, metrics and weights to files.

Run as a script with RANK and WORLD_SIZE set: learner_worker.py FOLDER NAME:MICRO_BATCH_TOKENS:LAYOUT..., where LAYOUT
is `data` or the name of a field of HardwareConfig that gets the value 2. The weights to start from lie in FOLDER/start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import sys
from pathlib import Path

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from megatron.core import parallel_state

from nemo_cascade.algorithms.loss import cross_entropy, policy_gradient
from nemo_cascade.config.schema import HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Sequence

TINY = NemotronHConfig(
    vocab_size=64, hidden_size=32, hybrid_override_pattern="M*E", num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, chunk_size=16,
)  # fmt: skip


def groups(step: int) -> list[list[Sequence]]:
    """Six groups of three rollouts, different at every step; group indices are filled in by each rank."""
    draw = random.Random(step)
    made = []
    for _ in range(6):
        prompt = tuple(draw.randrange(64) for _ in range(draw.randint(3, 12)))
        group = []
        for _ in range(3):
            answer = tuple(draw.randrange(64) for _ in range(draw.randint(1, 9)))
            mask = (0,) * len(prompt) + (1,) * len(answer)
            advantage = draw.uniform(-1, 1)
            logprobs = tuple(-4.16 * trained for trained in mask)
            group.append(Sequence(prompt + answer, mask, tuple(advantage * m for m in mask), logprobs, logprobs))
        made.append(group)
    return made


def share(step: int, rank: int, world: int) -> list[Sequence]:
    """This rank's whole groups under its own indices. In step 2 rank 0 gets everything and rank 1 nothing."""
    mine = [
        group for index, group in enumerate(groups(step)) if world == 1 or (0 if step == 2 else index % world) == rank
    ]
    return [dataclasses.replace(sequence, group=index) for index, group in enumerate(mine) for sequence in group]


def train(output: Path, micro_batch_tokens: int, hardware: HardwareConfig) -> None:
    """Five steps of each algorithm from the weights in `start` beside the output; `bias` also moves expert biases."""
    rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    results = {}
    objectives = {
        "sft": cross_entropy("token"),
        "bias": cross_entropy("sequence"),
        "grpo": policy_gradient(LossConfig(kl=0.03, importance="tis")),
        "grpo_groups": policy_gradient(LossConfig(normalize="group_tokens")),
    }
    for name, objective in objectives.items():
        cfg = OptimizerConfig(
            lr=1e-3, weight_decay=0.1, clip_grad=0.5, expert_bias_rate=1e-2 if name == "bias" else 0.0,
            max_skipped_steps=1,
        )
        settings = LearnerSettings(cfg, num_steps=5, micro_batch_tokens=micro_batch_tokens, hardware=hardware)
        learner = MegatronLearner(TINY, settings, init_folder=str(output.parent / "start"))
        steps = [learner.update(share(step, rank, world), objective) for step in range(5)]
        scores = learner.logprobs(share(0, 0, 1)[: 4 if rank == 0 else 0])
        weights = torch.cat([tensor.flatten() for _, tensor in learner.weights()])
        torch.save(weights, output / f"{name}-{dist.get_rank()}.pt")
        learner.save(str(output / name), 5)
        learner.updates = 0
        assert learner.load(str(output / name)) == 5
        assert torch.equal(torch.cat([tensor.flatten() for _, tensor in learner.weights()]), weights)
        results[name] = {"steps": steps, "scores": scores}
        if name == "grpo":  # the last replica's advantages are no numbers: every rank must skip the step
            mine = share(0, rank, world)
            if rank == world - 1:
                mine = [dataclasses.replace(one, advantages=(math.nan,) * len(one.advantages)) for one in mine]
            step = learner.update(mine, objective)
            results["broken"] = {key: step[key] for key in ("skipped", "non_finite", "trained_tokens")}
            assert torch.equal(torch.cat([tensor.flatten() for _, tensor in learner.weights()]), weights)
    (output / f"results-{dist.get_rank()}.json").write_text(json.dumps(results))


def main(folder: str, *cases: str) -> None:
    for case in cases:
        name, micro_batch_tokens, layout = case.split(":")
        cut = {} if layout == "data" else {layout: 2}
        hardware = HardwareConfig(ranks_per_node=int(os.environ["WORLD_SIZE"]), **cut)
        rendezvous = Path(folder) / f"{name}.rendezvous"
        parallel.start(parallel.ParallelLayout.from_hardware(hardware), rendezvous=rendezvous)
        train(Path(folder) / name, int(micro_batch_tokens), hardware)
        parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
