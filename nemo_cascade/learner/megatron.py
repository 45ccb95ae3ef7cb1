"""The Learner on Megatron-core: packed micro-batches, gradients summed over ranks, AdamW, bit-exact checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from nemo_cascade.learner import parallel  # first: it sets what torch reads at import

import torch  # isort: skip
from megatron.core import parallel_state

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.algorithms.schedule import learning_rate
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.data.packing import Packed, inputs_in_order, pack, to_batch
from nemo_cascade.learner import checkpoint, pipeline
from nemo_cascade.learner.borrow import HostCache
from nemo_cascade.learner.folder import attempt
from nemo_cascade.learner.forward import (
    FILLER,
    check_replay,
    on_device,
    replayed,
    routed,
    target_logprobs,
    vocabulary_logprobs,
)
from nemo_cascade.learner.optimizer import Trainer
from nemo_cascade.learner.ranks import added, combined, fail_together, gathered
from nemo_cascade.learner.stopwatch import Stopwatch
from nemo_cascade.learner.training_state import training_state
from nemo_cascade.models import convert, dtypes
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.routing import Routing
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Batch, UserError
from nemo_cascade.types import Sequence as TokenSequence

LOG = logging.getLogger(__name__)


def check_hardware(hardware: HardwareConfig) -> None:
    """Refuse what this Learner would not do, before anything is built."""
    if profile_of(hardware.precision).needs_te and not torch.cuda.is_available():
        raise UserError(
            f"hardware.precision: {hardware.precision} needs a GPU and this machine has none; set it to fp32, or to "
            f"{hardware.precision}_emulated to see what FP8 does"
        )
    if hardware.layer_spec == "te" and not torch.cuda.is_available():
        raise UserError(
            "hardware.layer_spec: te (Transformer Engine) needs a GPU and this machine has none; set it to local"
        )


@dataclass(frozen=True)
class LearnerSettings:
    """How the policy is trained. `distribution`: what the Sampler draws from; all log-probabilities are its."""

    optimizer: OptimizerConfig
    num_steps: int
    micro_batch_tokens: int = 4096
    distribution: Distribution = RAW
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    precision_export: str = "fp32"  # dtype of exported folders: fp32 | bf16
    tokenizer: str | None = None  # folder whose tokenizer and chat template exported folders carry


@dataclass(frozen=True)
class _Numbers:
    """A micro-batch's metrics while they are on the device: reading them waits for it."""

    names: tuple[str, ...]
    values: torch.Tensor  # float64, which holds any of them as it is

    @classmethod
    def of(cls, metrics: Mapping[str, torch.Tensor | float], device: torch.device) -> _Numbers:
        """From tensors of one element; numbers, too."""
        values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in metrics.values()]
        return cls(tuple(metrics), torch.stack([value.detach().reshape(()) for value in values]))

    def read(self) -> dict[str, float]:
        """Name -> value."""
        return dict(zip(self.names, self.values.tolist(), strict=True))


