"""What the cascade does over several training seeds: gain per stage, recovery by distillation, and what does not show.

    python -m tools.cascade_seeds --seeds 1 2 3 --out runs/seeds.md            runs nano once per seed, then reads them
    python -m tools.cascade_seeds --seeds 1 2 3 --out runs/seeds.md --no-run   reads runs/seed-N/nano as they are

A run that is done is not run again. All numbers are of `report` tasks, in each domain's own mode; intervals are 95 %
bootstraps that draw seeds as well as tasks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.ledger import Ledger, read_ledger
from nemo_cascade.cascade.manifest import Entry, read_manifest
from nemo_cascade.cascade.report_data import Stage, find_stages
from nemo_cascade.cascade.runner import Options, StageFailed, run
from nemo_cascade.cascade.teachers import read_teachers
from nemo_cascade.config.load import load_cascade
from nemo_cascade.evaluation.intervals import Recovery, Triple, difference_over_runs, excludes_zero, recovery
from nemo_cascade.types import Interval, UserError

OTHERS = "the others"


@dataclass(frozen=True)
class SeedRun:
    """One finished cascade: its seed, its stages and every score."""

    seed: int
    stages: Mapping[str, Stage]
    ledger: Ledger

    def entry(self, name: str) -> Entry:
        """A stage of the manifest."""
        return self.stages[name].entry

    def done(self, name: str) -> bool:
        """The stage finished in this run."""
        return self.stages[name].folder.is_done(self.entry(name).key)

    def change(self, name: str, domain: str) -> tuple[list[float], list[float]]:
        """Scores before and after a stage on the report tasks that both checkpoints answered."""
        before = self.ledger.tasks(self.stages[name].start, domain, "report")
        after = self.ledger.tasks(name, domain, "report")
        shared = [task for task in after if task in before]
        return [before[task] for task in shared], [after[task] for task in shared]


@dataclass(frozen=True)
class Effect:
    """What one stage did to one domain, or to several on average. Scores are means over seeds and domains."""

    stage: str
    what: str
    before: float
    after: float
    gain: Interval
    per_seed: tuple[float, ...]

    @property
    def shows(self) -> bool:
        """The interval leaves out 0."""
        return excludes_zero(self.gain)


def read_run(folder: Path) -> SeedRun:
    """A cascade's folder as a run left it."""
    manifest = read_manifest(folder)
    return SeedRun(manifest.seed, find_stages(manifest), read_ledger(manifest.folders))


def finished(runs: Sequence[SeedRun]) -> tuple[list[str], list[str]]:
    """(stages done in every run, a line for each that is not)."""
    first = list(runs[0].stages)
    for item in runs[1:]:
        if list(item.stages) != first:
            raise UserError(f"seed {item.seed} has other stages than seed {runs[0].seed}: run both from the same files")
    missing = {name: [item.seed for item in runs if not item.done(name)] for name in first}
    lines = [f"{name} is not done with seed {', '.join(map(str, seeds))}" for name, seeds in missing.items() if seeds]
    return [name for name in first if not missing[name]], lines


def effects(runs: Sequence[SeedRun], name: str) -> list[Effect]:
    """A stage's own domains one by one, all of them together, and what happened to the others."""
    evaluated = [
        domain for domain in runs[0].ledger.domains(name) if all(item.change(name, domain)[1] for item in runs)
    ]
    trained = set(runs[0].entry(name).domains)
    own = [domain for domain in evaluated if domain in trained]
    others = [domain for domain in evaluated if domain not in trained]
    found = [_effect(runs, name, domain, [domain]) for domain in own]
    if len(own) > 1:
        found.append(_effect(runs, name, f"all {len(own)} it trains", own))
    if others:
        found.append(_effect(runs, name, f"{OTHERS} ({len(others)})", others))
    return found


def _effect(runs: Sequence[SeedRun], name: str, what: str, domains: Sequence[str]) -> Effect:
    changes: list[dict[str, list[float]]] = []
    before, after = 0.0, 0.0
    for item in runs:
        pairs = {domain: item.change(name, domain) for domain in domains}
        changes.append({domain: [b - a for a, b in zip(*pair, strict=True)] for domain, pair in pairs.items()})
        before += sum(_mean(pair[0]) for pair in pairs.values()) / len(domains) / len(runs)
        after += sum(_mean(pair[1]) for pair in pairs.values()) / len(domains) / len(runs)
    per_seed = tuple(sum(_mean(values) for values in table.values()) / len(domains) for table in changes)
    return Effect(name, what, before, after, difference_over_runs(changes), per_seed)


