"""Recorded rollouts as SFT rows: the best answer of a group, token for token."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

from nemo_cascade import domains
from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import as_sequence, parse_conversation
from nemo_cascade.observe.rollouts import write_rollouts
from nemo_cascade.types import Group, Invalid, Message, Outcome, Rollout, Scored, Task, Transcript
from tools.rollout_conversations import KEPT, best_of, conversations

CHAT = ChatTokenizer(NANO_TOKENIZER)


def rollout(task: Task, messages: tuple[Message, ...], outcome: Outcome, truncated: bool = False) -> Rollout:
    ids, mask = CHAT.encode_conversation(task, messages)
    zeros = (0.0,) * len(ids)
    return Rollout(
        task, 0, tuple(ids), tuple(mask), zeros, (0,) * len(ids), Transcript(messages, truncated), outcome, 0.0, 0.0
    )


def demonstrated(name: str, thinking: bool) -> tuple[Task, tuple[Message, ...]]:
    domain = domains.load(name, domains.Services(), None)
    (task,) = domain.tasks("train", 1, 5)
    moded = dataclasses.replace(task, thinking=thinking)
    return moded, domain.demonstrate(moded, 3)


def test_the_best_answer_that_earned_something() -> None:
    task, good = demonstrated("math", True)
    rewards: list[Outcome] = [Scored(0.0), Scored(0.5), Invalid("judge is gone"), Scored(0.75), Scored(0.75)]
    group = Group(task, tuple(rollout(task, good, outcome) for outcome in rewards), (True,) * 5)
    assert best_of(group) is group.rollouts[3]
    cut = Group(task, (rollout(task, good, Scored(1.0), truncated=True), group.rollouts[1]), (True, True))
    assert best_of(cut) is cut.rollouts[1]
    assert best_of(Group(task, group.rollouts[:1], (True,))) is None


def test_rows_train_the_tokens_that_were_sampled(tmp_path: Path) -> None:
    """Every domain, reasoning on and off, tools and several turns included."""
    groups = []
    for name in domains.available():
        for thinking in (True, False):
            task, good = demonstrated(name, thinking)
            groups.append(
                Group(task, (rollout(task, good, Scored(0.0)), rollout(task, good, Scored(1.0))), (True, True))
            )
    odd = dataclasses.replace(groups[0].rollouts[1], token_ids=(*groups[0].rollouts[1].token_ids[:-2], 40, 2))
    lost = Group(odd.task, (odd, odd), (True, True))
    nothing = Group(odd.task, (groups[0].rollouts[0],), (True,))
    write_rollouts(tmp_path, 3, [*groups, lost, nothing])
    counts: Counter[str] = Counter()
    rows = [json.loads(json.dumps(row)) for row in conversations(tmp_path, CHAT, counts)]
    assert counts == {KEPT: len(groups), "no answer earned anything": 1, "its text becomes other tokens": 1}
    for row, group in zip(rows, groups, strict=True):
        sequence = as_sequence(CHAT, *parse_conversation(row, "row"))
        assert sequence.token_ids == group.rollouts[1].token_ids
        assert sequence.loss_mask == group.rollouts[1].loss_mask
