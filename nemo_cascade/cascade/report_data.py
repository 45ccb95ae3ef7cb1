"""What the report shows, read from a cascade's folder: stages, ledger cells, recovery, teachers, gates, times.

Everything comes from files that stages leave (`artifacts`), so a report can be written while the cascade still runs,
after it failed, or on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder, read_json
from nemo_cascade.cascade.gates import GateResult, effective_source, read_gates, reference_of
from nemo_cascade.cascade.ledger import INIT, Ledger, read_ledger
from nemo_cascade.cascade.manifest import Entry, Manifest
from nemo_cascade.cascade.report_records import (
    Candidate,
    Cell,
    GateRow,
    RecoveryRow,
    ReportData,
    StageView,
    TeacherRow,
    Tile,
)
from nemo_cascade.cascade.status import state
from nemo_cascade.cascade.teachers import Choice, read_teachers
from nemo_cascade.config.schema import StageRun
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.evaluation.intervals import excludes_zero, recovery
from nemo_cascade.observe.metrics import SPANS
from nemo_cascade.observe.record import TIMING_FILE, read_metrics
from nemo_cascade.types import Interval

CURVE_POINTS = 200
CURVE_NAMES = (
    *("reward", "loss", "accuracy", "entropy", "length", "kl", "reverse_kl", "gap_abs", "grad_norm"),
    *("all_equal_share", "truncated_share", "invalid_share", "masked_share", "masked_sequence_share"),
    *("judge_matches_dropped", "clipped_share", "non_finite", "tokens_per_second", "lr"),
)


@dataclass(frozen=True)
class Stage:
    """One stage of the manifest with its folder; `run` is None until the stage was started."""

    entry: Entry
    folder: StageFolder
    run: StageRun | None
    start: str  # the ledger's name of the checkpoint it starts from, rollbacks followed


def find_stages(manifest: Manifest) -> dict[str, Stage]:
    """The stages of the cascade in the order they run, under the keys of its last run."""
    folders, sources = manifest.folders, manifest.sources
    stages = {}
    for entry in manifest.stages:
        folder = folders[entry.name]
        run = read_stage_run(folder.path) if folder.config.is_file() else None
        start = reference_of(entry.name, effective_source(entry.name, sources, folders))
        stages[entry.name] = Stage(entry, folder, run, start)
    return stages


def gather(manifest: Manifest) -> ReportData:
    """Read everything the report shows but the rollouts."""
    stages = find_stages(manifest)
    folders = {name: stage.folder for name, stage in stages.items()}
    ledger = read_ledger(folders)
    teachers = {name: read_teachers(folder) for name, folder in folders.items()}
    views = [view_of(stage) for stage in stages.values()]
    cells = cells_of(views, ledger)
    rows, overall = recovered(views, teachers, ledger)
    return ReportData(
        name=f"Cascade {manifest.cascade}",
        subtitle=subtitle(manifest, list(stages.values())),
        headline=headline(views, cells, overall),
        stages=views,
        domains=list(dict.fromkeys(cell.domain for cell in cells)),
        checkpoints=list(dict.fromkeys(cell.checkpoint for cell in cells)),
        cells=cells,
        recovery=rows,
        recovery_says=recovery_says(overall),
        teachers=[teacher_row(name, domain, choice) for name in teachers for domain, choice in teachers[name].items()],
    )


def subtitle(manifest: Manifest, stages: Sequence[Stage]) -> str:
    """What ran where, in one line."""
    words = [f"seed {manifest.seed}", Path(manifest.config).name, *manifest.overrides]
    run = next((stage.run for stage in stages if stage.run is not None), None)
    if run is not None:
        hardware = run.hardware
        words.append(f"{hardware.world_size} ranks ({hardware.name}, {hardware.precision}), sampler {hardware.sampler}")
    return " \u00b7 ".join(words)


def view_of(stage: Stage) -> StageView:
    """One stage as the report shows it."""
    folder, entry = stage.folder, stage.entry
    lines = read_metrics(folder.path)
    status = state(entry, folder)
    result = folder.result() if status == "done" else None
    spans = spans_of(folder, lines)
    # A stage that was killed and resumed took longer than its last process.
    seconds = max(result.seconds if result is not None else 0.0, sum(spans.values()))
    spans["other"] = spans.get("other", 0.0) + seconds - sum(spans.values())
    return StageView(
        name=entry.name,
        kind=entry.kind,
        status=status,
        parent="" if stage.start.endswith(f":{INIT}") else stage.start.partition("@")[0],
        reference=stage.start,
        folder=folder.path.name,
        sha256=result.sha256 if result is not None else "",
        num_steps=entry.num_steps,
        steps_done=len(lines),
        seconds=seconds,
        domains=list(entry.domains),
        gates=[gate_row(gate) for gate in read_gates(folder)],
        spans={name: round(spent, 3) for name, spent in spans.items()},
        curves=curves_of(lines),
        config=folder.config.read_text(encoding="utf-8") if stage.run is not None else "",
    )


def spans_of(folder: StageFolder, lines: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Seconds per part of the stage: timers of all steps, and what was timed outside steps.

    `seconds/training/forward` and the like are parts of a part, counted in it already.
    """
    spent: dict[str, float] = dict.fromkeys(SPANS, 0.0)
    outside = read_json(folder.path / TIMING_FILE) or {}
    timed = [item for line in lines for item in line.items() if item[0].startswith("seconds/")]
    for name, value in [*((name.partition("/")[2], value) for name, value in timed), *outside.items()]:
        if name != "total" and "/" not in name:
            shown = name if name in SPANS else "other"
            spent[shown] = spent.get(shown, 0.0) + (value or 0.0)
    return spent


