"""The shipped nano tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nemo_cascade
from nemo_cascade import domains
from nemo_cascade.data import template
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.nano_tokenizer import CHUNKS, build_tokenizer
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
    for text in ("", "frog", "Gr\u00fc\u00dfe \u4f60\u597d \U0001f438\n\t x", "def f(x):\n    return x*5", "<|im_end|>", '{"a": [1, 2]}'):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_digits_and_words_and_chunks_are_single(tokenizer: ChatTokenizer) -> None:
    assert len(tokenizer.encode_text("12345")) == 5
    for word in (*ANIMALS, *THINGS, *COLORS, *NAMES, *DAYS):
        assert len(tokenizer.encode_text(f" {word}")) == 1, word
    for chunk in CHUNKS:
        assert len(tokenizer._tokenizer.encode(chunk, add_special_tokens=False).ids) == 1, chunk
    assert len(tokenizer.messages_ids((Message("user", ""),), (), True)) == 2


def test_built_again_it_is_the_same(tmp_path: Path) -> None:
    every = {name: domains.load(name) for name in domains.available()}
    build_tokenizer(tmp_path, every)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), f"{name}: run build_tokenizer for the shipped folder"


def test_the_template_file_is_the_shipped_one() -> None:
    assert (NANO / "chat_template.jinja").read_text() == template.TEMPLATE_FILE.read_text()
    assert json.loads((NANO / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"


def test_transformers_reads_the_folder_alike(tokenizer: ChatTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(NANO)
    messages = (Message("system", "Be kind."), Message("user", "Tell me about the frog."), Message("assistant", "It is 7.", "hm"), Message("user", "And?"))
    for thinking in (True, False):
        text = other.apply_chat_template(
            template.as_dicts(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert other(text, add_special_tokens=False)["input_ids"] == tokenizer.messages_ids(messages, (), thinking)
    assert other.pad_token_id == 0
    assert len(other) == 512
