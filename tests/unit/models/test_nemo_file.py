"""A damaged `.nemo` file is refused with its name before anything is loaded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The same file with other tensors, written without a fault."""

    def rewrite(file: Path) -> None:
        with tarfile.open(file) as archive:
            kept = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
            parts = {name: stream.read() for name, stream in kept.items() if stream is not None}
        name = next(name for name in parts if name.endswith(".ckpt"))
        tensors = torch.load(io.BytesIO(parts[name]), weights_only=True)
        change(tensors)
        stored = io.BytesIO()
        torch.save(tensors, stored)
        parts[name] = stored.getvalue()
        with tarfile.open(file, "w") as archive:
            for part, content in parts.items():
                member = tarfile.TarInfo(part)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    return rewrite


DAMAGE = {
    "cut short": (cut, "damaged or cut short"),
    "a flipped bit": (flip, "damaged"),
    "another file": (text, "not a .nemo file"),
    "a missing tensor": (rewritten(lambda tensors: tensors.pop(TENSOR)), f"the first is {TENSOR}"),
    "an extra tensor": (rewritten(lambda tensors: tensors.update(extra=torch.ones(1))), "tensor extra does not belong"),
    "a wrong shape": (rewritten(lambda tensors: tensors.update({TENSOR: torch.ones(3, 5)})), f"{TENSOR} has shape"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(
    config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path, what: str
) -> None:
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    file = tmp_path / "policy.nemo"
    CascadeModel(model_config(config, layout)).save_to(str(file))
    CascadeModel.restore_from(str(file))
    damage, message = DAMAGE[what]
    damage(file)
    with pytest.raises(UserError) as caught:
        CascadeModel.restore_from(str(file))
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
