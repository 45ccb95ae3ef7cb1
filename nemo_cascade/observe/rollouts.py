"""Rollouts on disk: one JSON line each, complete, so that a step can be read by a person or trained on again.

`rollouts/step_000012.jsonl` of a stage folder, `step_000012.3.jsonl` for the data-parallel replica 3. Lists hold one
entry per token in the order the model saw them. The experts by which the tokens were sampled (routing_replay: sampler)
lie beside it in `step_000012.npz`: one array `GROUP.SAMPLE` per rollout, uint8 [tokens, MoE layers * top-k], 255 where
none is known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_cascade.types import (
    Group,
    Invalid,
    Message,
    Outcome,
    Rollout,
    Scored,
    Task,
    Tool,
    ToolCall,
    Transcript,
    UserError,
)

FOLDER = "rollouts"
DIGITS = 9  # significant digits that bring a float32 log-probability back bit for bit


def rollouts_file(stage_folder: Path, step: int, replica: int = 0) -> Path:
    """Where the rollouts of a step are."""
    part = f".{replica}" if replica else ""
    return stage_folder / FOLDER / f"step_{step:06d}{part}.jsonl"


def experts_file(stage_folder: Path, step: int, replica: int = 0) -> Path:
    """Where the experts of a step's rollouts are, if they were recorded."""
    return rollouts_file(stage_folder, step, replica).with_suffix(".npz")


def step_of(path: Path) -> int:
    """The step of a rollouts file."""
    return int(path.name.split("_")[1].split(".")[0])


def recorded_steps(stage_folder: Path, experts: bool = False) -> list[int]:
    """The steps whose rollouts (with `experts`: whose rollouts' experts) were kept, ascending."""
    suffix = "npz" if experts else "jsonl"
    return sorted({step_of(path) for path in (stage_folder / FOLDER).glob(f"step_*.{suffix}")})


def recorded_replicas(stage_folder: Path, step: int) -> int:
    """How many data-parallel replicas kept rollouts of the step; 0 when none did."""
    return len(list((stage_folder / FOLDER).glob(f"step_{step:06d}*.jsonl")))


def drop_rollouts(stage_folder: Path, start: int, replica: int = 0) -> None:
    """Remove what a replica kept of the steps at or after `start`."""
    for step in recorded_steps(stage_folder):
        if step >= start:
            rollouts_file(stage_folder, step, replica).unlink(missing_ok=True)
            experts_file(stage_folder, step, replica).unlink(missing_ok=True)


def write_rollouts(
    stage_folder: Path,
    step: int,
    groups_P: Sequence[Group],
    advantages_P_G: Sequence[Sequence[float | None]] = (),
    replica: int = 0,
) -> None:
    """Write a step's groups; `advantages_P_G` (one number per rollout) is kept for the reader when given."""
    path = rollouts_file(stage_folder, step, replica)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_experts(experts_file(stage_folder, step, replica), groups_P)  # first: who sees the rollouts has them too
    aside = path.with_suffix(f".{os.getpid()}.part")
    with aside.open("w") as file:
        for index, group in enumerate(groups_P):
            advantages_G = advantages_P_G[index] if advantages_P_G else [None] * len(group.rollouts)
            for rollout, in_loss, advantage in zip(group.rollouts, group.in_loss, advantages_G, strict=True):
                place = {"step": step, "replica": replica, "group": index}
                row = {**place, **row_of(rollout), "in_loss": in_loss, "advantage": advantage}
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
    aside.replace(path)


def _write_experts(path: Path, groups_P: Sequence[Group]) -> None:
    """The experts of every rollout that brought them; no file when none did."""
    found = {
        f"{index}.{rollout.sample}": rollout
        for index, group in enumerate(groups_P)
        for rollout in group.rollouts
        if rollout.routed_experts
    }
    if not found:
        path.unlink(missing_ok=True)
        return
    import numpy as np

    arrays = {
        name: np.frombuffer(rollout.routed_experts, dtype=np.uint8).reshape(len(rollout.token_ids), -1)
        for name, rollout in found.items()
    }
    aside = path.with_suffix(f".{os.getpid()}.part")
    with aside.open("wb") as file:
        np.savez(file, **arrays)
    aside.replace(path)