def recovered(runs: Sequence[SeedRun], name: str) -> Recovery | None:
    """What a distillation won back of its teachers' leads, each seed with the teachers it chose; None without any."""
    tables: list[dict[str, Triple]] = []
    for item in runs:
        teachers = {domain: choice.checkpoint for domain, choice in read_teachers(item.stages[name].folder).items()}
        start = item.stages[name].start
        triples = {domain: item.ledger.triple(start, teacher, name, domain) for domain, teacher in teachers.items()}
        tables.append({domain: triple for domain, triple in triples.items() if triple is not None})
    return recovery(tables) if all(tables) else None


def page(runs: Sequence[SeedRun]) -> str:
    """The Markdown table, what distillation recovered, and in words what does not show."""
    names, missing = finished(runs)
    found = [effect for name in names for effect in effects(runs, name)]
    seeds = ", ".join(str(item.seed) for item in runs)
    text = [
        f"# The cascade over {'seed' if len(runs) == 1 else 'seeds'} {seeds}",
        "",
        "Scores in % of `report` tasks, own mode, mean over seeds; gain in points against the checkpoint the stage "
        "started from, with a 95 % bootstrap interval that draws seeds as well as tasks.",
    ]
    if len(runs) == 1:
        text.append("One seed: the intervals draw tasks only and say nothing of other seeds.")
    text += [
        "",
        "| stage | domain | before | after | gain | interval | per seed | shows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    text += [_row(effect) for effect in found]
    text += ["", *_recovery_text(runs, names), *_silent(found), *(f"Not here: {line}." for line in missing)]
    return "\n".join(text) + "\n"


def _row(effect: Effect) -> str:
    each = " ".join(f"{100 * value:+.1f}" for value in effect.per_seed)
    gain = effect.gain
    numbers = [f"{100 * effect.before:.1f}", f"{100 * effect.after:.1f}", f"{100 * gain.value:+.1f}"]
    interval = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    cells = [effect.stage, effect.what, *numbers, interval, each, "yes" if effect.shows else "no"]
    return f"| {' | '.join(cells)} |"


def _recovery_text(runs: Sequence[SeedRun], names: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for name in (name for name in names if runs[0].entry(name).kind == "mopd"):
        found = recovered(runs, name)
        if found is None or found.overall is None:
            lines.append(f"Recovery by {name}: nothing to win back, no teacher has a lead whose interval is above 0.")
        else:
            overall = found.overall
            each = ", ".join(f"{domain} {100 * share:.0f} %" for domain, share in found.domains.items())
            lines.append(
                f"Recovery by {name}: {100 * overall.value:.0f} % of the teachers' lead "
                f"[{100 * overall.low:.0f}, {100 * overall.high:.0f}], over the domains with one ({each})."
            )
        lines += [_taught(item, name) for item in runs]
        level = [domain for domain in (found.gaps if found else {}) if domain not in found.domains]
        if level:
            lines.append(f"\nNo certain lead of a teacher, so nothing to win back: {', '.join(level)}.")
    return [*lines, ""] if lines else []


def _taught(run: SeedRun, name: str) -> str:
    """Who taught what in one run."""
    by_teacher: dict[str, list[str]] = {}
    for domain, choice in read_teachers(run.stages[name].folder).items():
        by_teacher.setdefault(choice.checkpoint, []).append(domain)
    each = "; ".join(f"{teacher} ({', '.join(domains)})" for teacher, domains in sorted(by_teacher.items()))
    return f"\nTeachers of {name} with seed {run.seed}: {each}."


def _silent(found: Sequence[Effect]) -> list[str]:
    """The effects whose interval holds 0, so that nobody has to search the table for them."""
    gains = [f"{effect.stage} on {effect.what}" for effect in found if not effect.shows]
    harm = [
        f"{effect.stage} on {effect.what} ({100 * effect.gain.value:+.1f})"
        for effect in found
        if effect.shows and effect.gain.value < 0
    ]
    return [
        f"Does not show (the interval holds 0): {'; '.join(gains) or 'nothing; every effect above shows'}.",
        f"Certain losses: {'; '.join(harm) or 'none'}.",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, read all seeds, print and write the table."""
    parser = argparse.ArgumentParser(description="The cascade over several training seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--cascade", default="nano", help="name or file of the cascade")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="the runs lie in OUTPUT/seed-N")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--no-run", action="store_true", help="read the runs as they are")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    given = parser.parse_args(arguments)
    try:
        runs = []
        for seed in given.seeds:
            loaded = load_cascade(
                given.cascade, [*given.set, f"seed={seed}", f"output={given.output / f'seed-{seed}'}"]
            )
            if not given.no_run:
                print(f"seed {seed}", flush=True)
                run(loaded, Options(), lambda line: print(line, flush=True))
            runs.append(read_run(loaded.folder))
        text = page(runs)
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
