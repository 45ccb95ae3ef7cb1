"""One rank of test_layouts.py: what a Learner does besides training steps, in several layouts of two ranks.

Run as a script with RANK and WORLD_SIZE set: cut_learner.py FOLDER LAYOUT..., names of tools/bench/layouts.py.
FOLDER/teacher and FOLDER/start hold weights of its model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

from nemo_cascade.learner import forward, parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import DistillConfig, LossConfig, OptimizerConfig
from nemo_cascade.learner.output import output_logprobs
from nemo_cascade.models.hf_folder import content_sha256
from nemo_cascade.types import Sequence, UserError
from tools.bench.layouts import LAYOUTS, MODEL, ONE, Layout, sequences


def flat(learner: MegatronLearner) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for _, tensor in learner.weights()])


def exercise(folder: Path, layout: Layout) -> dict[str, object]:
    """Borrowed weights, exact distillation, checkpoint and export; what must agree with one process is returned."""
    rank, replicas = parallel_coordinates()
    settings = LearnerSettings(
        OptimizerConfig(lr=5e-4, clip_grad=0.1, expert_bias_rate=1e-3), 20, layout.micro_batch_tokens,
        hardware=layout.hardware,
    )  # fmt: skip
    teacher = str(folder / "teacher")
    learner = MegatronLearner(MODEL, settings, init_folder=str(folder / "start"))
    before = flat(learner)
    everything = sequences(0, 0, 1)
    with learner.using(teacher):
        taught = learner.logprobs(everything)
        borrowed = flat(learner)
    assert torch.equal(flat(learner), before)
    assert not torch.equal(borrowed, before)
    sampled = dict(zip([s.token_ids for s in everything], learner.logprobs(everything), strict=True))
    own = [
        dataclasses.replace(s, sampler_logprobs=tuple(sampled[s.token_ids]), teacher=teacher)
        for s in sequences(0, rank, replicas)
    ]
    distilled = learner.update(own, distillation(DistillConfig(kind="full_vocab")))
    place = folder / layout.name
    learner.save(str(place / "step_1"), 1)
    resumed = MegatronLearner(MODEL, settings, seed=99)
    assert resumed.load(str(place / "step_1")) == 1
    assert torch.equal(flat(resumed), flat(learner))
    for step in (1, 2):
        one, two = (of.update(sequences(step, rank, replicas), cross_entropy("token")) for of in (learner, resumed))
        assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
    assert torch.equal(flat(resumed), flat(learner))
    again = MegatronLearner(MODEL, settings, init_folder=teacher)
    assert again.export(str(place / "again")) == content_sha256(teacher)
    compared = ("loss", "reverse_kl", "grad_norm", "entropy")
    return {
        "taught": taught, "distilled": {key: distilled[key] for key in compared},
        "chosen": chosen(learner, str(folder / "start"), own),
        "pieces": in_pieces(again, everything), "experts": routing(again, everything), "half": in_bf16(folder, layout),
    }  # fmt: skip


def chosen(learner: MegatronLearner, start: str, own: list[Sequence]) -> dict[str, float]:
    """What needs whole positions or whole sequences on every rank: the top-k reverse KL, and masking by sequence."""
    again = MegatronLearner(MODEL, learner.settings, init_folder=start)
    top = again.update(own, distillation(DistillConfig(kind="topk", top_k=8)))
    again = MegatronLearner(MODEL, learner.settings, init_folder=start)
    apart = []  # sequences of odd length were sampled by a policy that found each token 1.2 times as likely
    for s in own:
        more = 0.18 * (len(s.token_ids) % 2)
        apart.append(dataclasses.replace(s, sampler_logprobs=tuple(value + more for value in s.sampler_logprobs)))
    cfg = LossConfig(importance="sequence_mask", importance_low=0.9, importance_high=1.1, max_masked_share=1.0)
    masked = again.update(apart, policy_gradient(cfg))
    assert 0.0 < masked["masked_sequence_share"] < 1.0
    return {f"top {key}": top[key] for key in ("loss", "reverse_kl", "grad_norm")} | {
        f"masked {key}": masked[key] for key in ("loss", "masked_share", "masked_sequence_share", "grad_norm")
    }


def in_pieces(learner: MegatronLearner, rows: list[Sequence]) -> list[list[float]]:
    """Log-probabilities where every row is long: 16 tokens of it at a time."""
    forward.output_logprobs = functools.partial(output_logprobs, chunk_logits=16 * MODEL.vocab_size)
    try:
        return learner.logprobs(rows)
    finally:
        forward.output_logprobs = output_logprobs


def routing(learner: MegatronLearner, rows: list[Sequence]) -> list[str] | None:
    """The recorded experts; None where recording and replay are both refused, on every rank."""
    hardware = learner.settings.hardware
    if hardware.pipeline_parallel == hardware.context_parallel == 1:
        return [experts.hex() for experts in learner.routing(rows)]
    fixed = [dataclasses.replace(row, routed_experts=bytes([0, 1] * 2 * len(row.token_ids))) for row in rows]
    for refused in (lambda: learner.routing(rows), lambda: learner.update(fixed, cross_entropy("token"))):
        try:
            refused()
        except UserError as error:
            assert "hardware.pipeline_parallel or hardware.context_parallel" in str(error)
        else:
            raise AssertionError(f"routing replay ran with {hardware}")
    return None


def in_bf16(folder: Path, layout: Layout) -> list[float]:
    """Losses of training steps with fp32 masters, across a checkpoint in the middle."""
    rank, replicas = parallel_coordinates()
    hardware = dataclasses.replace(layout.hardware, precision="bf16")
    settings = LearnerSettings(OptimizerConfig(lr=2e-3), 20, layout.micro_batch_tokens, hardware=hardware)
    learner = MegatronLearner(MODEL, settings, init_folder=str(folder / "start"))
    losses = [learner.update(sequences(0, rank, replicas), cross_entropy("token"))["loss"] for _ in range(2)]
    place = str(folder / layout.name / "half")
    learner.save(place, 2)
    resumed = MegatronLearner(MODEL, settings, seed=99)
    assert resumed.load(place) == 2
    one, two = (of.update(sequences(0, rank, replicas), cross_entropy("token"))["loss"] for of in (learner, resumed))
    assert one == two and torch.equal(flat(resumed), flat(learner))
    return [*losses, one]


def parallel_coordinates() -> tuple[int, int]:
    """Index and number of data-parallel replicas."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def main(folder: Path, *names: str) -> None:
    known = {layout.name: layout for layout in (ONE, *LAYOUTS)}
    for name in names:
        layout = known[name]
        cut = parallel.ParallelLayout.from_hardware(layout.hardware)
        parallel.start(cut, seed=3, rendezvous=folder / f"{name}.meeting")
        results = exercise(folder, layout)
        rank = torch.distributed.get_rank()
        (folder / f"{name}-{rank}.json").write_text(json.dumps(results))
        parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
