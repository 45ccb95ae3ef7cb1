"""What the first step of a stage that samples must show before another one is worth its price.

A wrong refit, a forgotten temperature or a template that differs between Sampler and Learner costs nothing but a
number here, and a whole run if nobody looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_cascade.config.schema import HardwareConfig, RolloutStage
from nemo_cascade.types import UserError

EXACT, ROUNDED = 1.0e-3, 0.05  # nats: one fp32 model on both sides; two engines, or a rounded precision
SHOWN = ("ratio", "gap_abs", "gap_abs_max", "kl", "reverse_kl", "all_equal_share", "truncated_share")
IDLE, CUT = 0.9, 0.5  # shares of all-equal groups and of truncated rollouts beyond which a warning is due


@dataclass(frozen=True)
class FirstStep:
    """The bounds of one stage. `max_gap`: mean |log p(learner) - log p(sampler)| in nats, of the ratio's distance from
    1 and, at step 0, where the policy still is its reference, of the KL. None: nothing to hold, the rollouts are old.
    """

    max_gap: float | None
    grouped: bool = True  # more than one rollout per prompt, so that equal rewards say something

    @classmethod
    def of(cls, config: RolloutStage, hardware: HardwareConfig) -> FirstStep:
        """The bounds of a stage file: `max_gap`, or what the precision and the Sampler allow."""
        exact = hardware.precision == "fp32" and hardware.sampler == "local"
        bound = config.max_gap if config.max_gap is not None else EXACT if exact else ROUNDED
        return cls(bound if config.mode == "on_policy" else None, config.group_size > 1)

    def sentence(self, line: Mapping[str, float], checksum: str) -> str:
        """One line for the log: what was measured, the weights that the Sampler held, and what to look at."""
        shown = [name for name in SHOWN if name in line and (self.grouped or name != "all_equal_share")]
        parts = [f"{name} {line[name]:.4g}" for name in shown]
        if checksum:
            parts.append(f"refit {checksum[:12]}")
        if self.grouped and line.get("all_equal_share", 0.0) > IDLE:
            parts.append("WARNING: hardly a group disagrees, so there is hardly anything to learn")
        if line.get("truncated_share", 0.0) > CUT:
            parts.append("WARNING: most answers are cut off, raise sampling.max_new_tokens")
        return ", ".join(parts)

    def check(self, stage: str, line: Mapping[str, float]) -> None:
        """Refuse to go on when Sampler and Learner do not mean the same distribution."""
        if self.max_gap is None:
            return
        measured = {"gap_abs": line.get("gap_abs", 0.0), "ratio": abs(line.get("ratio", 1.0) - 1.0)}
        if line["step"] == 0:
            measured["kl"] = abs(line.get("kl", 0.0))
        for name, value in measured.items():
            if not value <= self.max_gap:  # a NaN is refused too
                raise UserError(
                    f"{stage}: in its first step {name} is {line[name]:.3g}, off by more than max_gap "
                    f"{self.max_gap:g}: Sampler and Learner do not compute the same distribution; check "
                    "sampling.temperature and top_p, the refit, the chat template and the precision, or raise max_gap"
                )
