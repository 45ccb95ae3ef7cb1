"""The mean of checkpoints, tensor by tensor, against the same sum in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cascade import cli
from nemo_cascade.config.paths import PACKAGED
from nemo_cascade.models.hf_average import average_folders
from nemo_cascade.models.hf_copy import copy_folder
from nemo_cascade.models.hf_folder import CHECKSUMS, SINGLE, content_sha256, read_json
from nemo_cascade.types import UserError

NANO = PACKAGED["nano"]


def scaled(folder: Path, factor: float) -> Path:
    """The nano base with every weight multiplied. A hand-edited shard has no checksums."""
    copy_folder(NANO, folder)
    tensors = load_file(folder / SINGLE)
    save_file({name: (tensor * factor).to(tensor.dtype) for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / CHECKSUMS).unlink()
    return folder


def test_the_mean_is_rounded_once_to_the_dtype_of_the_sources(tmp_path: Path) -> None:
    sources = [NANO, scaled(tmp_path / "three", 3.0), scaled(tmp_path / "minus", -0.37)]
    average_folders(sources, tmp_path / "mean", shard_bytes=600_000)
    given = [load_file(folder / SINGLE) for folder in (*sources[1:],)]
    base = load_file(NANO / SINGLE)
    shards = sorted((tmp_path / "mean").glob("model-*.safetensors"))
    assert len(shards) > 2
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(found) == set(base)
    for name, tensor in found.items():
        exact = (base[name].double() + given[0][name].double() + given[1][name].double()) / 3
        assert torch.equal(tensor, exact.to(base[name].dtype)), name
    assert read_json(tmp_path / "mean" / "config.json") == read_json(tmp_path / "three" / "config.json")


def test_a_checkpoint_averaged_with_itself_is_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "hf:nano", str(tmp_path / "mean"), "--average", "hf:nano", "hf:nano"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == content_sha256(NANO)


def test_what_has_no_mean_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide"
    copy_folder(NANO, wide, "fp32")
    with pytest.raises(UserError, match=r"is F32, in .* it is BF16; bring both to one dtype first"):
        average_folders([NANO, wide], tmp_path / "mean")
    other = tmp_path / "other"
    shutil.copytree(NANO, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 1.5'))
    with pytest.raises(UserError, match="its routed_scaling_factor is not that of"):
        average_folders([NANO, other], tmp_path / "mean")
    assert cli.main(["convert", "hf:nano", str(tmp_path / "a"), "--average", str(tmp_path / "b.nemo")]) == 2
    assert "is a .nemo file; Hugging Face folders are averaged" in capsys.readouterr().err
    assert cli.main(["convert", "hf:nano", str(tmp_path / "a"), "--average", "hf:nano", "--dtype", "fp32"]) == 2
    assert not (tmp_path / "mean").exists()
    assert not list(tmp_path.glob(".mean*"))
