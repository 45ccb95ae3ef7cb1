"""What the ledger decides: gains, gates, teachers, recovery - on scores written by hand."""

import json
from pathlib import Path

import pytest

from nemo_cascade.cascade import gates, teachers
from nemo_cascade.cascade.artifacts import StageFolder, write_json
from nemo_cascade.cascade.graph import Source, Teaching
from nemo_cascade.cascade.ledger import Ledger, checkpoint_name, read_ledger
from nemo_cascade.config.schema import GateConfig, SftConfig
from nemo_cascade.types import UserError


def write(folder: StageFolder, label: str, cells: dict[tuple[str, str, str], list[float]], invalid: int = 0) -> None:
    """Task `i` of a cell has score `cells[...][i]`; the last `invalid` tasks of each cell are invalid."""
    rows = []
    for (domain, split, mode), values in cells.items():
        for index, score in enumerate(values):
            valid = index < len(values) - invalid
            row = {
                "domain": domain,
                "split": split,
                "mode": mode,
                "task_id": f"t{index}",
                "score": score,
                "valid": valid,
            }
            rows.append(json.dumps(row))
    path = folder.evaluation(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def solved(share: float, count: int = 100) -> list[float]:
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))


def cells(**shares: float) -> dict[tuple[str, str, str], list[float]]:
    """Select and report scores of each domain, thinking."""
    return {
        (domain, split, "thinking"): solved(share) for domain, share in shares.items() for split in ("select", "report")
    }


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, StageFolder]:
    found = {name: StageFolder(tmp_path / name) for name in ("sft", "if_rl", "math_rl", "mopd")}
    write(found["sft"], "final", cells(math=0.5, code=0.4))
    write(found["sft"], "init", cells(math=0.2, code=0.1))
    write(found["if_rl"], "final", cells(math=0.3, code=0.4))
    write(found["if_rl"], "step_000040", cells(math=0.45, code=0.6))
    write(found["math_rl"], "final", cells(math=0.9, code=0.2))
    write(found["mopd"], "final", cells(math=0.9, code=0.35))
    return found


@pytest.fixture
def ledger(folders: dict[str, StageFolder]) -> Ledger:
    return read_ledger(folders)


def test_checkpoint_names():
    names = [checkpoint_name("if_rl", label) for label in ("final", "step_000040", "init")]
    assert names == ["if_rl", "if_rl@40", "if_rl:init"]


def test_scores_and_gains(ledger):
    assert ledger.score("if_rl@40", "code").value == 0.6
    gain = ledger.gain("math_rl", "if_rl", "math")
    assert (gain.value, gain.n) == (pytest.approx(0.6), 100)
    assert gain.low > 0.49
    assert ledger.gain("sft", "sft:init", "math").value == pytest.approx(0.3)
    assert ledger.gain("math_rl", "nowhere", "math") is None
    assert ledger.score("sft", "mcqa") is None


def test_invalid_verdicts_leave_scores_and_pairs(tmp_path):
    left, right = StageFolder(tmp_path / "left"), StageFolder(tmp_path / "right")
    cell = ("math", "report", "thinking")
    write(left, "final", {cell: [1.0, 1.0, 1.0, 1.0]})
    write(right, "final", {cell: [0.0, 1.0, 0.0, 0.0]}, invalid=2)
    ledger = read_ledger({"left": left, "right": right})
    assert (ledger.score("right", "math").value, ledger.score("right", "math").n) == (0.5, 2)
    assert ledger.invalid["right"] == {cell: 2}
    gain = ledger.gain("left", "right", "math")
    assert (gain.value, gain.n) == (0.5, 2)


def test_the_own_mode_is_the_one_of_select_tasks(tmp_path):
    folder = StageFolder(tmp_path)
    own, other = ("math", "select", "thinking"), ("math", "report", "instruct")
    write(folder, "final", {own: [1.0], ("math", "report", "thinking"): [1.0, 0.0], other: [0.0] * 9})
    ledger = read_ledger({"sft": folder})
    assert ledger.modes("math") == ["thinking", "instruct"]
    assert ledger.score("sft", "math").value == 0.5
    assert ledger.score("sft", "math", mode="instruct").value == 0.0


def test_a_broken_line_is_named(tmp_path):
    folder = StageFolder(tmp_path)
    path = folder.evaluation("final")
    path.parent.mkdir(parents=True)
    path.write_text('{"domain": "math"}\n{"domain": "math"}\n')
    with pytest.raises(UserError, match="a line lacks 'split'"):
        read_ledger({"sft": folder})


