"""The report of a cascade: what its numbers are, and that the page works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemo_cascade.cascade.manifest import read_manifest
from nemo_cascade.cascade.report import REPORT, write_report
from nemo_cascade.cascade.report_data import dumps, gather, thin
from nemo_cascade.cascade.report_records import ReportData
from nemo_cascade.cascade.report_rollouts import pick_steps, runs
from tests.unit.cascade.finished_cascade import HOSTILE, write_cascade

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()
LISTEN = "<script>window.faults = []; addEventListener('error', (event) => faults.push(event.message));</script>"
DRIVE = """<script>
const seen = {};
const one = (query) => document.querySelector(query);
const over = (node, type) => node.dispatchEvent(new MouseEvent(type, { bubbles: true, clientX: 300, clientY: 200 }));
over(one(".tok"), "mouseenter"); over(one(".tok"), "mousemove");
seen.tip = one("#tip").hidden ? "" : one("#tip").innerText;
over(one(".tok"), "mouseleave");
seen.tipGone = one("#tip").hidden;
over(one("td[data-checkpoint='if_rl'][data-domain='preference']"), "mouseenter");
seen.cell = one("#tip").innerText;
seen.first = one("#position").textContent;
one("#next").click();
seen.second = one("#position").textContent;
one("#reader").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
seen.step = one("select[aria-label=step]").value;
one("#rollouts button[data-key=invalid]").click();
seen.invalid = one(".facts .reward").textContent;
one("#rollouts button[data-key=all]").click();
seen.hostile = document.querySelectorAll(".tokens b").length;
const before = one("#theme") && document.documentElement.dataset.theme;
one("#theme").click();
seen.theme = before !== document.documentElement.dataset.theme;
one("#ledger button[data-key=change]").click();
seen.change = one("td[data-checkpoint='if_rl'][data-domain='preference'] .v").textContent;
one("#curves button[data-key=sft]").click();
seen.charts = [...document.querySelectorAll("#curves .name")].map((node) => node.firstChild.textContent);
seen.configs = document.querySelectorAll("#configs details").length;
seen.faults = faults;
const told = Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) });
document.body.replaceChildren(told);
</script>"""


MEASURE = """<script>
setTimeout(() => {
  const box = document.querySelector("#graph"), right = box.getBoundingClientRect().right;
  const nodes = [...box.querySelectorAll(".node")].map((node) => node.getBoundingClientRect());
  const seen = { faults, nodes: nodes.length, scrolls: box.scrollWidth > box.clientWidth,
    cut: nodes.filter((node) => node.right > right).length, tops: new Set(nodes.map((node) => node.top)).size };
  document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
}, 300);
</script>"""  # noqa: E501


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("runs") / "nano")


@pytest.fixture(scope="module")
def data(cascade: Path) -> ReportData:
    return gather(read_manifest(cascade))


def test_cells_hold_the_ledger_s_report_split(data: ReportData) -> None:
    cell = next(c for c in data.cells if (c.checkpoint, c.domain, c.mode) == ("if_rl", "preference", "thinking"))
    assert cell.n == 160 and cell.low < cell.value < cell.high
    assert cell.against == "sft" and cell.gain is not None and cell.gain.high < 0  # IF-RL cost preference its score
    start = next(c for c in data.cells if c.checkpoint == "sft:init")
    assert start.against == "" and start.gain is None
    assert data.checkpoints == ["sft:init", "sft", "rlhf_teacher", "if_rl", "multi_domain_rl", "mopd", "code_rl"]
    assert {c.mode for c in data.cells} == {"thinking", "instruct"}


def test_recovery_teachers_and_gates(data: ReportData) -> None:
    rows = {row.domain: row for row in data.recovery}
    share = rows["preference"].value
    assert share == pytest.approx(
        (rows["preference"].after - rows["preference"].before) / (rows["preference"].best - rows["preference"].before)
    )
    assert rows["math"].value is None  # its teacher is the student itself
    taught = {row.domain: (row.teacher, row.why) for row in data.teachers}
    assert taught["math"] == ("multi_domain_rl", "pinned in teachers.pin")
    gates = next(stage.gates for stage in data.stages if stage.name == "multi_domain_rl")
    assert [(gate.passed, gate.verdict) for gate in gates] == [(False, "failed: warn"), (True, "passed")]
    assert [tile.label for tile in data.headline][-1] == "recovered by distillation"


def test_time_is_split_and_adds_up(data: ReportData) -> None:
    stage = next(stage for stage in data.stages if stage.name == "if_rl")
    assert stage.spans["sampling"] == pytest.approx(60 * 1.4) and stage.spans["training"] == pytest.approx(60 * 0.8)
    assert stage.spans["evaluation"] == 21.0
    assert sum(stage.spans.values()) == pytest.approx(stage.seconds, abs=0.01) and stage.seconds == 178.0
    last = data.stages[-1]
    assert (last.status, last.steps_done, last.parent) == ("pending", 35, "mopd")


def test_page_is_one_small_file_without_a_network(cascade: Path) -> None:
    path = write_report(cascade)
    assert path == cascade / REPORT and path.stat().st_size < 5_000_000
    page = path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "@import" not in page and "url(" not in page
    assert page.count("</script>") == 2  # the rollouts' own text cannot end the script


def test_text_of_rollouts_cannot_leave_its_script() -> None:
    assert json.loads(dumps({"a": HOSTILE}).replace("<\\/", "</")) == {"a": HOSTILE}
    assert "</" not in dumps(HOSTILE)


def test_small_parts() -> None:
    assert pick_steps(range(100)) == [0, 20, 40, 59, 79, 99] and pick_steps([3, 5]) == [3, 5]
    assert runs(["a", "b", "c", "d"], [0, 0, 1, 1], [0.0, 0.0, -0.5, -1.25]) == ["ab", [["c", -0.5], ["d", -1.25]]]
    assert thin([(float(step), float(step)) for step in range(400)])[:2] == [(0.0, 0.5), (2.0, 2.5)]


def test_a_folder_that_is_no_cascade_is_the_user_s_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no cascade\.json here"):
        write_report(tmp_path)


def driven(page: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the script in the page leaves in `#seen`."""
    copy = folder / "driven.html"
    copy.write_text(page)
    command = [str(CHROMIUM), *QUIET, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not opened")
def test_page_in_a_browser(cascade: Path, tmp_path: Path) -> None:
    page = write_report(cascade).read_text()
    page = page.replace("<style>", LISTEN + "<style>", 1).replace("</body>", DRIVE + "</body>")
    seen = driven(page, tmp_path)
    assert seen["faults"] == []
    assert "log p" in seen["tip"] and "probability" in seen["tip"] and seen["tipGone"]
    assert "change against sft" in seen["cell"]
    assert (seen["first"], seen["second"]) == ("1 of 16", "2 of 16") and seen["step"] == "12"
    assert seen["invalid"] == "invalid" and seen["hostile"] == 0 and seen["theme"]
    assert seen["change"].startswith("\u2212")
    assert {"loss", "token accuracy", "gradient norm"} <= set(seen["charts"]) and "mean reward" not in seen["charts"]
    assert seen["configs"] == 6


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not opened")
@pytest.mark.parametrize(("width", "levels"), [(1400, 2), (600, 3)])
def test_no_stage_of_the_graph_is_cut_off(cascade: Path, tmp_path: Path, width: int, levels: int) -> None:
    """Wide: the main line and its side branch; narrow: the main line goes on below."""
    page = write_report(cascade).read_text()
    page = page.replace("<style>", LISTEN + "<style>", 1).replace("</body>", MEASURE + "</body>")
    seen = driven(page, tmp_path, f"--window-size={width},900", "--virtual-time-budget=5000")
    assert seen == {"faults": [], "nodes": 6, "scrolls": False, "cut": 0, "tops": levels}
