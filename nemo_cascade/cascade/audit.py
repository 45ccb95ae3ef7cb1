"""Does every domain's reward hold? Gold cases must score 1, anti-gold cases and known hacks 0, before any GPU is
spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_cascade import domains
from nemo_cascade.types import Case, Invalid


@dataclass(frozen=True)
class Miss:
    """A case that got another reward than it must."""

    domain: str
    because: str
    wanted: float
    found: str


@dataclass(frozen=True)
class Audit:
    """One domain's tally: cases right of all, apart for gold, anti-gold and hacks."""

    domain: str
    gold: tuple[int, int]
    anti_gold: tuple[int, int]
    hacks: tuple[int, int]
    misses: tuple[Miss, ...]


def audit(names: Sequence[str] = ()) -> list[Audit]:
    """Score every case of the named domains (all built-in ones by default)."""
    services = domains.Services()
    try:
        return [_audit(name, services) for name in names or domains.available()]
    finally:
        services.close()


def _audit(name: str, services: domains.Services) -> Audit:
    domain = domains.load(name, services)
    tally = {"gold": [0, 0], "anti_gold": [0, 0], "hacks": [0, 0]}
    misses = []
    for case in domain.cases():
        outcome = domain.score(case.task, case.transcript)
        right = not isinstance(outcome, Invalid) and abs(outcome.reward - case.reward) < 1e-9
        counts = tally[_sort(case)]
        counts[0] += right
        counts[1] += 1
        if not right:
            found = (
                f"invalid ({outcome.reason})"
                if isinstance(outcome, Invalid)
                else f"{outcome.reward:g} ({outcome.reason})"
            )
            misses.append(Miss(name, case.because, case.reward, found))
    gold, anti_gold, hacks = ((right, total) for right, total in tally.values())
    return Audit(name, gold, anti_gold, hacks, tuple(misses))


def _sort(case: Case) -> str:
    if case.hack:
        return "hacks"
    return "gold" if case.reward > 0 else "anti_gold"


def table(audits: Sequence[Audit]) -> str:
    """One line per domain, then one per miss."""
    lines = [f"{'domain':24} {'gold':>9} {'anti-gold':>9} {'hacks':>9}"]
    for row in audits:
        cells = [f"{right}/{total}" for right, total in (row.gold, row.anti_gold, row.hacks)]
        lines.append(f"{row.domain:24} " + " ".join(f"{cell:>9}" for cell in cells))
    for row in audits:
        lines += [
            f"MISS {miss.domain}: {miss.because}: wanted {miss.wanted:g}, got {miss.found}" for miss in row.misses
        ]
    return "\n".join(lines)
