"""Where a cascade stands: each stage with what it gained, from files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.gates import effective_source, read_gates, reference_of
from nemo_cascade.cascade.ledger import INIT, Ledger, checkpoint_name, read_ledger
from nemo_cascade.cascade.lock import holder
from nemo_cascade.cascade.manifest import Entry, Manifest, read_manifest
from nemo_cascade.cascade.teachers import read_teachers
from nemo_cascade.types import Interval


def state(entry: Entry, folder: StageFolder) -> str:
    """done | running | failed | pending; a stage that was killed is pending: the next run goes on from its
    checkpoint.
    """
    if entry.key and folder.is_done(entry.key):
        return "done"
    if holder(folder.lock) is not None:
        return "running"
    return "failed" if folder.failed.is_file() else "pending"


def ledger_of(manifest: Manifest) -> Ledger:
    """The ledger of the stages that are done."""
    folders = manifest.folders
    return read_ledger(
        {entry.name: folders[entry.name] for entry in manifest.stages if state(entry, folders[entry.name]) == "done"}
    )


def status(where: Path | Manifest) -> dict[str, Any]:
    """The whole state as plain JSON: scores and gains are on `report` tasks, in each domain's own mode.

    Gains are paired over tasks against the checkpoint that the stage started from; seconds are those of training and
    evaluation, added over stages.
    """
    manifest = read_manifest(where) if isinstance(where, Path) else where
    ledger = ledger_of(manifest)
    stages = [_stage(entry, manifest, ledger) for entry in manifest.stages]
    gates = [_gate(result) for folder in manifest.folders.values() for result in read_gates(folder)]
    return {
        "cascade": manifest.cascade,
        "seconds": sum(row["seconds"] for row in stages),
        "stages": stages,
        "gates": gates,
    }


def _stage(entry: Entry, manifest: Manifest, ledger: Ledger) -> dict[str, Any]:
    folders = manifest.folders
    folder = folders[entry.name]
    now = state(entry, folder)
    result = folder.result() if now == "done" else None
    start = reference_of(entry.name, effective_source(entry.name, manifest.sources, folders))
    scores: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for domain in ledger.domains(entry.name):
        score, gain = ledger.score(entry.name, domain), ledger.gain(entry.name, start, domain)
        if score is not None:
            scores[domain] = {"score": score.value, "ci_low": score.low, "ci_high": score.high, "n": score.n}
        if gain is not None:
            gains[domain] = {"difference": gain.value, "ci_low": gain.low, "ci_high": gain.high}
    choices = read_teachers(folder)
    teachers = {domain: choice.checkpoint for domain, choice in choices.items()}
    return {
        "name": entry.name,
        "kind": entry.kind,
        "init": entry.init,
        "domains": list(entry.domains),
        "status": now,
        "seconds": result.seconds if result else 0.0,
        "checkpoint": str(folder.path / result.checkpoint) if result else None,
        "sha256": result.sha256 if result else None,
        "scores": scores,
        "gains": gains,
        "teachers": teachers,
        "recovery": _recovery(ledger, start, teachers, entry.name) if result and teachers else None,
    }


def _recovery(ledger: Ledger, student: str, teachers: Mapping[str, str], distilled: str) -> dict[str, Any] | None:
    found = ledger.recovery(student, teachers, distilled)
    if found is None:
        return None
    return {"overall": _ci(found.overall), "domains": dict(found.domains)}


def _ci(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def _gate(result: Any) -> dict[str, Any]:
    return dict(vars(result))


COLUMN = 11


def _wrapped(domain: str) -> tuple[str, ...]:
    """A domain's name over as many lines as it takes to stay narrow: instruction / following. One of the user's own is
    shown by its class.
    """
    lines: list[str] = []
    for word in domain.rpartition(":")[2].split("_"):
        if lines and len(lines[-1]) + 1 + len(word) <= COLUMN:
            lines[-1] += f"_{word}"
        else:
            lines.append(word)
    return tuple(lines)


def table(content: Mapping[str, Any]) -> str:
    """Stage x domain: report means in percent, `*` where the gain's interval excludes 0, and the state of each
    stage.
    """
    domains = list(dict.fromkeys(domain for row in content["stages"] for domain in row["scores"]))
    wrapped = [_wrapped(domain) for domain in domains]
    width = max([COLUMN, *(len(part) for parts in wrapped for part in parts)])
    height = max([1, *map(len, wrapped)])
    lines = []
    for level in range(height):
        fixed = f"{'stage':20} {'state':8} {'seconds':>8} " if level == height - 1 else " " * 39
        parts = [("",) * (height - len(words)) + words for words in wrapped]
        lines.append((fixed + " ".join(f"{words[level]:>{width}}" for words in parts)).rstrip())
    for row in content["stages"]:
        cells = [_cell(row, domain) for domain in domains]
        fixed = f"{row['name']:20} {row['status']:8} {row['seconds']:>8.0f} "
        lines.append(fixed + " ".join(f"{cell:>{width}}" for cell in cells))
    if domains:
        lines.append(
            "report tasks, percent; + or - : the gain over the stage's start excludes 0 (95 % paired bootstrap)"
        )
    for row in content["stages"]:
        recovered = (row["recovery"] or {}).get("overall")
        if recovered:
            lines.append(
                f"{row['name']}: recovered {recovered['value']:.2f} of the teachers' lead "
                f"[{recovered['ci_low']:.2f}, {recovered['ci_high']:.2f}]"
            )
    return "\n".join(lines)


def markdown(where: Path | Manifest) -> str:
    """The table for a README: weights that no stage made first, then every stage; bold is what a stage trains.

    A sentence where no stage has a score: none is done, or none under the config as it now is.
    """
    manifest = read_manifest(where) if isinstance(where, Path) else where
    ledger, rows = ledger_of(manifest), status(manifest)["stages"]
    domains = list(dict.fromkeys(domain for row in rows for domain in row["scores"]))
    if not domains:
        done = sum(row["status"] == "done" for row in rows)
        return (
            f"No scores to show: {done} of {len(rows)} stages of {manifest.cascade} are done in {manifest.path} under "
            "this config, and none has `report` scores."
        )
    lines = [f"| after | {' | '.join(name.replace('_', ' ') for name in domains)} |", "|---" * (1 + len(domains)) + "|"]
    for row in rows:
        start = checkpoint_name(row["name"], INIT)
        if ledger.domains(start):
            found = [ledger.score(start, domain) for domain in domains]
            scores = ["" if score is None else f"{100 * score.value:.0f}" for score in found]
            lines.append(f"| start of `{row['name']}` | {' | '.join(scores)} |")
        cells = [_marked(row, domain) if domain in row["scores"] else "" for domain in domains]
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _marked(row: Mapping[str, Any], domain: str) -> str:
    """A score in percent, an arrow where the gain's interval excludes 0, bold where the stage trains the domain."""
    arrow = {"+": " \u25b2", "-": " \u25bc"}.get(_cell(row, domain)[-1], "")
    text = f"{100 * row['scores'][domain]['score']:.0f}{arrow}"
    return f"**{text}**" if domain in row["domains"] and row["kind"] == "grpo" else text


def _cell(row: Mapping[str, Any], domain: str) -> str:
    if domain not in row["scores"]:
        return ""
    mark = " "
    gain = row["gains"].get(domain)
    if gain is not None and (gain["ci_low"] > 0 or gain["ci_high"] < 0):
        mark = "+" if gain["difference"] > 0 else "-"
    return f"{100 * row['scores'][domain]['score']:.1f}{mark}"
