"""The command line: exit codes, one line for a mistake, JSON for programs, no torch before it is needed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade import cli
from nemo_cascade.config.paths import PACKAGED
from tests.flow.real_cascade import environment
from tests.flow.small_cascade import write_cascade

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ["--module", "tests.flow.standin_stage"]
HEAVY = ("torch", "megatron", "nemo", "transformers", "nemo_run")


@pytest.fixture
def cascade(tmp_path: Path) -> str:
    return str(write_cascade(tmp_path))


def test_check_and_plan(cascade, capsys):
    assert cli.main(["check", cascade]) == 0
    assert capsys.readouterr().out == "small: 5 stages in order: sft, if_rl, math_rl, side, mopd\n"
    assert cli.main(["plan", cascade, "stages.sft.num_steps=8"]) == 0
    assert "sft                  sft   base                    8         0      8.2K" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["check", "CASCADE", "stages.if_rl.optimizr.lr=1"],
        ["check", "CASCADE", "--set", "seed=1", "stages.if_rl.init=nowhere"],
        ["plan", "CASCADE", "stages.if_rl.data.files={instruction_following: [no.jsonl]}"],
        ["run", "CASCADE", "--until", "nowhere"],
        ["status", "nowhere"],
        ["report", "CASCADE"],
        ["check", "CASCADE", "foo"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cascade, capsys, words):
    assert cli.main([word.replace("CASCADE", cascade) for word in words]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1


def test_overrides_may_stand_after_options(cascade, capsys):
    assert cli.main(["run", cascade, "--until", "sft", "--dry-run", "stages.sft.num_steps=9"]) == 0
    assert "sft: would run 9 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", cascade, "--untill=sft"])
    assert caught.value.code == 2


def test_status_asks_for_the_cascade_alone(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["status"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("the following arguments are required: cascade")


def test_heads_of_the_table_tell_domains_apart():
    from nemo_cascade.cascade.status import table

    names = ["swe_agentless", "swe_agentic", "instruction_following", "math", "a/b.py:Reversed"]
    scores = {name: {"score": place / 10, "ci_low": 0, "ci_high": 1, "n": 4} for place, name in enumerate(names)}
    row = {"name": "sft", "status": "done", "seconds": 3.0, "scores": scores, "gains": {}, "recovery": None}
    lines = table({"stages": [row]}).splitlines()
    assert lines[0].split() == ["swe", "instruction"]
    shown = ["agentless", "swe_agentic", "following", "math", "Reversed"]
    assert lines[1].split() == ["stage", "state", "seconds", *shown]
    ends = [lines[1].index(word) + len(word) for word in shown]
    assert [lines[2][:end].split()[-1] for end in ends] == ["0.0", "10.0", "20.0", "30.0", "40.0"]
    assert lines[0].index("instruction") + len("instruction") == ends[2]


def test_diff(cascade, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(Path(cascade).read_text().replace("base: random", "base: random\nseed: 4"))
    assert cli.main(["check", cascade, "--diff", str(other)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "cascade.seed: 1 -> 4"


def test_run_status_and_report(cascade, capsys, monkeypatch):
    assert cli.main(["run", cascade, "--until", "if_rl", *STANDIN]) == 0
    out = capsys.readouterr().out
    assert "[2/2] if_rl: grpo from sft, 6 steps" in out
    assert "if_rl step 6" in out  # the stage's own words
    report = Path(out.splitlines()[-1].removeprefix("report: "))
    assert report.is_file()
    assert cli.main(["status", cascade, "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in state["stages"]] == ["done", "done", "pending", "pending", "pending"]
    row = state["stages"][1]
    assert set(row["scores"]["math"]) == {"score", "ci_low", "ci_high", "n"}
    assert set(row["gains"]["math"]) == {"difference", "ci_low", "ci_high"}
    assert row["recovery"] is None
    assert Path(row["checkpoint"]).is_dir()
    assert cli.main(["status", str(report.parent)]) == 0
    assert "if_rl                done" in capsys.readouterr().out
    assert cli.main(["report", cascade]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    monkeypatch.setenv("STANDIN_FAIL", "math_rl")
    assert cli.main(["run", cascade, "--until", "math_rl", *STANDIN]) == 1
    assert capsys.readouterr().err.startswith("error: stage math_rl failed (exit code 1): RuntimeError: the learner")


def test_audit_passes_on_every_gold_and_anti_gold_case(capsys):
    assert cli.main(["audit", "mcqa", "structured_output", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "mcqa" in out
    assert "MISS" not in out


def test_audit_finds_a_reward_that_pays_for_nothing(capsys, monkeypatch):
    from nemo_cascade.domains import mcqa
    from nemo_cascade.types import Scored

    monkeypatch.setattr(mcqa.DOMAIN, "score", lambda self, task, transcript: Scored(1.0, reason="always"))
    assert cli.main(["audit", "mcqa", "--quick"]) == 1
    assert "wanted 0, got 1 (always)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "plan", "status"])
def test_what_answers_on_a_login_node_imports_nothing_heavy(cascade, command):
    code = (
        "import sys, time\nfrom nemo_cascade.cli import main\n"
        f"code = main([{command!r}, {cascade!r}])\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.stderr.write(f'{time.process_time()} {found}')\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, _, found = done.stderr.partition(" ")
    assert found == "[]"
    assert float(seconds) < 1.0


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_ends_with_an_example_of_the_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    *_, before, example = capsys.readouterr().out.strip().splitlines()
    assert example == f"example: {cli.COMMANDS[command][3]}"
    assert example.startswith(f"example: nemo-cascade {command} ")
    assert before == cli.FIRST.get(command, "")


@pytest.mark.parametrize("command", ["check", "plan", "run", "status", "audit"])
def test_examples_work(command, monkeypatch, capsys):
    if command in ("check", "run", "status") and not (PACKAGED["nano"] / "config.json").is_file():
        pytest.skip("the nano base is not trained yet: make nano-base")
    monkeypatch.chdir(ROOT)
    assert cli.main(cli.COMMANDS[command][3].split()[1:]) == 0
    assert capsys.readouterr().out


def test_the_example_of_report_works_after_what_it_asks_for(tmp_path, monkeypatch, capsys):
    """In an empty folder; the stages are those of the nano cascade, each for four steps of a stand-in."""
    if not (PACKAGED["nano"] / "config.json").is_file():
        pytest.skip("the nano base is not trained yet: make nano-base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    example, first = cli.COMMANDS["report"][3], cli.FIRST["report"].removeprefix("first: ")
    assert cli.main(example.split()[1:]) == 2
    assert "run it first: nemo-cascade run" in capsys.readouterr().err
    small = ["base=random", "stages.*.num_steps=4", "evaluation.select=16", "evaluation.report=16"]
    assert cli.main([*first.split()[1:], *small, *STANDIN]) == 0
    assert cli.main(example.split()[1:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs/nano/report.html"
    assert (tmp_path / "runs" / "nano" / "report.html").stat().st_size > 20_000


EXPECTED = {
    "chat": r"(\[thinks\] .+\n)?.+\n",
    "convert": r"[0-9a-f]{64}\n",
    "eval": r"math +thinking +[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\] over 16\nmcqa .* over 16\n",
    "parity": r".+",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(EXPECTED))
def test_examples_that_need_torch_work(command, tmp_path):
    if not (PACKAGED["nano"] / "config.json").is_file():
        pytest.skip("the nano base is not trained yet: make nano-base")
    words = shlex.split(cli.COMMANDS[command][3])[1:]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cascade.cli", *words],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"(?s){EXPECTED[command]}\Z", done.stdout), done.stdout
    assert [path.name for path in tmp_path.iterdir()] == (["nano.nemo"] if command == "convert" else [])


def test_the_example_of_serve_domain_writes_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(cli.COMMANDS["serve-domain"][3].split()[1:]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["agent_ref"]["name"] for row in rows} == {"mcqa_simple_agent"}


def test_every_example_is_run():
    tried = {"check", "plan", "run", "status", "audit", "report", "serve-domain", *EXPECTED}
    assert tried == set(cli.COMMANDS)
