"""A training step of ours against `transformers` on the same weights and batch, and against its matrix products alone.

Ours is `MegatronLearner.update`; its forward and backward are counted from the sequences to the norm of the gradients,
packing and that norm included. Theirs is NemotronHForCausalLM with labels, then `backward`; with the optimizer, also
clipping and torch's fused AdamW. Every position is trained and every token is real: there is no padding to save.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, policy_gradient
from nemo_cascade.config.paths import hf_folder
from nemo_cascade.config.schema import HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Sequence as TokenSequence
from tools.bench.clock import in_turn, median_ratio, now
from tools.bench.products import runner, step_products, total_flops

OPTIMIZER = OptimizerConfig(lr=1e-6, weight_decay=0.1)
FIRST_TOKEN = 16  # below it are control tokens
# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets (SXM cards).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class Workload:
    """A model and the batch that it trains on."""

    preset: str
    sequences: int = 16
    length: int = 128


@dataclass(frozen=True)
class Machine:
    """Where and in which dtype both sides compute."""

    device: torch.device
    dtype: str = "fp32"  # fp32 | bf16
    layer_spec: str = "local"

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch names it."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def learner(self, folder: Path | None, config: NemotronHConfig, row_tokens: int) -> MegatronLearner:
        """Our Learner with these weights (None: random ones)."""
        hardware = HardwareConfig(precision=self.dtype, layer_spec=self.layer_spec)
        settings = LearnerSettings(OPTIMIZER, 1_000_000, micro_batch_tokens=row_tokens, hardware=hardware)
        return MegatronLearner(config, settings, init_folder=str(folder) if folder is not None else None)

    def transformers(self, folder: Path) -> torch.nn.Module:
        """The same weights in transformers, in training mode."""
        from transformers import NemotronHForCausalLM

        model = NemotronHForCausalLM.from_pretrained(folder, dtype=self.torch_dtype)
        return model.to(self.device).train()

    def peak(self) -> float | None:
        """FLOP/s that the data sheet promises in bf16; None where none is known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in PEAKS.items() if part in name), None)


class OurStep:
    """One `update` a round. `seconds` counts up to the gradients' norm, `whole` the optimizer too."""

    def __init__(self, learner: MegatronLearner, sequences: list[TokenSequence], objective: Objective) -> None:
        self.learner, self.sequences = learner, sequences
        self.objective = dataclasses.replace(objective, check=self._gradients_are_there)
        self.losses: list[float] = []
        self.reached = 0.0

    def _gradients_are_there(self, metrics: Mapping[str, float]) -> None:
        """`update` calls this before the optimizer."""
        self.reached = now(self.learner.device)
        self.losses.append(metrics["loss"])

    def __call__(self) -> dict[str, float]:
        begin = now(self.learner.device)
        self.learner.update(self.sequences, self.objective)
        return {"ours": self.reached - begin, "ours_update": now(self.learner.device) - begin}


class TheirStep:
    """Forward, backward, clipping and AdamW in plain transformers."""

    def __init__(self, model: torch.nn.Module, ids_S_T: torch.Tensor, device: torch.device) -> None:
        self.model, self.device = model, device
        self.ids_S_T = ids_S_T.to(device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=OPTIMIZER.lr, betas=tuple(OPTIMIZER.betas), eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay, fused=True,
        )  # fmt: skip
        self.losses: list[float] = []

    def __call__(self) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        begin = now(self.device)
        loss = self.model(input_ids=self.ids_S_T, labels=self.ids_S_T, use_cache=False).loss
        loss.backward()
        reached = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_grad)
        self.optimizer.step()
        whole = now(self.device) - begin
        self.losses.append(float(loss))
        return {"theirs": reached - begin, "theirs_update": whole}


def random_batch(config: NemotronHConfig, work: Workload) -> tuple[torch.Tensor, list[TokenSequence]]:
    """The same random tokens as ids [sequences, length] and as our sequences, every token but the first trained."""
    generator = torch.Generator().manual_seed(1)
    ids_S_T = torch.randint(FIRST_TOKEN, config.vocab_size, (work.sequences, work.length), generator=generator)
    mask = (0, *[1] * (work.length - 1))
    return ids_S_T, [TokenSequence(tuple(row), mask) for row in ids_S_T.tolist()]


