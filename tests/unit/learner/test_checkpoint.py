import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_cascade.learner import checkpoint, folder
from nemo_cascade.learner.training_state import TrainingState
from nemo_cascade.types import UserError

pytestmark = pytest.mark.usefixtures("ranks")
MODEL = {"hidden_size": 4}


def state(**tensors: torch.Tensor) -> TrainingState:
    made = TrainingState()
    for name, tensor in tensors.items():
        made.add(name, ShardedTensor.from_rank_offsets(name, tensor), tensor)
    return made


def save(path: Path, step: int, **tensors: torch.Tensor) -> None:
    checkpoint.CheckpointWriter().save(path, state(**tensors), {"step": step, "model": MODEL})


def load(path: Path, **tensors: torch.Tensor) -> int:
    return checkpoint.load(path, state(**tensors), MODEL)["step"]


def test_state_comes_back_with_the_random_stream(tmp_path: Path):
    torch.manual_seed(7)
    save(tmp_path / "step", 3, a=torch.arange(5), b=torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    drawn = torch.rand(4)
    a, b = torch.zeros(5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bfloat16)
    assert load(tmp_path / "step", a=a, b=b) == 3
    assert torch.equal(a, torch.arange(5))
    assert torch.equal(b, torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    assert torch.equal(torch.rand(4), drawn)


def test_megatron_reads_what_is_written(tmp_path: Path):
    save(tmp_path / "step", 3, a=torch.arange(5))
    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path / "step"))
    assert torch.equal(dist_checkpointing.load_plain_tensors(str(tmp_path / "step"))["a"], torch.arange(5))


def test_an_asynchronous_save_holds_the_values_of_its_moment(tmp_path: Path):
    writer = checkpoint.CheckpointWriter(asynchronous=True)
    a = torch.ones(1_000_000)
    for step in (1, 2):
        writer.save(tmp_path / f"step_{step}", state(a=a), {"step": step, "model": MODEL})
        a.add_(1.0)
    assert (tmp_path / "step_1").is_dir()  # the second save waited for the first
    writer.finish()
    loaded = torch.zeros(1_000_000)
    for step in (1, 2):
        assert load(tmp_path / f"step_{step}", a=loaded) == step
        assert loaded.eq(float(step)).all()


def test_a_failed_asynchronous_save_is_raised_at_the_next_call(tmp_path: Path):
    writer = checkpoint.CheckpointWriter(asynchronous=True)
    (tmp_path / "file").write_text("no folder")
    writer.save(tmp_path / "file" / "step", state(a=torch.ones(1)), {"step": 1, "model": MODEL})
    with pytest.raises(UserError, match="file/step: the training checkpoint could not be written"):
        writer.finish()
    writer.save(tmp_path / "step", state(a=torch.ones(1)), {"step": 2, "model": MODEL})
    writer.finish()
    assert load(tmp_path / "step", a=torch.zeros(1)) == 2


def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path):
    path = tmp_path / "step"
    save(path, 1, a=torch.ones(2))

    def fill_the_disk(aside: Path) -> None:
        (aside / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=f"{path}: no room left to write the weights.*previous one is untouched"):
        folder.write_folder(path, "the weights", fill_the_disk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]
    assert load(path, a=torch.zeros(2)) == 1


FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from nemo_cascade.learner import parallel
from nemo_cascade.types import UserError
from tests.unit.learner.test_checkpoint import load, save
parallel.start()
folder = Path(sys.argv[1])
save(folder, 1, a=torch.ones(10))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save(folder, 2, a=torch.ones(1_000_000))
except UserError as error:
    print(error)
print(load(folder, a=torch.zeros(10)), sorted(path.name for path in folder.parent.iterdir()))
parallel.stop()
"""


def test_a_file_that_really_cannot_grow_is_one_clear_line(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", FILL, str(tmp_path / "step")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith(f"{tmp_path / 'step'}: ")
    assert "no room left to write the training checkpoint (File too large)" in lines[0]
    assert lines[1] == "1 ['step']"


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path: Path):
    partial = tmp_path / ".step.partial"
    partial.mkdir()
    (partial / "junk").write_text("half")
    save(tmp_path / "step", 5, a=torch.ones(1))
    assert not partial.exists()
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [
        ".metadata", "__0_0.distcp", "checkpoint.json", "common.pt", "metadata.json",
    ]  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "step", 5, a=torch.ones(100, 3), b=torch.ones(50))
    return tmp_path / "step"


def refused(saved: Path, said: str) -> None:
    """Loading is refused with this one line, and nothing is overwritten."""
    a, b = torch.zeros(100, 3), torch.zeros(50)
    with pytest.raises(UserError, match=f"^{re.escape(str(saved))}{said}$"):
        load(saved, a=a, b=b)
    assert not a.any() and not b.any()


def test_a_missing_file_is_named(saved: Path):
    (saved / "__0_0.distcp").unlink()
    refused(saved, "/__0_0.distcp: this file of the checkpoint is missing; delete .* to resume from an older one")
    (saved / ".metadata").unlink()
    refused(saved, "/.metadata: the checkpoint's index cannot be read .*No such file.*")
    shutil.rmtree(saved)
    refused(saved, "/checkpoint.json: not a training checkpoint .*")


def test_a_cut_file_is_named(saved: Path):
    for name, said in ((".metadata", "the checkpoint's index cannot be read"), ("__0_0.distcp", "cut short, 700 of"),
                       ("common.pt", "the checkpoint cannot be read")):  # fmt: skip
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:700])
        refused(saved, f"/{name}: .*{said}.*; delete .*")
        (saved / name).write_bytes(whole)
    assert load(saved, a=torch.zeros(100, 3), b=torch.zeros(50)) == 5


def test_a_flipped_bit_is_named_with_its_tensor(saved: Path):
    content = bytearray((saved / "__0_0.distcp").read_bytes())
    content[content.rindex(torch.ones(50).numpy().tobytes()) + 101] ^= 1
    (saved / "__0_0.distcp").write_bytes(content)
    refused(saved, r"/__0_0.distcp: tensor b is not what was written \(checksum\); delete .*")


def test_another_models_checkpoint_is_refused(saved: Path):
    with pytest.raises(UserError, match="^.*/checkpoint.json: the checkpoint is of another model.*hidden_size"):
        checkpoint.load(saved, state(a=torch.zeros(100, 3)), {"hidden_size": 8})
    with pytest.raises(UserError, match=r"^.*/.metadata: tensor a has shape \[100, 3\].*needs \[3, 100\]"):
        load(saved, a=torch.zeros(3, 100))
    with pytest.raises(UserError, match="^.*/.metadata: tensor c is not in the checkpoint"):
        load(saved, a=torch.zeros(100, 3), c=torch.zeros(1))
    meta = json.loads((saved / "checkpoint.json").read_text())
    (saved / "checkpoint.json").write_text(json.dumps(meta | {"format": 1}))
    refused(saved, "/checkpoint.json: written in format 1, this version reads format 2; .*")


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (f"{os.environ['PYTEST_CURRENT_TEST'].split(':')[-1].split()[0]}.trap",)


def test_an_index_that_would_run_code_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved)
    (saved / ".metadata").write_bytes(pickle.dumps(Trap()))
    refused(saved, "/.metadata: the checkpoint's index cannot be read .*mkdir does not belong there.*")
    assert not list(saved.glob("*.trap"))
