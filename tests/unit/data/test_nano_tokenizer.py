"""The shipped nano tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nemo_cascade
from nemo_cascade import domains
from nemo_cascade.data import template
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.nano_tokenizer import CHUNKS, build_tokenizer, tool_chunks
from nemo_cascade.data.nano_words import ANIMALS, COLORS, DAYS, NAMES, THINGS
from nemo_cascade.types import Message

NANO = Path(nemo_cascade.__file__).parent / "models" / "nano" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(NANO)


def test_size_and_special_ids(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.pad_id == 0
    assert tokenizer.begin_ids == (1,)
    assert tokenizer.stop_ids == (tokenizer.im_end_id, 2)
    assert tokenizer.im_end_id == 4


def test_any_text_survives(tokenizer: ChatTokenizer) -> None:
    for text in (
        "",
        "frog",
        "Gr\u00fc\u00dfe \u4f60\u597d \U0001f438\n\t x",
        "def f(x):\n    return x*5",
        "<|im_end|>",
        '{"a": [1, 2]}',
    ):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_digits_and_words_and_chunks_are_single(tokenizer: ChatTokenizer) -> None:
    assert len(tokenizer.encode_text("12345")) == 5
    for word in (*ANIMALS, *THINGS, *COLORS, *NAMES, *DAYS):
        assert len(tokenizer.encode_text(f" {word}")) == 1, word
    for chunk in CHUNKS:
        assert len(tokenizer._tokenizer.encode(chunk, add_special_tokens=False).ids) == 1, chunk
    assert len(tokenizer.messages_ids((Message("user", ""),), (), True)) == 2


def test_building_is_repeatable_and_complete(tmp_path: Path) -> None:
    some = {name: domains.load(name) for name in domains.available() if not name.startswith("swe")}
    first, second = build_tokenizer(tmp_path / "a", some), build_tokenizer(tmp_path / "b", some)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    again = ChatTokenizer(first)
    assert again.vocab_size == 512
    assert again.stop_ids == (4, 2)
    assert again.decode(again.encode_text("The frog is black.")) == "The frog is black."


def test_the_shipped_tokenizer_knows_every_nano_tool(tokenizer: ChatTokenizer) -> None:
    for chunk in tool_chunks({name: domains.load(name) for name in domains.available()}):
        assert len(tokenizer._tokenizer.encode(chunk, add_special_tokens=False).ids) == 1, chunk


def test_the_template_file_is_the_shipped_one() -> None:
    assert (NANO / "chat_template.jinja").read_text() == template.TEMPLATE_FILE.read_text()
    assert json.loads((NANO / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"


def test_transformers_reads_the_folder_alike(tokenizer: ChatTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(NANO)
    messages = (
        Message("system", "Be kind."),
        Message("user", "Tell me about the frog."),
        Message("assistant", "It is 7.", "hm"),
        Message("user", "And?"),
    )
    for thinking in (True, False):
        text = other.apply_chat_template(
            template.as_dicts(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert other(text, add_special_tokens=False)["input_ids"] == tokenizer.messages_ids(messages, (), thinking)
    assert other.pad_token_id == 0
    assert len(other) == 512