def compare(work: Workload, machine: Machine, repeats: int, warmup: int = 2) -> dict[str, float]:
    """One line of numbers; ratios above 1 say that ours is faster.

    `vs_transformers`: forward and backward. `share_of_limit`: time of the matrix products alone over our time, by
    torch.mm, which is what transformers calls; `share_of_own_limit` by what our layers call, where that is another.
    """
    config = NemotronHConfig.preset(work.preset)
    ids_S_T, sequences = random_batch(config, work)
    with tempfile.TemporaryDirectory() as name:
        folder = hf_folder("hf:nano") if work.preset == "nano" else Path(name) / "hf"
        start = folder if work.preset == "nano" else None
        config = read_config(folder) if start is not None else config
        learner = machine.learner(start, config, ids_S_T.numel())
        if start is None:
            learner.export(str(folder))
        theirs = TheirStep(machine.transformers(folder), ids_S_T, machine.device)
    ours = OurStep(learner, sequences, cross_entropy("token"))
    products = step_products(config, work.sequences, work.length, work.sequences * (work.length - 1))
    limits = {
        "limit": runner(products, machine.torch_dtype, machine.device),
        "own_limit": runner(products, machine.torch_dtype, machine.device, as_ours=True),
    }

    def limit() -> dict[str, float]:
        seconds = {}
        for name, multiply in limits.items():
            begin = now(machine.device)
            multiply()
            seconds[name] = now(machine.device) - begin
        return seconds

    seconds = in_turn([ours, theirs, limit], repeats, warmup)
    tokens = ids_S_T.numel()
    numbers = {
        "vs_transformers": median_ratio(seconds, "theirs", "ours"),
        "update_vs_transformers": median_ratio(seconds, "theirs_update", "ours_update"),
        "share_of_limit": median_ratio(seconds, "limit", "ours"),
        "share_of_own_limit": median_ratio(seconds, "own_limit", "ours"),
        "transformers_share_of_limit": median_ratio(seconds, "limit", "theirs"),
        "loss_difference_vs_transformers": abs(ours.losses[0] - theirs.losses[0]) / abs(theirs.losses[0]),
    }
    for side in ("ours", "ours_update", "theirs", "theirs_update", "limit", "own_limit"):
        numbers[f"tokens_per_second_{side}"] = tokens / statistics.median(seconds[side])
    if (peak := machine.peak()) is not None:
        for side in ("ours_update", "theirs_update"):
            numbers[f"mfu_{side}"] = total_flops(products) / statistics.median(seconds[side]) / peak
    return numbers


def grpo_training(work: Workload, machine: Machine, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Our update alone on made-up rollouts, a quarter of each the prompt: tokens/s, and MFU where the peak is known.

    Prompt tokens count as tokens (they pass the layers); only answers pass the output layer.
    """
    config = NemotronHConfig.preset(work.preset)
    ids_S_T, _ = random_batch(config, work)
    prompt = work.length // 4
    mask = (0,) * prompt + (1,) * (work.length - prompt)
    rollouts = [
        TokenSequence(tuple(row), mask, advantages=tuple((-1.0) ** number * value for value in mask), group=0)
        for number, row in enumerate(ids_S_T.tolist())
    ]
    learner = machine.learner(None, config, ids_S_T.numel())
    ours = OurStep(learner, rollouts, policy_gradient(LossConfig(normalize="batch_tokens")))
    whole = statistics.median(in_turn([ours], repeats, warmup)["ours_update"])
    numbers = {"tokens_per_second": ids_S_T.numel() / whole}
    if (peak := machine.peak()) is not None:
        products = step_products(config, work.sequences, work.length, sum(mask) * work.sequences)
        numbers["mfu"] = total_flops(products) / whole / peak
    return numbers
