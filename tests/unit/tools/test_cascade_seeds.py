"""The table over seeds, on evaluation files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade.cascade.artifacts import StageFolder, stage_folder, write_json
from nemo_cascade.cascade.manifest import Entry, Manifest, write_manifest
from nemo_cascade.cascade.teachers import Choice, to_json
from nemo_cascade.types import StageResult, UserError
from tools.cascade_seeds import effects, finished, main, page, read_run, recovered

TASKS = 40
Solved = dict[str, int]  # domain -> how many of the 40 tasks are solved, the first ones
STAGES = (("sft", "sft", ""), ("if_rl", "grpo", "sft"), ("math_rl", "grpo", "if_rl"), ("mopd", "mopd", "math_rl"))
DOMAINS = {"sft": ("if", "math"), "if_rl": ("if",), "math_rl": ("math",), "mopd": ("if", "math")}
GOOD: dict[str, Solved] = {
    "sft:init": {"if": 0, "math": 0},
    "sft": {"if": 10, "math": 10},
    "if_rl": {"if": 30, "math": 8},
    "math_rl": {"if": 20, "math": 30},
    "mopd": {"if": 28, "math": 30},
}


def evaluation(path: Path, solved: Solved) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"domain": domain, "split": split, "mode": "thinking", "task_id": f"{domain}-{split}-{index}",
         "score": float(index < count), "valid": True}
        for domain, count in solved.items() for split in ("select", "report") for index in range(TASKS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cascade(folder: Path, seed: int, solved: dict[str, Solved], unfinished: str = "") -> Path:
    entries = []
    for index, (name, kind, start) in enumerate(STAGES):
        key = f"{index}{seed}" + "0" * 62
        source = "stage" if start else "hf"
        place = stage_folder(folder, name, key)
        entries.append(
            Entry(name, kind, start or "base", key, place.path.name, DOMAINS[name], 5, source, start, None)
        )
        evaluation(place.evaluation("final"), solved[name])
        if name == "sft":
            evaluation(place.evaluation("init"), solved["sft:init"])
        if kind == "mopd":
            teach(place)
        if name != unfinished:
            place.finish(StageResult(name, kind, key, "hf", "0" * 64, 5, 1.0))
    write_manifest(Manifest("nano", seed, "nano.yaml", (), tuple(entries), folder))
    return folder


def teach(place: StageFolder) -> None:
    choices = {"if": Choice("if_rl", None, "best"), "math": Choice("math_rl", None, "best")}
    write_json(place.teachers, to_json(choices))


def test_gains_are_means_over_seeds_and_intervals_know_the_seeds(tmp_path: Path) -> None:
    weak = {**GOOD, "if_rl": {"if": 14, "math": 8}}
    runs = [read_run(cascade(tmp_path / "1", 1, GOOD)), read_run(cascade(tmp_path / "2", 2, weak))]
    own, others = effects(runs, "if_rl")
    assert (own.what, own.before, own.after) == ("if", 0.25, pytest.approx(0.55))
    assert own.gain.value == pytest.approx(0.3)
    assert own.per_seed == pytest.approx((0.5, 0.1))
    assert own.gain.n == 2 * TASKS
    assert own.gain.low < 0.1 + 0.02 and own.gain.high > 0.5 - 0.02  # both draws may be the same seed
    assert own.shows
    assert (others.what, others.gain.value) == ("the others (1)", pytest.approx(-0.05))
    assert not others.shows
    alone = effects(runs[:1], "if_rl")[0]
    assert alone.gain.value == pytest.approx(0.5)
    assert 0.3 < alone.gain.low < 0.4 and 0.6 < alone.gain.high < 0.7  # binomial: 0.5 +- 1.96 * 0.079


def test_a_stage_that_trains_several_domains_has_a_line_for_all_of_them(tmp_path: Path) -> None:
    run = read_run(cascade(tmp_path / "1", 1, GOOD))
    assert [(effect.what, round(effect.gain.value, 3)) for effect in effects([run], "sft")] == [
        ("if", 0.25), ("math", 0.25), ("all 2 it trains", 0.25),
    ]  # fmt: skip


def test_recovery_is_taken_over_the_seeds(tmp_path: Path) -> None:
    worse = {**GOOD, "mopd": {"if": 22, "math": 30}}
    runs = [read_run(cascade(tmp_path / "1", 1, GOOD)), read_run(cascade(tmp_path / "2", 2, worse))]
    found = recovered(runs, "mopd")
    assert found is not None and found.overall is not None
    assert found.overall.value == pytest.approx(0.5)  # 8 and 2 tasks of 10 won back
    assert dict(found.domains) == {"if": pytest.approx(0.5)}  # mopd starts from the math teacher itself: no lead
    text = page(runs)
    assert "Recovery by mopd: 50 % of the teachers' lead" in text
    assert "(if 50 %)" in text
    assert "nothing to win back: math." in text
    assert "Teachers of mopd with seed 1: if_rl (if); math_rl (math).\n" in text
    assert "Teachers of mopd with seed 2: if_rl (if); math_rl (math).\n" in text


def test_the_page_says_what_does_not_show_and_what_was_lost(tmp_path: Path) -> None:
    text = page([read_run(cascade(tmp_path / "1", 1, GOOD))])
    assert "# The cascade over seed 1\n" in text
    assert "One seed: the intervals draw tasks only" in text
    assert "| math_rl | math | 20.0 | 75.0 | +55.0 |" in text
    assert "Does not show (the interval holds 0): if_rl on the others (1); mopd on math." in text
    assert "Certain losses: math_rl on the others (1) (-25.0)." in text


def test_unfinished_stages_are_named_and_other_cascades_refused(tmp_path: Path) -> None:
    runs = [read_run(cascade(tmp_path / "1", 1, GOOD)), read_run(cascade(tmp_path / "2", 2, GOOD, unfinished="mopd"))]
    names, lines = finished(runs)
    assert (names, lines) == (["sft", "if_rl", "math_rl"], ["mopd is not done with seed 2"])
    assert "Not here: mopd is not done with seed 2." in page(runs)
    other = cascade(tmp_path / "3", 3, GOOD)
    manifest = json.loads((other / "cascade.json").read_text())
    manifest["stages"] = manifest["stages"][:2]
    (other / "cascade.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="seed 3 has other stages than seed 1"):
        finished([*runs, read_run(other)])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        cascade(tmp_path / f"seed-{seed}" / "nano", seed, GOOD)
    out = tmp_path / "docs" / "seeds.md"
    given = ["--seeds", "1", "2", "--output", str(tmp_path), "--out", str(out), "--no-run"]
    assert main(given) == 0
    assert out.read_text().startswith("# The cascade over seeds 1, 2\n")
    assert capsys.readouterr().out == out.read_text() + "\n"
    assert main([*given[:3], "7", *given[3:]]) == 2
    assert "no cascade.json here" in capsys.readouterr().err
