"""Names of folders, and files that are complete or absent."""

import errno
import os
from pathlib import Path

import pytest

from nemo_cascade.config.paths import NANO_TOKENIZER, PACKAGED, conf_dir, hf_folder, tokenizer_folder, write_atomic
from nemo_cascade.types import UserError


def test_hf_names():
    assert hf_folder("hf:nano") == PACKAGED["nano"]
    assert hf_folder("hf:nano").parts[-3:] == ("models", "nano", "base")
    assert hf_folder("hf:nano_judge").parts[-1] == "judge"
    assert hf_folder("hf:some/folder") == Path("some/folder")
    assert (conf_dir() / "cascade" / "nano.yaml").is_file()


def test_a_checkpoint_has_its_own_tokenizer_or_the_nano_vocabulary(tmp_path):
    assert tokenizer_folder(tmp_path, 512) == NANO_TOKENIZER
    with pytest.raises(UserError) as caught:
        tokenizer_folder(tmp_path, 131072)
    assert str(caught.value).startswith(
        f"{tmp_path}: no tokenizer.json, and the nano tokenizer has 512 tokens where the model has 131072; put the tok"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(tmp_path, 131072) == tmp_path


def test_random_weights_have_room_for_the_nano_tokens():
    assert tokenizer_folder(None, 512) == tokenizer_folder(None, 16384) == NANO_TOKENIZER
    with pytest.raises(UserError, match="random weights: .* 512 tokens where the model has 256"):
        tokenizer_folder(None, 256)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left while writing") as caught:
        write_atomic(path, "new")
    assert str(tmp_path) in str(caught.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x.json", "{}")