ORDER = ["sft", "if_rl", "math_rl", "mopd"]
SFT, IF_40, MATH = Source("stage", "sft"), Source("stage", "if_rl", 40), Source("stage", "math_rl")


def test_the_strongest_checkpoint_teaches(ledger):
    chosen = teachers.choose("mopd", ["math", "code"], Teaching((SFT, IF_40, MATH)), ORDER, ledger)
    assert {domain: choice.checkpoint for domain, choice in chosen.items()} == {"math": "math_rl", "code": "if_rl@40"}
    assert chosen["math"].scores["sft"].value == 0.5
    assert chosen["math"].reason == "select 0.900 over 100 tasks, next sft with 0.500"


def test_of_equals_the_earliest_stage_teaches(ledger):
    both = Teaching((Source("stage", "if_rl"), SFT))  # both 0.4 in code
    chosen = teachers.choose("mopd", ["code"], both, ORDER, ledger)
    assert chosen["code"].checkpoint == "sft"
    assert "level with if_rl" in chosen["code"].reason


def test_a_pin_wins_and_is_recorded(ledger, tmp_path):
    teaching = Teaching((SFT, MATH), {"math": SFT})
    chosen = teachers.choose("mopd", ["math", "code"], teaching, ORDER, ledger)
    assert (chosen["math"].checkpoint, chosen["math"].reason) == ("sft", "pinned in teachers.pin")
    folder = StageFolder(tmp_path / "m")
    write_json(folder.teachers, teachers.to_json(chosen))
    assert teachers.read_teachers(folder) == chosen
    assert chosen["code"].folder({"sft": folder}) == folder.path / "hf"


def test_a_domain_without_select_scores_is_refused(ledger):
    with pytest.raises(UserError, match="no candidate has a select score of 'mcqa'"):
        teachers.choose("mopd", ["mcqa"], Teaching((SFT,)), ORDER, ledger)


@pytest.mark.parametrize(
    ("domain", "min_gain", "passed"),
    [
        ("math", 0.0, True),  # +0.6
        ("math", 0.5, True),  # the interval reaches above
        ("math", 0.8, False),
        ("code", -0.3, True),  # -0.2
        ("code", 0.0, False),
    ],
)
def test_a_gate_fails_when_the_whole_interval_is_below(ledger, domain, min_gain, passed):
    config = SftConfig(
        kind="sft", init="if_rl", num_steps=1, tokens_per_step=1, gates=[GateConfig(domain, min_gain, "stop")]
    )
    (result,) = gates.evaluate("math_rl", config, "if_rl", ledger)
    assert result.passed is passed
    assert result.action == ("none" if passed else "stop")
    assert result.gain == pytest.approx(0.6 if domain == "math" else -0.2)
    assert ("FAILED (stop)" in result.sentence()) is not passed


def test_a_gate_without_a_measured_start_passes_and_says_so(ledger):
    config = SftConfig(kind="sft", init="base", num_steps=1, tokens_per_step=1, gates=[GateConfig("math", 9.0, "stop")])
    (result,) = gates.evaluate("math_rl", config, "math_rl:init", ledger)
    assert (result.passed, result.gain) == (True, None)
    assert "not measured, math_rl:init has no select scores" in result.sentence()


def test_children_of_a_rolled_back_stage_start_from_its_start(ledger, folders):
    config = SftConfig(
        kind="sft", init="if_rl", num_steps=1, tokens_per_step=1, gates=[GateConfig("code", 0.0, "rollback")]
    )
    write_json(folders["math_rl"].gates, gates.to_json(gates.evaluate("math_rl", config, "if_rl", ledger)))
    sources = {
        "sft": Source("random"), "if_rl": SFT, "math_rl": Source("stage", "if_rl"), "mopd": Source("stage", "math_rl"),
    }  # fmt: skip
    assert gates.effective_source("mopd", sources, folders) == Source("stage", "if_rl")
    assert gates.effective_source("math_rl", sources, folders) == Source("stage", "if_rl")
    assert gates.reference_of("mopd", Source("stage", "if_rl", 40)) == "if_rl@40"
    assert gates.reference_of("sft", sources["sft"]) == "sft:init"


def test_recovery_from_the_ledger(ledger):
    found = ledger.recovery("if_rl", {"math": "math_rl", "code": "if_rl@40"}, "mopd")
    assert dict(found.domains) == pytest.approx(
        {"math": 1.0, "code": -0.25}
    )  # (0.9-0.3)/(0.9-0.3), (0.35-0.4)/(0.6-0.4)
    assert found.overall.value == pytest.approx((0.6 - 0.05) / (0.6 + 0.2))
    assert ledger.recovery("if_rl", {"mcqa": "sft"}, "mopd") is None