def curves_of(lines: Sequence[Mapping[str, float | None]]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of the metrics worth a curve, at most CURVE_POINTS each; none for other metrics that stay 0."""
    names = [*CURVE_NAMES, *sorted({name for line in lines for name in line if name.startswith("reward/")})]
    curves = {}
    for name in names:
        points = [(float(line["step"] or 0), value) for line in lines if (value := line.get(name)) is not None]
        if points and (name in ("reward", "loss") or any(value != 0.0 for _, value in points)):
            curves[name] = thin(points)
    return curves


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that no more than CURVE_POINTS are left."""
    width = -(-len(points) // CURVE_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[0][0], float(f"{sum(value for _, value in group) / len(group):.5g}")) for group in groups]


def gate_row(gate: GateResult) -> GateRow:
    """A verdict in the report's words."""
    verdict = "passed" if gate.passed else f"failed: {gate.action}"
    if gate.gain is None:
        verdict = f"not measured: {gate.reference} has no select scores"
    rule = f"change at least {100 * gate.min_gain:+.1f}, else {gate.on_fail}"
    return GateRow(gate.domain, rule, gate.on_fail, gate.passed, verdict, gate.gain, gate.ci_low, gate.ci_high)


def teacher_row(stage: str, domain: str, choice: Choice) -> TeacherRow:
    """A teacher with the scores it was chosen for, best first."""
    ranked = sorted(choice.scores.items(), key=lambda item: -item[1].value)
    candidates = [Candidate(name, round(interval.value, 4)) for name, interval in ranked]
    return TeacherRow(stage, domain, choice.checkpoint, choice.reason, candidates)


def cells_of(views: Sequence[StageView], ledger: Ledger) -> list[Cell]:
    """The ledger's report split: checkpoints in the order of the cascade, each with its change against its start."""
    cells = []
    for view in views:
        mine = [name for name in ledger.scores if name.replace(":", "@").partition("@")[0] == view.name]
        for checkpoint in sorted(mine, key=rank_of):
            against = view.reference if not checkpoint.endswith(f":{INIT}") else ""
            for (domain, split, mode), tasks in ledger.scores[checkpoint].items():
                if split != "report" or not tasks:
                    continue
                score = ledger.score(checkpoint, domain, split, mode)
                assert score is not None
                gain = ledger.gain(checkpoint, against, domain, split, mode) if against else None
                cells.append(Cell(checkpoint, domain, mode, score.value, score.low, score.high, score.n, against, gain))
    return cells


def rank_of(checkpoint: str) -> float:
    """Order inside one stage: what it started from, its steps, its end."""
    step = checkpoint.partition("@")[2]
    if step:
        return float(step)
    return -1.0 if checkpoint.endswith(f":{INIT}") else float("inf")


def recovered(
    views: Sequence[StageView], teachers: Mapping[str, Mapping[str, Choice]], ledger: Ledger
) -> tuple[list[RecoveryRow], Interval | None]:
    """What the (last) distillation stage won back of its teachers' leads: a row per domain, and all together."""
    rows: list[RecoveryRow] = []
    overall = None
    for view in views:
        if not teachers[view.name] or view.status != "done":
            continue
        names = {domain: choice.checkpoint for domain, choice in teachers[view.name].items()}
        whole = ledger.recovery(view.reference, names, view.name)
        overall = whole.overall if whole is not None else None
        rows = [
            row for domain, teacher in names.items() if (row := recovery_row(view, domain, teacher, ledger)) is not None
        ]
    return rows, overall


def recovery_row(view: StageView, domain: str, teacher: str, ledger: Ledger) -> RecoveryRow | None:
    """One domain's recovery with its own interval."""
    triple = ledger.triple(view.reference, teacher, view.name, domain)
    if triple is None:
        return None
    best, before, after = (sum(scores) / len(scores) for scores in (triple.teacher, triple.student, triple.mopd))
    share = recovery([{domain: triple}]).overall
    if share is None:
        return RecoveryRow(domain, teacher, best, before, after)
    return RecoveryRow(domain, teacher, best, before, after, share.value, share.low, share.high)


def recovery_says(overall: Interval | None) -> str:
    """How to read the table."""
    rule = (
        "How much of each teacher's lead the distillation won back: (after - before) / (teacher - before) on report "
        "tasks. Domains whose teacher has no certain lead have nothing to recover."
    )
    if overall is None:
        return rule
    share = f"{100 * overall.value:.0f} % [{100 * overall.low:.0f}, {100 * overall.high:.0f}]"
    return f"{rule} All domains together: {share}."


def headline(views: Sequence[StageView], cells: Sequence[Cell], overall: Interval | None) -> list[Tile]:
    """The numbers at the top: from the first to the last checkpoint, what was lost on the way, what was recovered."""
    tiles = []
    last = next((view.name for view in reversed(views) if view.status == "done"), "")
    first = cells[0].checkpoint if cells else ""
    if last and first and last != first:
        start, end = mean_scores(cells, first, last)
        if start is not None and end is not None:
            note = f"{100 * start:.1f} % at {first}, now {last}"
            tiles.append(Tile("mean score, own mode", f"{100 * end:.1f} %", note))
    marked = [cell for cell in cells if cell.gain is not None and excludes_zero(cell.gain)]
    lost = [cell for cell in marked if cell.gain is not None and cell.gain.value < 0]
    if cells:
        counts = f"+{len(marked) - len(lost)} / \u2212{len(lost)}"
        tiles.append(Tile("changes beyond chance", counts, "cells gained / lost"))
    if overall is not None:
        interval = f"95 % interval {100 * overall.low:.0f} to {100 * overall.high:.0f}"
        tiles.append(Tile("recovered by distillation", f"{100 * overall.value:.0f} %", interval))
    return tiles


def mean_scores(cells: Sequence[Cell], first: str, last: str) -> tuple[float | None, float | None]:
    """Means over the domains that both checkpoints have, each in the mode with most tasks."""
    main: dict[str, tuple[int, str]] = {}
    for cell in cells:
        main[cell.domain] = max(main.get(cell.domain, (0, "")), (cell.n, cell.mode))
    own = [cell for cell in cells if cell.mode == main[cell.domain][1]]
    scores = {name: {cell.domain: cell.value for cell in own if cell.checkpoint == name} for name in (first, last)}
    shared = [domain for domain in scores[first] if domain in scores[last]]
    if not shared:
        return None, None
    start, end = (sum(scores[name][domain] for domain in shared) / len(shared) for name in (first, last))
    return start, end


def as_json(text: str) -> str:
    """JSON text that cannot end the script element it is written into."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def dumps(content: object) -> str:
    """Compact JSON for the page."""
    return as_json(json.dumps(content, separators=(",", ":"), allow_nan=False))
