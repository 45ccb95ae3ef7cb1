"""Gates: does a finished stage keep what it must keep? Decided on `select` tasks, never on the ones the report
shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder, read_json
from nemo_cascade.cascade.graph import Source
from nemo_cascade.cascade.ledger import INIT, Ledger
from nemo_cascade.config.schema import GateConfig, StageBase


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict. `gain` is paired over select tasks; None where the start was never evaluated (then it
    passes).

    `action` is what follows: `none`, `warn`, `stop` or `rollback`.
    """

    stage: str
    domain: str
    min_gain: float
    on_fail: str
    passed: bool
    action: str
    gain: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0
    reference: str = ""

    def sentence(self) -> str:
        """The verdict as one line for the terminal."""
        if self.gain is None:
            return f"gate {self.domain}: not measured, {self.reference} has no select scores"
        verdict = "passed" if self.passed else f"FAILED ({self.action})"
        return (
            f"gate {self.domain}: {verdict}, gain {self.gain:+.3f} [{self.ci_low:+.3f}, {self.ci_high:+.3f}] against "
            f"{self.reference}, at least {self.min_gain:+.3f} wanted"
        )


def evaluate(stage: str, config: StageBase, reference: str, ledger: Ledger) -> list[GateResult]:
    """Every gate of a finished stage. One fails when the gain and the whole interval lie below `min_gain`.

    So a loss that could be chance passes, and the verdict does not flip with the seed.
    """
    return [_judge(stage, gate, reference, ledger) for gate in config.gates]


def _judge(stage: str, gate: GateConfig, reference: str, ledger: Ledger) -> GateResult:
    gain = ledger.gain(stage, reference, gate.domain, "select")
    if gain is None:
        return GateResult(stage, gate.domain, gate.min_gain, gate.on_fail, True, "none", reference=reference)
    passed = gain.high >= gate.min_gain
    action = "none" if passed else gate.on_fail
    return GateResult(
        stage,
        gate.domain,
        gate.min_gain,
        gate.on_fail,
        passed,
        action,
        gain.value,
        gain.low,
        gain.high,
        gain.n,
        reference,
    )


def to_json(results: list[GateResult]) -> list[dict[str, Any]]:
    """The content of gates.json."""
    return [asdict(result) for result in results]


def read_gates(folder: StageFolder) -> list[GateResult]:
    """What a finished stage's gates decided; empty where it has none or is not done."""
    return [GateResult(**row) for row in read_json(folder.gates) or []]


def rolled_back(folder: StageFolder) -> bool:
    """Whether the stage's children must start from its own init."""
    return any(result.action == "rollback" for result in read_gates(folder))


def effective_source(name: str, sources: Mapping[str, Source], folders: Mapping[str, StageFolder]) -> Source:
    """Where a stage really starts: its init, or, where a gate rolled that stage back, what it started from itself."""
    source = sources[name]
    while source.kind == "stage" and rolled_back(folders[source.stage]):
        source = sources[source.stage]
    return source


def reference_of(name: str, source: Source) -> str:
    """The ledger's name of the checkpoint a stage started from."""
    return source.checkpoint if source.kind == "stage" else f"{name}:{INIT}"
