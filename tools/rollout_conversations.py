"""Recorded rollouts as conversations for SFT: the best answer of each group, if it earned anything.

    python -m tools.rollout_conversations STAGE_FOLDER [STAGE_FOLDER ...] ROWS.jsonl

A stage with `mode: sample_only` samples a checkpoint and records every step; the rows written here are what
`data.conversations` of an SFT stage reads. A row is kept only where its text becomes the very tokens that were sampled,
so that SFT trains what the teacher said and not a spelling of it; how many were left out, and why, is printed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.config.paths import write_atomic
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import as_sequence, parse_conversation
from nemo_cascade.observe.rollouts import read_groups, recorded_steps
from nemo_cascade.types import Group, Invalid, Message, Rollout, UserError

KEPT = "kept"


def best_of(group: Group) -> Rollout | None:
    """The rollout with the highest reward above 0, the first of equals; None without one. Cut answers do not count."""
    earned = [
        rollout
        for rollout in group.rollouts
        if not (isinstance(rollout.outcome, Invalid) or rollout.transcript.truncated) and rollout.outcome.reward > 0.0
    ]
    return max(earned, key=lambda rollout: rollout.reward, default=None)


def row_of(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a row of `data.conversations`."""
    task = rollout.task
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)} for tool in task.tools
    ]
    messages = [_message(message) for message in (*task.messages, *rollout.transcript.messages)]
    return {"messages": messages, "tools": tools, "thinking": task.thinking}


def _message(message: Message) -> dict[str, Any]:
    if message.role != "assistant":
        return {"role": message.role, "content": message.content}
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
    return {
        "role": "assistant",
        "content": message.content,
        "reasoning_content": message.reasoning,
        "tool_calls": calls,
    }


def conversations(folder: Path, tokenizer: ChatTokenizer, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of all recorded steps of a stage; `counts` says what became of each group."""
    for step in recorded_steps(folder):
        for group in read_groups(folder, step):
            best = best_of(group)
            if best is None:
                counts["no answer earned anything"] += 1
                continue
            row = row_of(best)
            where = f"{folder.name}, step {step}, task {best.task.id}"
            if as_sequence(tokenizer, *parse_conversation(row, where)).token_ids == best.token_ids:
                counts[KEPT] += 1
                yield row
            else:
                counts["its text becomes other tokens"] += 1


def write_conversations(folders: Sequence[Path], path: Path) -> Counter[str]:
    """The rows of several stages in one file; returns the counts."""
    counts: Counter[str] = Counter()
    rows = []
    for folder in folders:
        tokenizer = ChatTokenizer(read_stage_run(StageFolder(folder).path).tokenizer)
        rows += [json.dumps(row) for row in conversations(folder, tokenizer, counts)]
    if not rows:
        raise UserError(f"{', '.join(map(str, folders))}: no recorded answer earned anything, so there are no rows")
    write_atomic(path, "\n".join(rows) + "\n")
    return counts


def main() -> int:
    """Write the file and say what became of the groups."""
    if len(sys.argv) < 3:
        sys.stderr.write("usage: python -m tools.rollout_conversations STAGE_FOLDER [STAGE_FOLDER ...] ROWS.jsonl\n")
        return 2
    *folders, path = map(Path, sys.argv[1:])
    try:
        counts = write_conversations(folders, path)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{path}: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
