"""Bad Hugging Face folders and full disks: one line that names tensor and file; nothing changes, nothing is left."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cascade.config.paths import PACKAGED
from nemo_cascade.models import convert, hf_copy, hf_folder
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import CHECKSUMS, INDEX, content_sha256, file_header, raw_header
from nemo_cascade.models.hf_writer import WriteFailed
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.types import UserError
from tests.flow.test_trouble import disk

ROOT = Path(__file__).resolve().parents[3]
NANO = PACKAGED["nano"]
DOWN = "backbone.layers.2.mixer.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in a dozen shards, with checksums."""
    folder = tmp_path_factory.mktemp("sound") / "hf"
    hf_copy.copy_folder(NANO, folder, shard_bytes=200_000)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "hf")


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """What a user does who edits a shard: a valid file with other tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path, tensor: str) -> None:
    file.write_bytes(file.read_bytes()[: file_header(file)[tensor].end - 1])


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def flip_payload(file: Path, tensor: str) -> None:
    header = file_header(file)[tensor]
    flip(file, (header.begin + header.end) // 2)


def flip_name(file: Path, tensor: str) -> None:
    flip(file, file.read_bytes().index(tensor.encode()) + len(tensor) - 1)  # weight -> weighu


def flip_metadata(file: Path, tensor: str) -> None:
    flip(file, file.read_bytes().index(b'"pt"') + 1)  # no tensor notices


def cut_header(file: Path, tensor: str) -> None:
    file.write_bytes(file.read_bytes()[: len(raw_header(file)) - 4])


def drop(file: Path, tensor: str) -> None:
    rewrite(file, lambda tensors: tensors.pop(tensor))


def add(file: Path, tensor: str) -> None:
    rewrite(file, lambda tensors: tensors.update({"backbone.layers.2.mixer.rotary.weight": torch.zeros(3)}))


def bend(file: Path, tensor: str) -> None:
    rewrite(file, lambda tensors: tensors.update({tensor: torch.zeros(3, 5)}))


def remove(file: Path, tensor: str) -> None:
    file.unlink()


DAMAGE = {
    "truncated": (cut, (f"cut short, {DOWN} ends at byte",)),
    "truncated in its header": (cut_header, ("not a safetensors file, or cut short",)),
    "a flipped bit in the payload": (flip_payload, (f"tensor {DOWN} is not the one that {CHECKSUMS} records",)),
    "a flipped bit in a name": (flip_name, (f"tensor {DOWN} is missing", "moreover the header of", CHECKSUMS)),
    "a flipped bit in the metadata": (flip_metadata, ("the header of", f"is not the one that {CHECKSUMS} records")),
    "a missing tensor": (drop, (f"tensor {DOWN} is missing, {INDEX} says that it is there",)),
    "an extra tensor": (add, ("tensor backbone.layers.2.mixer.rotary.weight in", "does not belong to this model")),
    "a wrong shape": (bend, (f"tensor {DOWN} has shape [3, 5], the model needs [128, 128]",)),
    "a missing shard": (remove, ("is missing, this is not a complete Hugging Face folder",)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_before_anything_changes(folder: Path, model: NemotronH, what: str) -> None:
    damage, parts = DAMAGE[what]
    file = shard_of(folder, DOWN)
    damage(file, DOWN)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for use in (
        lambda: convert.load_folder(model, folder),
        lambda: hf_copy.copy_folder(folder, folder.parent / "copy"),
        lambda: LocalSampler.from_folder(folder),
    ):
        with pytest.raises(UserError) as caught:
            use()
        for part in (*parts, file.name):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_every_single_flipped_bit_is_seen(tmp_path: Path) -> None:
    hf_copy.copy_folder(NANO, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    size = len(raw_header(file))
    generator = torch.Generator().manual_seed(4)
    spots = [*range(0, size, 997), *torch.randint(size, len(content), (6,), generator=generator).tolist()]
    config = NemotronHConfig.preset("nano")
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1 << (spot % 8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors|hf: tensor|tensors are missing"):
            hf_folder.read_checked_header(tmp_path / "hf", config)
            hf_folder.verify(tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama', a nemotron_h model is needed"),
        ({"hidden_size": 64}, "tensor backbone.embeddings.weight has shape [512, 128], the model needs [512, 64]"),
        ({"n_routed_experts": 4}, "tensor backbone.layers.2.mixer.gate.weight has shape [8, 128]"),
        ({"hybrid_override_pattern": "M*EM*M"}, "tensor backbone.layers.5.mixer.gate.weight in model"),
    ],
)
def test_another_architectures_config(folder: Path, changes: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError) as caught:
        hf_copy.copy_folder(folder, folder.parent / "copy")
    assert message in str(caught.value)
    assert [entry.name for entry in folder.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize(("key", "value"), [("routed_scaling_factor", 1.0), ("num_experts_per_tok", 4)])
def test_weights_that_fit_by_shape_alone(folder: Path, model: NemotronH, key: str, value: float) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"config\.json: {key} is {value}, this run's model has"):
        convert.load_folder(model, folder)


def test_a_quantised_checkpoint(folder: Path, model: NemotronH) -> None:
    (folder / CHECKSUMS).unlink()
    rewrite(shard_of(folder, DOWN), lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match=rf"tensor {DOWN} is stored as F8_E4M3"):
        convert.load_folder(model, folder)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "1M") as small:
        for write in (
            lambda: hf_copy.copy_folder(NANO, small / "hf", shard_bytes=400_000),
            lambda: convert.save_folder(tensors(), NemotronHConfig.preset("nano"), small / "hf", "bf16"),
        ):
            with pytest.raises(WriteFailed, match=r"disk: no room left .*safetensors: 0\.002 GB are needed") as caught:
                write()
            assert caught.value.errno == errno.ENOSPC  # a stage's export tells it as any other failed write
            assert list(small.iterdir()) == []


def tensors() -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in NemotronHConfig.preset("nano").tensor_shapes().items()]


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    """`ulimit -f` refuses in the middle of a file, as a disk does that others fill too."""
    sha256 = hf_copy.copy_folder(NANO, tmp_path / "hf")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    program = (
        "import sys; from nemo_cascade.models import hf_copy\n"
        "try: hf_copy.copy_folder(sys.argv[1], sys.argv[2])\n"
        "except OSError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(NANO), str(tmp_path / "hf")],
        cwd=ROOT,
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith(f"WriteFailed {tmp_path}: no way to write tensor backbone.layers."), done.stderr
    assert "into model.safetensors (File too large); free space and run again\n" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    assert content_sha256(tmp_path / "hf", check=True) == sha256
