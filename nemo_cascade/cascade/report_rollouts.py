"""Which rollouts the report carries, and their tokens as text, within a budget of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nemo_cascade.observe.rollouts import read_rows, recorded_steps

STEPS_SHOWN = 6
MAX_TOKENS = 1200  # of one rollout; long agent runs are cut


def pick_steps(steps: Sequence[int]) -> list[int]:
    """First, last and evenly spaced steps between them."""
    if len(steps) <= STEPS_SHOWN:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (STEPS_SHOWN - 1))] for index in range(STEPS_SHOWN)]


def rollouts_of(stage_folder: Path, tokenizer_folder: Path, budget: int) -> list[dict[str, object]]:
    """Rollouts of a few steps, whole groups, as many as fit into `budget` bytes of JSON, shared by the steps."""
    steps = pick_steps(recorded_steps(stage_folder))
    shown: list[dict[str, object]] = []
    for step in steps:
        left = budget // len(steps)
        for group in by_group(read_rows(stage_folder, step)):
            rows = [entry(row, tokenizer_folder) for row in group]
            size = len(json.dumps(rows))
            if size > left:
                break
            left -= size
            shown += rows
    return shown


def by_group(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of one group at a time; domains take turns, so that the first groups show every domain."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["replica"], row["group"]), []).append(row)
    queues: dict[str, list[list[dict[str, Any]]]] = {}
    for group in groups.values():
        queues.setdefault(group[0]["task"]["domain"], []).append(group)
    while queues:
        for domain in list(queues):
            yield queues[domain].pop(0)
            if not queues[domain]:
                del queues[domain]


def entry(row: Mapping[str, Any], tokenizer_folder: Path) -> dict[str, object]:
    """One rollout as the page reads it. `runs` alternates given text and lists of [token text, log-probability]."""
    outcome = row["outcome"]
    invalid = "invalid" in outcome
    texts = pieces(row["token_ids"][:MAX_TOKENS], tokenizer_folder)
    return {
        "step": row["step"],
        "group": f"{row['replica']}/{row['group']}",
        "task": row["task"]["id"],
        "domain": row["task"]["domain"],
        "thinking": row["task"]["thinking"],
        "reward": None if invalid else round(outcome["reward"], 4),
        "reason": outcome["invalid"] if invalid else outcome["reason"],
        "parts": {} if invalid else {name: round(value, 4) for name, value in outcome["parts"].items()},
        "advantage": None if row["advantage"] is None else round(row["advantage"], 4),
        "in_loss": row["in_loss"],
        "truncated": row["truncated"],
        "sampled": sum(row["loss_mask"]),
        "cut": max(0, len(row["token_ids"]) - MAX_TOKENS),
        "runs": runs(texts, row["loss_mask"], row["logprobs"]),
    }


def runs(texts: Sequence[str], loss_mask: Sequence[int], logprobs: Sequence[float]) -> list[object]:
    """Neighbouring given tokens become one string, neighbouring sampled ones one list of pairs."""
    found: list[Any] = []
    for text, sampled, logprob in zip(texts, loss_mask, logprobs, strict=False):  # texts may be cut
        if sampled:
            if not found or isinstance(found[-1], str):
                found.append([])
            found[-1].append([text, round(logprob, 3)])
        elif found and isinstance(found[-1], str):
            found[-1] += text
        else:
            found.append(text)
    return found


def pieces(token_ids: Sequence[int], tokenizer_folder: Path) -> list[str]:
    """Each token's own text, special tokens included; bytes that are no character alone show as a replacement mark."""
    tokenizer = open_tokenizer(tokenizer_folder)
    return [tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]


@lru_cache(maxsize=4)
def open_tokenizer(folder: Path) -> Tokenizer:
    """The stage's tokenizer, once per folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
