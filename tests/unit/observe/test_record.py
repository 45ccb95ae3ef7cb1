"""The record of a run: what is on disk after a step, after a kill and after a resume."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_cascade.config.schema import TrackersConfig
from nemo_cascade.observe.metrics import combine
from nemo_cascade.observe.progress import ProgressLine, clock
from nemo_cascade.observe.record import Ranks, RunRecord, read_metrics
from nemo_cascade.observe.rollouts import read_groups, read_rows, recorded_steps, write_rollouts
from nemo_cascade.observe.summary import summarise
from nemo_cascade.types import Group, Invalid, Message, Outcome, Rollout, Scored, Task, Tool, ToolCall, Transcript

TASK = Task(
    "math-1",
    "math",
    (Message("user", "2+3?"),),
    tools=(Tool("add", "adds", {"type": "object"}),),
    thinking=True,
    truth={"expected_answer": "5"},
)


def rollout(
    outcome: Outcome, sample: int = 0, logprobs: tuple[float, ...] = (-0.5, -1.5), truncated: bool = False
) -> Rollout:
    answer = Message("assistant", "5", "2+3=5", (ToolCall("add", {"a": 2}),))
    count = len(logprobs)
    return Rollout(
        TASK,
        sample,
        (7,) + tuple(range(count)),
        (0,) + (1,) * count,
        (0.0, *logprobs),
        (-1,) + (3,) * count,
        Transcript((answer,), truncated),
        outcome,
        0.25,
        0.125,
    )


def group(*rewards: float | None) -> Group:
    outcomes = [Invalid("judge down") if r is None else Scored(r, {"exact": r}, "ok") for r in rewards]
    rollouts = tuple(rollout(outcome, i) for i, outcome in enumerate(outcomes))
    return Group(TASK, rollouts, (True,) * len(rollouts))


@dataclass
class Collected:
    groups: list[Group]
    tokens: int = 40
    sampling_seconds: float = 0.5
    reward_seconds: float = 0.25

    def metrics(self) -> dict[str, float]:
        return {"groups_dropped": 2.0, "groups_dropped/all_equal": 2.0, "refills": 1.0}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_step_with_exclusive_timers(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 2)
    clocks = []
    for step in record.remaining(0):
        began = time.perf_counter()
        with record.timer("sampling"):
            time.sleep(0.02)
            with record.timer("reward"):
                time.sleep(0.06)
        clocks.append(time.perf_counter() - began)  # however slow the machine is
        record.step(step, {"loss": 1.0 + step, "tokens": 100.0})
    first, second = lines(tmp_path)
    assert [first["step"], second["step"], second["loss"]] == [0, 1, 2.0]
    assert first["seconds/reward"] >= 0.06 and first["seconds/sampling"] >= 0.02
    both = first["seconds/sampling"] + first["seconds/reward"]
    assert 0.08 <= both <= clocks[0] <= first["seconds/total"]  # the reward's time is not counted twice
    assert first["tokens_per_second"] == pytest.approx(100 / first["seconds/total"])


def test_resume_takes_back_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 5)
    for step in record.remaining(0):
        (made,) = group(1.0).rollouts
        record.rollouts(step, [Group(TASK, (dataclasses.replace(made, routed_experts=b"123456"),), (True,))])
        record.step(step, {"loss": float(step)})
        if step == 3:
            break
    assert recorded_steps(tmp_path, experts=True) == [0, 1, 2, 3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the kill came in the middle of a line
    resumed = RunRecord(tmp_path, "if_rl", 5)
    assert list(resumed.remaining(2)) == [2, 3, 4]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert recorded_steps(tmp_path) == recorded_steps(tmp_path, experts=True) == [0, 1]
    with pytest.raises(ValueError, match="rollout math-1#0: 7 experts for 3 tokens"):
        dataclasses.replace(made, routed_experts=b"1234567")


def test_not_a_number_becomes_null_and_stays_out_of_trackers(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 1)
    for step in record.remaining(0):
        record.step(step, {"kl": float("nan"), "loss": 0.5})
    (line,) = read_metrics(tmp_path)
    assert line["kl"] is None and line["loss"] == 0.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "kl" not in events.Tags()["scalars"]


def test_tensorboard_reads_our_events_and_hides_resumed_steps(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 4)
    for step in record.remaining(0):
        record.step(step, {"loss": 10.0 + step})
    time.sleep(1.1)  # event files are named by the second
    resumed = RunRecord(tmp_path, "if_rl", 4)
    for step in resumed.remaining(2):
        resumed.step(step, {"loss": 20.0 + step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 10.0),
        (1, 11.0),
        (2, 22.0),
        (3, 23.0),
    ]


def test_other_ranks_write_only_their_replica_s_rollouts(tmp_path: Path) -> None:
    ours, theirs = [group(1.0, 0.0)], [group(1.0, 1.0, 1.0, 0.0)]

    def gather(_: dict[str, float]) -> list[dict[str, float]]:
        return [summarise(ours), summarise(theirs)]

    second = RunRecord(tmp_path, "if_rl", 1, ranks=Ranks(1, 1, gather))
    for step in second.remaining(0):
        second.rollouts(step, theirs)
        line = second.step(step, {"grad_norm": 2.0}, Collected(theirs))
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "tensorboard").exists()
    first = RunRecord(tmp_path, "if_rl", 1, ranks=Ranks(0, 0, gather))
    for step in first.remaining(0):
        first.rollouts(step, ours)
        line = first.step(step, {"grad_norm": 2.0}, Collected(ours))
    assert line["rollouts"] == 6 and line["reward"] == pytest.approx(4 / 6)  # weighted by rollouts, not a mean of means
    assert line["seconds/sampling"] == 0.5 and line["seconds/reward"] == 0.25
    assert sorted(len(g.rollouts) for g in read_groups(tmp_path, 0)) == [2, 4]
    assert [len(g.rollouts) for g in read_groups(tmp_path, 0, replica=1)] == [4]


def test_time_after_the_last_step_is_kept(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "sft", 1)
    for step in record.remaining(0):
        record.step(step, {})
    began = time.perf_counter()
    with record.timer("evaluation"):
        time.sleep(0.02)
    record.close()
    seconds = time.perf_counter() - began
    record.close()
    assert 0.02 <= json.loads((tmp_path / "timing.json").read_text())["evaluation"] <= seconds


def test_step_outside_the_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside"):
        RunRecord(tmp_path, "sft", 1).step(0, {})


def test_rollouts_come_back_whole(tmp_path: Path) -> None:
    import numpy

    exact = tuple(float(value) for value in numpy.random.default_rng(0).normal(size=50).astype(numpy.float32))
    rollouts_G = (rollout(Scored(0.5, {"exact": 0.5}, "half"), 0, exact), rollout(Invalid("x"), 1, truncated=True))
    groups = [Group(TASK, rollouts_G, (True, False))]
    write_rollouts(tmp_path, 12, groups, [[0.7, None]])
    (back,) = read_groups(tmp_path, 12)
    assert numpy.array_equal(numpy.float32(back.rollouts[0].logprobs), numpy.float32(groups[0].rollouts[0].logprobs))
    assert back.rollouts[1] == groups[0].rollouts[1]
    assert back.task == TASK and back.in_loss == (True, False)
    assert [row["advantage"] for row in read_rows(tmp_path, 12)] == [0.7, None]
    with pytest.raises(ValueError, match=r"step 13; kept are \[12\]"):
        list(read_rows(tmp_path, 13))


def test_summary_counts_what_it_says() -> None:
    line = summarise([group(1.0, 0.0, None), group(1.0, 1.0)])
    assert line["reward"] == pytest.approx(3 / 4) and line["invalid_share"] == pytest.approx(1 / 5)
    assert line["all_equal_share"] == 0.5 and line["tokens"] == 10 and line["length"] == 2.0
    assert line["entropy"] == pytest.approx(1.0) and line["reward/math"] == line["reward"]
    assert summarise([]) == {}


def test_ranks_are_combined_by_each_metric_s_rule() -> None:
    first = {"reward/math": 1.0, "rollouts/math": 1.0, "rollouts": 4.0, "grad_norm": 1.0, "length": 10.0}
    second = {"reward/math": 0.0, "rollouts/math": 3.0, "rollouts": 12.0, "grad_norm": 5.0, "length": 20.0, "kl": 0.3}
    both = combine([first, second, {}])
    assert both == {
        "reward/math": 0.25,
        "rollouts/math": 4.0,
        "rollouts": 16.0,
        "grad_norm": 5.0,
        "length": 17.5,
        "kl": 0.3,
    }


def test_plain_progress_says_step_reward_speed_and_time_left() -> None:
    stream = io.StringIO()
    line = ProgressLine("if_rl", 120, stream)
    line.start(0)
    line.update(0, 2.0, {"reward": 0.25, "tokens": 4000.0})
    line.update(1, 2.0, {"reward": 0.5, "tokens": 4000.0})  # too soon for another line
    assert stream.getvalue().splitlines() == ["if_rl                   1/120  reward 0.250  2,000 tok/s  3m58s left"]
    assert [clock(9.4), clock(125), clock(11220)] == ["9s", "2m05s", "3h07m"]


def test_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    line = ProgressLine("if_rl", 4, stream)
    line.start(0)
    line.update(3, 1.0, {"loss": 0.125})
    line.stop()
    assert "4/4" in stream.getvalue() and "loss 0.125" in stream.getvalue()


def test_wandb_offline_and_mlflow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import mlflow

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    folder = tmp_path / "stage"
    for start, stop in ((0, 2), (2, 3)):
        record = RunRecord(folder, "if_rl", stop, TrackersConfig(wandb_project="cascade", mlflow_uri=uri))
        for step in record.remaining(start):
            record.step(step, {"reward": 0.5 * step})
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("nemo_cascade").experiment_id])
    assert len(runs) == 1  # the resumed stage went on in its run
    history = client.get_metric_history(runs[0].info.run_id, "reward")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_named_tracker_that_is_missing_is_the_user_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record = RunRecord(tmp_path, "if_rl", 1, TrackersConfig(wandb_project="cascade"))
    with pytest.raises(ValueError, match="trackers.wandb_project: wandb is not installed"):
        next(record.remaining(0))


def test_observe_imports_without_torch() -> None:
    code = "import sys, nemo_cascade.observe.record; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


def test_tokens_of_dropped_groups_count_for_the_speed(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 1)
    for step in record.remaining(0):
        line = record.step(step, {}, Collected([group(1.0, 0.0)]))
    assert line["tokens"] == 40 and line["rollouts"] == 2 and line["groups_dropped/all_equal"] == 2
    assert line["tokens_per_second"] == pytest.approx(40 / line["seconds/total"])


def test_dropped_prompts_and_refills_are_in_the_line(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 2)
    seen = iter([{"prompts_dropped": 3.0, "prompts_dropped/math": 3.0}, {"prompts_dropped": 4.0}])
    record.task_counts = lambda: next(seen)
    for step in record.remaining(0):
        record.step(step, {}, Collected([group(1.0, 0.0)]))
    assert [line["prompts_dropped"] for line in lines(tmp_path)] == [3.0, 4.0]
    assert [line["refills"] for line in lines(tmp_path)] == [1.0, 1.0]
    everyone = combine([{"prompts_dropped": 3.0, "refills": 1.0}, {"prompts_dropped": 3.0, "refills": 2.0}])
    assert everyone == {"prompts_dropped": 3.0, "refills": 3.0}  # ranks read the same rows, but refill on their own


def test_an_mlflow_that_refuses_is_the_user_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    record = RunRecord(tmp_path, "if_rl", 1, TrackersConfig(mlflow_uri=(tmp_path / "mlruns").as_uri()))
    with pytest.raises(ValueError, match=r"trackers\.mlflow_uri: file:.* maintenance mode"):
        next(record.remaining(0))


def test_rollouts_of_every_nth_step_and_of_the_last_are_kept(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "if_rl", 6)
    record.rollouts_every = 2
    for step in record.remaining(0):
        record.rollouts(step, [group(1.0, 0.0)])
        record.step(step, {})
    assert recorded_steps(tmp_path) == [0, 2, 4, 5]