def _read_experts(path: Path) -> dict[str, bytes]:
    """What `_write_experts` wrote: the array of each rollout as bytes."""
    import numpy as np

    try:
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file, so these rollouts do not say by which experts they were sampled; set "
            "routing_replay to learner, or record them again with routing_replay: sampler"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: the recorded experts cannot be read: {error}") from error


def read_rows(stage_folder: Path, step: int, replica: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a step as plain records; of all replicas unless one is named."""
    paths = sorted((stage_folder / FOLDER).glob(f"step_{step:06d}*.jsonl"))
    if replica is not None:
        paths = [path for path in paths if path == rollouts_file(stage_folder, step, replica)]
    if not paths:
        kept = recorded_steps(stage_folder)
        raise UserError(f"{stage_folder / FOLDER}: no recorded rollouts of step {step}; kept are {kept[:20]}")
    for path in paths:
        with path.open() as file:
            for line in file:
                yield json.loads(line)


def read_groups(stage_folder: Path, step: int, replica: int | None = None, experts: bool = False) -> list[Group]:
    """The groups of a step as they were trained on; of all replicas unless one is named.

    With `experts` the rollouts bring those by which they were sampled; UserError where they were not recorded.
    """
    by_group: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in read_rows(stage_folder, step, replica):
        by_group.setdefault((row["replica"], row["group"]), []).append(row)
    names = {name for name, _ in by_group} if experts else set()
    recorded = {name: _read_experts(experts_file(stage_folder, step, name)) for name in names}
    groups = []
    for (name, group), rows in by_group.items():
        own = recorded.get(name, {})
        rollouts_G = tuple(rollout_of(row, own.get(f"{group}.{row['sample']}", b"")) for row in rows)
        groups.append(Group(rollouts_G[0].task, rollouts_G, tuple(row["in_loss"] for row in rows)))
    return groups


def row_of(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON data."""
    outcome = rollout.outcome
    if isinstance(outcome, Invalid):
        verdict: dict[str, Any] = {"invalid": outcome.reason}
    else:
        verdict = {"reward": outcome.reward, "parts": dict(outcome.parts), "reason": outcome.reason}
    return {
        "task": dataclasses.asdict(rollout.task),
        "sample": rollout.sample,
        "token_ids": list(rollout.token_ids),
        "loss_mask": list(rollout.loss_mask),
        "logprobs": [float(f"{value:.{DIGITS}g}") for value in rollout.logprobs],
        "versions": list(rollout.versions),
        "messages": [dataclasses.asdict(message) for message in rollout.transcript.messages],
        "truncated": rollout.transcript.truncated,
        "outcome": verdict,
        "sampling_seconds": round(rollout.sampling_seconds, 4),
        "reward_seconds": round(rollout.reward_seconds, 4),
    }


def rollout_of(row: Mapping[str, Any], experts: bytes = b"") -> Rollout:
    """The rollout of a row written by `row_of`, with what its side file says."""
    messages = tuple(message_of(message) for message in row["messages"])
    return Rollout(
        task=task_of(row["task"]),
        sample=row["sample"],
        token_ids=tuple(row["token_ids"]),
        loss_mask=tuple(row["loss_mask"]),
        logprobs=tuple(row["logprobs"]),
        versions=tuple(row["versions"]),
        transcript=Transcript(messages, row["truncated"]),
        outcome=outcome_of(row["outcome"]),
        sampling_seconds=row["sampling_seconds"],
        reward_seconds=row["reward_seconds"],
        routed_experts=experts,
    )


def outcome_of(verdict: Mapping[str, Any]) -> Outcome:
    """A verdict as it was given."""
    if "invalid" in verdict:
        return Invalid(verdict["invalid"])
    return Scored(verdict["reward"], verdict["parts"], verdict["reason"])


def message_of(record: Mapping[str, Any]) -> Message:
    """One turn from its JSON record."""
    calls = tuple(ToolCall(call["name"], call["arguments"]) for call in record["tool_calls"])
    return Message(record["role"], record["content"], record["reasoning"], calls)


def task_of(record: Mapping[str, Any]) -> Task:
    """A task from its JSON record."""
    return Task(
        id=record["id"],
        domain=record["domain"],
        messages=tuple(message_of(message) for message in record["messages"]),
        tools=tuple(Tool(tool["name"], tool["description"], tool["parameters"]) for tool in record["tools"]),
        thinking=record["thinking"],
        truth=record["truth"],
    )
