"""What a `.nemo` file carries beside its weights; a damaged one is refused with its name before anything is loaded."""

from __future__ import annotations

import gc
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_cascade.config.paths import NANO_TOKENIZER, PACKAGED
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.types import UserError

TENSOR = "backbone.layers.2.mixer.experts.0.down_proj.weight"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # the weights are all but a few kilobytes
    file.write_bytes(content)


def text(file: Path) -> None:
    file.write_text("no archive")


def repacked(end: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """The same file with another content (None: without it) of what is called so, written without a fault."""

    def rewrite(file: Path) -> None:
        with tarfile.open(file) as archive:
            kept = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
            parts = {name: stream.read() for name, stream in kept.items() if stream is not None}
        name = next(name for name in parts if name.endswith(end))
        parts[name] = change(parts[name])
        with tarfile.open(file, "w") as archive:
            for part, content in parts.items():
                if content is not None:
                    member = tarfile.TarInfo(part)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    return rewrite


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The same file with other tensors."""

    def other(content: bytes) -> bytes:
        tensors = torch.load(io.BytesIO(content), weights_only=True)
        change(tensors)
        stored = io.BytesIO()
        torch.save(tensors, stored)
        return stored.getvalue()

    return repacked(".ckpt", other)


DAMAGE = {
    "cut short": (cut, "damaged or cut short"),
    "a flipped bit": (flip, "damaged"),
    "another file": (text, "not a .nemo file"),
    "a missing tensor": (rewritten(lambda tensors: tensors.pop(TENSOR)), f"the first is {TENSOR}"),
    "an extra tensor": (rewritten(lambda tensors: tensors.update(extra=torch.ones(1))), "tensor extra does not belong"),
    "a wrong shape": (rewritten(lambda tensors: tensors.update({TENSOR: torch.ones(3, 5)})), f"{TENSOR} has shape"),
    "a flipped bit in the tokenizer": (
        repacked("_tokenizer.json", lambda old: old[:99] + bytes([old[99] ^ 1]) + old[100:]),
        "tokenizer.json is damaged",
    ),
    "no chat template": (repacked("_chat_template.jinja", lambda _: None), "chat_template.jinja is missing"),
    "checksums of nothing": (repacked("_carried_sha256.json", lambda old: old[:40]), "damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(
    config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path, what: str
) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    file = tmp_path / "policy.nemo"
    cfg = model_config(config, layout)
    cfg.tokenizer = str(NANO_TOKENIZER)
    CascadeModel(cfg).save_to(str(file))
    CascadeModel.restore_from(str(file))
    damage, message = DAMAGE[what]
    damage(file)
    with pytest.raises(UserError) as caught:
        CascadeModel.restore_from(str(file))
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizer_and_chat_template_come_back(layout: ParallelLayout, tmp_path: Path) -> None:
    """Through two files, when neither the folder nor the first file is there any more."""
    from nemo_cascade.models.cascade_model import CascadeModel

    source = tmp_path / "hf"
    shutil.copytree(PACKAGED["nano"], source)
    (source / "super_reasoning_parser.py").write_text("# by the model's authors\n")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
             "super_reasoning_parser.py")  # fmt: skip
    expected = {name: (source / name).read_bytes() for name in names}
    CascadeModel.from_hf(source).save_to(str(tmp_path / "one.nemo"))
    shutil.rmtree(source)
    first = CascadeModel.restore_from(str(tmp_path / "one.nemo"))
    (tmp_path / "one.nemo").unlink()
    first.save_to(str(tmp_path / "two.nemo"))
    folder = first.tokenizer_folder
    del first
    gc.collect()
    assert not folder.exists()  # a model's copy goes with the model
    model = CascadeModel.restore_from(str(tmp_path / "two.nemo"), override_config_path={"seed": 5})
    assert {name: (model.tokenizer_folder / name).read_bytes() for name in names} == expected
    assert isinstance(model.tokenizer, ChatTokenizer) and model.tokenizer is model.tokenizer
    nano = ChatTokenizer(NANO_TOKENIZER)
    assert model.tokenizer.encode_text("2 + 2 = 4") == nano.encode_text("2 + 2 = 4")
    assert model.tokenizer.stop_ids == nano.stop_ids


def test_a_tokenizer_is_replaced_and_may_be_absent(
    config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path
) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    bare = CascadeModel(model_config(config, layout))
    assert bare.tokenizer is None and bare.tokenizer_folder is None
    bare.save_to(str(tmp_path / "bare.nemo"))
    assert CascadeModel.restore_from(str(tmp_path / "bare.nemo")).tokenizer is None
    given = CascadeModel.restore_from(
        str(tmp_path / "bare.nemo"), override_config_path={"tokenizer": str(NANO_TOKENIZER)}
    )
    assert given.tokenizer.im_end_id == ChatTokenizer(NANO_TOKENIZER).im_end_id
    given.save_to(str(tmp_path / "given.nemo"))
    other = tmp_path / "other"
    shutil.copytree(NANO_TOKENIZER, other)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    back = CascadeModel.restore_from(str(tmp_path / "given.nemo"), override_config_path={"tokenizer": str(other)})
    assert (back.tokenizer_folder / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(UserError, match="tokenizer /nowhere: no such folder"):
        CascadeModel.restore_from(str(tmp_path / "bare.nemo"), override_config_path={"tokenizer": "/nowhere"})