class MegatronLearner:
    """The trainable policy (protocol `Learner`). Every rank calls every method, also with no sequence of its own.

    `policy` is the NeMo model, `model` the Megatron-core network in it, `trainer` its gradient buffers and optimizer.

    `update` gives the same step for every parallel layout and every micro-batch size, up to the rounding of sums. fp8
    without Transformer Engine is refused unless emulated.
    """

    def __init__(
        self, config: NemotronHConfig, settings: LearnerSettings, init_folder: str | None = None, seed: int = 1
    ) -> None:
        hardware = settings.hardware
        check_hardware(hardware)
        layout = parallel.ParallelLayout.from_hardware(hardware)
        if not parallel.is_started():
            parallel.start(layout, seed=seed, threads=hardware.threads_per_rank)
        parallel.set_seed(seed)
        self.config = config
        self.settings = settings
        # Imported here: nemo.core takes seconds, and whoever only wants the settings need not wait.
        from nemo_cascade.models.cascade_model import CascadeModel, model_config

        self.policy = CascadeModel(
            model_config(config, layout, hardware.precision, hardware.layer_spec, hardware.fp8_bf16_layers)
        )
        self.model: NemotronH = self.policy.model
        if init_folder is not None:
            self._read(init_folder)
        self.trainer = Trainer.wrap(
            self.model, settings.optimizer, hardware.precision != "fp32", hardware.distributed_optimizer
        )
        self.cache = HostCache(self.model, self._read)
        self.writer = checkpoint.CheckpointWriter(hardware.async_save)
        self.updates = 0  # optimizer steps taken, the argument of the schedule
        self.broken_steps = 0  # in a row, skipped because their loss or gradient was no number
        self.device = next(self.model.parameters()).device

    def update(self, sequences: Sequence[TokenSequence], objective: Objective) -> dict[str, float]:
        """One optimizer step. Metrics are those of the whole step, the same on every rank, plus seconds and tokens.

        A step in which no rank has a trained token moves nothing and reports `skipped` 1. So does one whose loss or
        gradient is no number, with `non_finite` 1; more than `optimizer.max_skipped_steps` of these in a row abort.
        """
        self._own_weights("update")
        begin = time.perf_counter()
        denominators = added(objective.denominators(sequences))
        watch = Stopwatch()
        with watch.measure("prepare"):
            batches = self._training_batches(sequences, objective)
        self.model.train()
        self.trainer.zero_grad()
        loss_of = functools.partial(self._loss, objective=objective, denominators=denominators)
        parts = pipeline.train(self.model, batches, loss_of, _Numbers.read, watch)
        with watch.measure("reduce"):
            norm = self.trainer.reduce_gradients()
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
        trained = sum(sum(sequence.loss_mask[1:]) for sequence in sequences)
        own = combined([*parts, {"tokens": float(tokens), "trained_tokens": float(trained)}])
        metrics = combined(gathered(own))
        if choices := metrics.pop("routing_choices", 0.0):
            metrics["routing_flips"] /= choices  # share of the replayed experts that the routers would not choose now
        broken = self._broken(metrics, norm)
        if objective.check is not None and not broken:
            objective.check(metrics)
        rate = learning_rate(self.settings.optimizer, self.updates, self.settings.num_steps)
        skipped = broken or metrics["trained_tokens"] == 0.0
        if not skipped:
            with watch.measure("optimizer"):
                self.trainer.step(rate, norm)
        self.updates += 1
        parts_seconds = watch.metrics()
        seconds = time.perf_counter() - begin
        return metrics | parts_seconds | {
            "grad_norm": norm, "lr": rate, "skipped": float(skipped), "non_finite": float(broken),
            "micro_batches": float(len(batches)),
            "seconds/training/update": seconds, "tokens_per_second": metrics["tokens"] / seconds,
        }  # fmt: skip

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Log-probability of every token given those before it (nats, distribution of the settings); index 0 is 0.0."""
        packed = self._even(pack(sequences, self.settings.micro_batch_tokens))
        self.model.eval()
        batches = [on_device(batch, self.device) for batch in packed.batches]
        distribution = self.settings.distribution
        values_B_T = pipeline.evaluate(
            self.model, batches, lambda batch: target_logprobs(self.model, batch, distribution, True)[0].cpu()
        )
        own = Packed(packed.batches[: len(packed.order)], packed.order)
        return own.unpack(pipeline.from_last_stage(values_B_T)[: len(packed.order)])

    def routing(self, sequences: Sequence[TokenSequence]) -> list[bytes]:
        """The experts that the policy's routers choose for each token, for `Sequence.routed_experts`."""
        self._own_weights("routing")
        packed = self._even(pack(sequences, self.settings.micro_batch_tokens))
        self.model.eval()
        found = [routed(self.model, on_device(batch, self.device)) for batch in packed.batches]
        return inputs_in_order(found, packed.order)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face named tensors of the policy (inside `using`: of the borrowed folder), one at a time.

        Each has the dtype that models/dtypes.py gives it under this precision; another one is an error.
        """
        hardware = self.settings.hardware
        for name, tensor in convert.export_weights(self.model, self.config):
            dtypes.expect(name, convert.dtype_name(tensor), hardware.precision, hardware.layer_spec)
            yield name, tensor

    def using(self, folder: str) -> AbstractContextManager[None]:
        """Inside the context the parameters are those of a Hugging Face folder; after it, bit-exact the policy's."""
        return self.cache.using(folder)

    def save(self, folder: str, step: int) -> None:
        """A complete training checkpoint at `folder`, or nothing; with `hardware.async_save` it appears later."""
        self._own_weights("save")
        counts = {"step": step, "updates": self.updates, "broken_steps": self.broken_steps}
        meta = counts | {"model": dataclasses.asdict(self.config)}
        self.writer.save(Path(folder), training_state(self.trainer), meta)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is complete."""
        self.writer.finish()

    def load(self, folder: str) -> int:
        """Restore a training checkpoint, bit for bit in every layout; returns its step."""
        self._own_weights("load")
        self.writer.finish()
        state = training_state(self.trainer, loading=True)
        meta = checkpoint.load(Path(folder), state, dataclasses.asdict(self.config))
        self.updates = meta["updates"]
        self.broken_steps = meta.get("broken_steps", 0)
        return meta["step"]

    def export(self, folder: str) -> str:
        """Write a Hugging Face folder; returns its content sha256. What `precision_export` rounds is logged."""
        self._own_weights("export")
        settings, shas, rounded = self.settings, [], []

        def exported() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.weights():
                kind = dtypes.kind_of(name)
                if dtypes.narrower(dtypes.export_dtype(kind, settings.precision_export), convert.dtype_name(tensor)):
                    rounded.append(kind.name)
                yield name, tensor

        def write() -> None:
            shas.append(
                convert.save_folder(exported(), self.config, folder, settings.precision_export, settings.tokenizer)
            )

        fail_together(attempt(write, Path(folder), "the exported weights"))
        if rounded and torch.distributed.get_rank() == 0:
            LOG.info("precision_export: %s rounds %s", settings.precision_export, dtypes.summary(rounded))
        return gathered(shas[0], everyone=True)[0]

    def _read(self, folder: str) -> None:
        """Put the weights of a Hugging Face folder into the parameters."""
        convert.load_folder(self.model, folder)

    def _own_weights(self, action: str) -> None:
        """Refuse to train or store weights that are only borrowed."""
        if self.cache.borrowed:
            raise ValueError(f"{action} inside using({self.cache.borrowed!r}): these are not the policy's weights")

    def _training_batches(self, sequences: Sequence[TokenSequence], objective: Objective) -> tuple[Batch, ...]:
        """Micro-batches of this rank; for the exact or top-k reverse KL each has one teacher and what it says."""
        if not objective.needs_teacher_vocabulary:
            return tuple(self._moved(sequences))
        batches: list[Batch] = []
        named = {sequence.teacher for sequence in sequences}
        for teacher in sorted(set().union(*gathered(named))):
            if not teacher:
                raise ValueError("full_vocab distillation: a sequence names no teacher")
            moved = self._moved([sequence for sequence in sequences if sequence.teacher == teacher])
            self.model.eval()
            if objective.top_k:
                batches += self._with_top(moved, teacher, objective.top_k)
            else:
                batches += self._taught(moved, teacher)
        return tuple(batches)

    def _moved(self, sequences: Sequence[TokenSequence]) -> list[Batch]:
        """Micro-batches of these sequences on the policy's device, as many as any other rank has."""
        batches = self._even(pack(sequences, self.settings.micro_batch_tokens)).batches
        for batch in batches:
            check_replay(self.config, batch)
        return [on_device(batch, self.device) for batch in batches]

    def _taught(self, batches: Sequence[Batch], teacher: str) -> list[Batch]:
        """The batches with the teacher's log-probabilities [T, V]; without them but on the last pipeline stage."""
        with self.using(teacher):
            scores_B_TV = pipeline.evaluate(self.model, batches, self._vocabulary)
        return [
            dataclasses.replace(batch, teacher_logprobs_TV=scores_TV)
            for batch, scores_TV in itertools.zip_longest(batches, scores_B_TV)
        ]

    def _with_top(self, batches: Sequence[Batch], teacher: str, top_k: int) -> list[Batch]:
        """The batches with the policy's `top_k` likeliest tokens at each position and the teacher's log-probabilities.

        One more pass than the whole vocabulary needs, in exchange for holding K numbers a position instead of V.
        """
        if top_k > self.config.vocab_size:
            raise UserError(f"distill.top_k: {top_k} is more than the vocabulary's {self.config.vocab_size} tokens")
        tokens_B_TK = pipeline.evaluate(self.model, batches, lambda batch: self._vocabulary(batch).topk(top_k)[1])
        chosen = [
            dataclasses.replace(batch, top_tokens_TK=tokens_TK)
            for batch, tokens_TK in itertools.zip_longest(batches, tokens_B_TK)
        ]

        def teach(batch: Batch) -> torch.Tensor:
            assert batch.top_tokens_TK is not None, "only the last pipeline stage is asked, which has chosen them"
            return self._vocabulary(batch).gather(-1, batch.top_tokens_TK)

        with self.using(teacher):
            scores_B_TK = pipeline.evaluate(self.model, chosen, teach)
        return [
            dataclasses.replace(batch, teacher_logprobs_TK=scores_TK)
            for batch, scores_TK in itertools.zip_longest(chosen, scores_B_TK)
        ]

    def _even(self, packed: Packed) -> Packed:
        """With experts spread over ranks every rank must run as many forward passes as the busiest one."""
        if parallel_state.get_expert_model_parallel_world_size() == 1:
            return packed
        most = max(gathered(len(packed.batches), everyone=True))
        fillers = tuple(to_batch([FILLER]) for _ in range(most - len(packed.batches)))
        return Packed(packed.batches + fillers, packed.order)

    def _loss(
        self, batch: Batch, objective: Objective, denominators: dict[str, float]
    ) -> tuple[torch.Tensor, _Numbers]:
        """Loss and metrics of one micro-batch; on the last pipeline stage."""
        routing = replayed(self.model, batch)
        if objective.needs_logits:
            scores = self._vocabulary(batch, routing)
            entropy_T = -(scores.detach().exp() * scores.detach()).sum(dim=-1)
        else:
            scores, entropy_T = target_logprobs(self.model, batch, self.settings.distribution, False, routing)
        loss, parts = objective.loss(scores, batch, denominators)
        entropy = (entropy_T * batch.loss_mask_T).sum() / max(denominators.get("tokens", 1.0), 1.0)
        metrics = {**parts, "entropy": entropy}
        if routing is not None:
            metrics["routing_flips"], metrics["routing_choices"] = routing.difference()
        return loss, _Numbers.of(metrics, loss.device)

    def _vocabulary(self, batch: Batch, routing: Routing | None = None) -> torch.Tensor:
        """Log-probabilities [T, V] of the whole vocabulary; on the last pipeline stage."""
        return vocabulary_logprobs(self.model, batch, self.settings.distribution.temperature, routing)

    def _broken(self, metrics: dict[str, float], norm: float) -> bool:
        """Whether the loss or the gradient is no number, on any rank; UserError when that was so too often in a row."""
        finite = math.isfinite(metrics.get("loss", 0.0)) and math.isfinite(norm)
        if all(gathered(finite, everyone=True)):
            self.broken_steps = 0
            return False
        self.broken_steps += 1
        said = f"step {self.updates}: loss {metrics.get('loss', 0.0):.4g}, gradient norm {norm:.4g}"
        allowed = self.settings.optimizer.max_skipped_steps
        if self.broken_steps <= allowed:
            if torch.distributed.get_rank() == 0:
                LOG.warning("%s: skipped, nothing was updated (%d of %d in a row)", said, self.broken_steps, allowed)
            return True
        raise UserError(
            f"{said}: training has diverged. Nothing was updated; resume from the last checkpoint with a lower "
            "optimizer.lr, more optimizer.warmup_steps or a smaller optimizer.clip_grad, and look at the rewards and "
            "log-probabilities of this step"
        )
