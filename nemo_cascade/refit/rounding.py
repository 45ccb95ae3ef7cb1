"""No refit rounds in silence: which weights an engine holds in fewer bits than it was sent, and whether it may."""

from __future__ import annotations

import logging

import torch

from nemo_cascade.models.dtypes import ENGINES, FP32, KINDS, engine_dtype, kind_of, summary
from nemo_cascade.types import UserError

LOG = logging.getLogger(__name__)


class Rounding:
    """Looks at every weight of one refit. Only values that change count: a bf16 weight in an fp32 file loses nothing.

    A kind that the table of models/dtypes.py lets the engine round is reported once, at the first refit; any other is
    an error, because the Sampler would draw from a policy that the Learner does not have.
    """

    def __init__(self, engine: str) -> None:
        if engine not in ENGINES:
            raise UserError(f"refit: the sampler's engine {engine!r} is not one of {', '.join(ENGINES)}")
        self.engine = engine
        self.rounded: list[str] = []

    @property
    def possible(self) -> bool:
        """Whether the engine holds anything in less than fp32."""
        return any(engine_dtype(kind, self.engine) != FP32 for kind in KINDS)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count one weight, or refuse the refit."""
        kind = kind_of(name)
        held = getattr(torch, engine_dtype(kind, self.engine))
        if torch.finfo(held).bits >= torch.finfo(tensor.dtype).bits:
            return
        if torch.equal(tensor.to(held).to(tensor.dtype), tensor):
            return
        if self.engine not in kind.rounded_by:
            raise UserError(
                f"refit: engine {self.engine} holds {name} in {engine_dtype(kind, self.engine)}, which would round "
                "what the Learner holds; set hardware.precision: bf16, or hardware.sampler: local"
            )
        self.rounded.append(kind.name)

    def report(self, version: int) -> None:
        """Say what the engine rounds, before the first rollouts."""
        if self.rounded and version == 0:
            LOG.info("refit: engine %s rounds to bfloat16: %s", self.engine, summary(self.rounded))
