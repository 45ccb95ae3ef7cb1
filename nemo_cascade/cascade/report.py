"""The report: one HTML file that opens anywhere, without a network, with what was gained, lost and recovered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_cascade.cascade.manifest import Manifest, read_manifest
from nemo_cascade.cascade.report_data import dumps, find_stages, gather
from nemo_cascade.cascade.report_records import ReportData
from nemo_cascade.cascade.report_rollouts import rollouts_of
from nemo_cascade.config.paths import write_atomic

REPORT = "report.html"
ROLLOUT_BYTES = 3_200_000  # of all stages together: the file stays below 5 MB, small enough to be sent by mail
HERE = Path(__file__).resolve().parent
SCRIPTS = ("report.js", "report_figures.js", "report_rollouts.js")


def write_report(cascade_folder: Path) -> Path:
    """Write `report.html` into a cascade's folder and return its path. Works on finished and on running cascades."""
    manifest = read_manifest(cascade_folder)
    data = with_rollouts(gather(manifest), manifest)
    page = (HERE / "report.html").read_text(encoding="utf-8")
    parts = {
        "{{title}}": f"{data.name}: report",
        "{{css}}": (HERE / "report.css").read_text(encoding="utf-8"),
        "{{js}}": "\n".join((HERE / script).read_text(encoding="utf-8") for script in SCRIPTS),
        "{{data}}": dumps(dataclasses.asdict(data)),  # last: the data may hold any text, also these marks
    }
    for mark, text in parts.items():
        page = page.replace(mark, text, 1)
    path = cascade_folder / REPORT
    write_atomic(path, page)
    return path


def with_rollouts(data: ReportData, manifest: Manifest) -> ReportData:
    """The same report with rollouts to read; stages that sampled share the budget."""
    stages = find_stages(manifest)
    sampled = {
        name: (stage.folder.path, Path(stage.run.tokenizer))
        for name, stage in stages.items()
        if stage.run is not None and (stage.folder.path / "rollouts").is_dir()
    }
    views = []
    for view in data.stages:
        if view.name in sampled:
            folder, tokenizer = sampled[view.name]
            view = dataclasses.replace(view, rollouts=rollouts_of(folder, tokenizer, ROLLOUT_BYTES // len(sampled)))
        views.append(view)
    return dataclasses.replace(data, stages=views)
