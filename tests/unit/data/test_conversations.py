"""The SFT stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nemo_cascade
from nemo_cascade import domains
from nemo_cascade.config.schema import DataConfig, SftConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import conversation_stream, parse_conversation
from nemo_cascade.types import Message, ToolCall, UserError

TOKENIZER = ChatTokenizer(Path(nemo_cascade.__file__).parent / "models" / "nano" / "tokenizer")
DOMAINS = {"math": domains.load("math"), "mcqa": domains.load("mcqa")}
THINK_END = TOKENIZER.encode_text("x") and TOKENIZER._tokenizer.token_to_id("\n</think>\n")


def config(**data: object) -> SftConfig:
    return SftConfig(
        kind="sft", init="random", num_steps=2, tokens_per_step=600, max_sequence_tokens=80, data=DataConfig(**data)
    )


def test_a_step_is_full_and_repeatable() -> None:
    cfg = config(domains={"math": 1.0, "mcqa": 1.0}, thinking_share=1.0)
    stream = conversation_stream(cfg, DOMAINS, TOKENIZER, seed=3)
    first, second = stream.take(0), stream.take(1)
    assert first != second
    assert conversation_stream(cfg, DOMAINS, TOKENIZER, seed=3).take(1) == second
    assert 520 <= sum(len(sequence.token_ids) for sequence in first) <= 600
    for sequence in first:
        assert sequence.loss_mask[0] == 0
        assert sequence.loss_mask[-1] == 1
        assert sequence.token_ids[-1] == TOKENIZER.im_end_id


def test_ranks_see_different_conversations() -> None:
    cfg = config(domains={"math": 1.0})
    parts = [conversation_stream(cfg, DOMAINS, TOKENIZER, 3, rank=rank, world=2).take(0) for rank in range(2)]
    assert not {s.token_ids for s in parts[0]} & {s.token_ids for s in parts[1]}
    assert all(230 <= sum(len(s.token_ids) for s in part) <= 300 for part in parts)


def test_thinking_share() -> None:
    for share, low, high in ((0.0, 0.0, 0.0), (0.5, 0.3, 0.7), (1.0, 1.0, 1.0)):
        cfg = config(domains={"math": 1.0}, thinking_share=share)
        stream = conversation_stream(cfg, DOMAINS, TOKENIZER, seed=3)
        sequences = [sequence for step in range(6) for sequence in stream.take(step)]
        thinking = sum(THINK_END in sequence.token_ids for sequence in sequences) / len(sequences)
        assert low <= thinking <= high


def test_corpus_and_full_loss() -> None:
    stream = conversation_stream(
        config(domains={"math": 1.0}, corpus_share=0.5, full_loss=True), DOMAINS, TOKENIZER, seed=3
    )
    sequences = [sequence for step in range(6) for sequence in stream.take(step)]
    assert all(set(sequence.loss_mask) == {1} for sequence in sequences)
    documents = [sequence for sequence in sequences if sequence.token_ids[0] == 1]
    assert 0.4 < len(documents) / len(sequences) < 0.6
    assert all(sequence.token_ids[-1] == 2 for sequence in documents)


def test_verdicts_for_the_judge() -> None:
    preference = {"preference": domains.load("preference")}
    cfg = config(judge_share=1.0)
    cfg.max_sequence_tokens = 160
    for sequence in conversation_stream(cfg, preference, TOKENIZER, seed=3).take(0):
        verdict = "".join(
            TOKENIZER.decode([token])
            for token, trained in zip(sequence.token_ids, sequence.loss_mask, strict=True)
            if trained
        )
        verdict = verdict.removesuffix("<|im_end|>").removeprefix("</think>\n")
        assert set(json.loads(verdict)) == {"score_1", "score_2", "ranking"}
    with pytest.raises(UserError, match="the domain preference, which is not loaded"):
        conversation_stream(cfg, {}, TOKENIZER, 1)
    with pytest.raises(UserError, match="together with data.judge_share it is above 1"):
        conversation_stream(config(corpus_share=0.6, judge_share=0.6), preference, TOKENIZER, 1)


def test_long_sequences_are_dropped_and_counted() -> None:
    cfg = config(domains={"math": 1.0, "mcqa": 1.0})
    cfg.max_sequence_tokens = 28
    stream = conversation_stream(cfg, DOMAINS, TOKENIZER, seed=3)
    assert all(len(sequence.token_ids) <= 28 for sequence in stream.take(0))
    assert stream.dropped["math"] > 0
    cfg.max_sequence_tokens = 5
    with pytest.raises(UserError, match="were all longer than 5 tokens"):
        conversation_stream(cfg, DOMAINS, TOKENIZER, seed=3).take(0)


def rows(path: Path, count: int) -> str:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+1=?"},
                {"role": "assistant", "content": f"<think>\nso {i}\n</think>\n{i + 1}"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_files_are_walked_through(tmp_path: Path) -> None:
    paths = [rows(tmp_path / "a.jsonl", 40), rows(tmp_path / "b.jsonl", 30)]
    cfg = config(conversations=paths)
    stream = conversation_stream(cfg, {}, TOKENIZER, seed=3)
    steps = [stream.take(step) for step in range(4)]
    assert conversation_stream(cfg, {}, TOKENIZER, seed=3).take(2) == steps[2]
    seen = {sequence.token_ids for step in steps for sequence in step}
    assert len(seen) >= 36, "almost all of the 40 different rows after about one epoch"
    mixed = conversation_stream(config(conversations=paths, domains={"math": 1.0}), DOMAINS, TOKENIZER, 3)
    assert 300 < sum(len(sequence.token_ids) for sequence in mixed.take(0)) <= 600


def test_a_released_row_becomes_prompt_and_answers() -> None:
    call = "<tool_call>\n<function=ls>\n<parameter=path>\n.\n</parameter>\n</function>\n</tool_call>"
    task, answers = parse_conversation(
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "<think>\nold\n</think>\nb"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": f"<think>\nlook\n</think>\n{call}"},
                {"role": "tool", "content": "x.py"},
                {"role": "assistant", "content": "<think></think>done"},
            ]
        },
        "f:1",
    )
    assert task.thinking
    assert [message.role for message in task.messages] == ["system", "user", "assistant", "user"]
    assert task.messages[2] == Message("assistant", "b", "old")
    assert answers == (
        Message("assistant", "", "look", (ToolCall("ls", {"path": "."}),)),
        Message("tool", "x.py"),
        Message("assistant", "done"),
    )
    ids, mask = TOKENIZER.encode_conversation(task, answers)
    assert "old" not in TOKENIZER.decode(ids)
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "f:1: field 'messages' is missing"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with an assistant turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"f:1 messages\[0\]: field 'role' is 'robot'"),
        ({"messages": [{"content": "x"}]}, "field 'role' is missing"),
    ],
)
def test_broken_rows(row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_conversation(row, "f:1")


def test_no_source() -> None:
    with pytest.raises(UserError, match="data.domains: no source has a positive weight"):
        conversation_stream(config(), {}, TOKENIZER, 1)
