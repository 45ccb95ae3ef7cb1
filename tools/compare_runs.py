"""Two runs side by side: what each stage scored and took, and where their metrics begin to differ.

    python -m tools.compare_runs runs/nano other/nano

Scores are of `report` tasks in each domain's own mode; the difference B - A is paired over the tasks that both
answered, with a 95 % bootstrap over tasks, so it says nothing of other seeds (tools/cascade_seeds.py does). Runs of one
seed, code and machine agree in every metric but the clocks: the first step and metric that differ are named, which is
where to look when a refactoring was not one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import read_lines
from nemo_cascade.cascade.ledger import Ledger, read_ledger
from nemo_cascade.cascade.manifest import Manifest, read_manifest
from nemo_cascade.evaluation.intervals import excludes_zero, paired_difference
from nemo_cascade.types import UserError
from tools.stage_costs import Cost, cost_of

CLOCKS = ("seconds", "tokens_per_second")
"""Metrics whose names begin so are times: they always differ."""


@dataclass(frozen=True)
class Run:
    """One cascade's folder as a run left it."""

    manifest: Manifest
    ledger: Ledger

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The manifest and every score of a folder."""
        manifest = read_manifest(folder)
        return cls(manifest, read_ledger(manifest.folders))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The metrics of a stage, clocks left out."""
        rows = read_lines(self.manifest.folders[name].metrics)
        return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in rows]

    def key(self, name: str) -> str:
        """What the stage's outcome depends on."""
        return next(entry.key for entry in self.manifest.stages if entry.name == name)


def first_difference(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> str:
    """`step 3: loss 0.25 and 0.5 (2 more differ)`, in words also where a step or a metric is missing; "" for equal."""
    for ours, theirs in zip_longest(a, b):
        if ours is None or theirs is None:
            longer, shorter = ("B", len(a)) if ours is None else ("A", len(b))
            return f"equal over {shorter} steps, then only {longer} goes on"
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differing:
            key = differing[0]
            more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
            return f"step {ours.get('step')}: {key} {_value(ours, key)} and {_value(theirs, key)}{more}"
    return ""


def _value(line: dict[str, Any], key: str) -> str:
    return str(line[key]) if key in line else "absent"


def scores(a: Run, b: Run, name: str) -> list[str]:
    """One table row per domain that both evaluated after the stage."""
    rows = []
    for domain in a.ledger.domains(name):
        ours, theirs = a.ledger.tasks(name, domain, "report"), b.ledger.tasks(name, domain, "report")
        shared = [task for task in ours if task in theirs]
        if not shared:
            continue
        before, after = [ours[task] for task in shared], [theirs[task] for task in shared]
        change = paired_difference(after, before)
        cells = [name, domain, f"{_percent(before):.1f}", f"{_percent(after):.1f}", f"{100 * change.value:+.1f}"]
        cells += [f"{100 * change.low:+.1f} to {100 * change.high:+.1f}", "yes" if excludes_zero(change) else "no"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def took(a: Run, b: Run, name: str) -> str:
    """One table row: steps, tokens and seconds of both, and where their metrics part."""
    costs = [cost_of(run.manifest.folders[name]) for run in (a, b)]
    cells = [name, "same" if a.key(name) == b.key(name) else "other"]
    cells += [_pair(costs, what) for what in ("steps", "rollouts", "sampled", "trained", "seconds")]
    cells.append(first_difference(a.lines(name), b.lines(name)) or "equal")
    return f"| {' | '.join(cells)} |"


def _pair(costs: Sequence[Cost], what: str) -> str:
    values = [getattr(cost, what) for cost in costs]
    return f"{values[0]:,.0f}, {values[1]:,.0f}"


def page(a: Run, b: Run) -> str:
    """Both tables, and the stages that only one run has."""
    names = [name for name in a.manifest.folders if name in b.manifest.folders]
    if not names:
        raise UserError(f"{a.manifest.path} and {b.manifest.path} have no stage of one name")
    text = [
        f"A: {a.manifest.path} (seed {a.manifest.seed})  \nB: {b.manifest.path} (seed {b.manifest.seed})", "",
        "| stage | key | steps | rollouts | sampled tokens | trained tokens | seconds in steps | metrics |",
        "|---|---|---|---|---|---|---|---|", *(took(a, b, name) for name in names), "",
        "| stage | domain | A | B | B - A | interval | shows |", "|---|---|---|---|---|---|---|",
        *(row for name in names for row in scores(a, b, name)),
    ]  # fmt: skip
    for label, one, other in (("A", a, b), ("B", b, a)):
        alone = [name for name in one.manifest.folders if name not in other.manifest.folders]
        if alone:
            text += ["", f"Only in {label}: {', '.join(alone)}."]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison. The exit status is 0 also where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="the folder of a cascade that was run, for example runs/nano")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    given = parser.parse_args(arguments)
    try:
        print(page(Run.read(given.a), Run.read(given.b)), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
