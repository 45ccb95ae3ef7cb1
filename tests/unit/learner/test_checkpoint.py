import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cascade.learner import checkpoint, parallel
from nemo_cascade.types import UserError


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    started = parallel.is_started()
    if not started:
        parallel.start()
    yield
    if not started:
        parallel.stop()


def test_state_comes_back_with_the_random_stream(tmp_path: Path):
    torch.manual_seed(7)
    checkpoint.save(tmp_path / "step", {"a": torch.arange(5)}, {"step": 3})
    drawn = torch.rand(4)
    state, meta = checkpoint.load(tmp_path / "step")
    assert torch.equal(state["a"], torch.arange(5))
    assert meta["step"] == 3
    assert torch.equal(torch.rand(4), drawn)


def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path):
    folder = tmp_path / "step"
    checkpoint.save(folder, {"a": torch.ones(2)}, {"step": 1})

    def fill_the_disk(aside: Path) -> None:
        (aside / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=f"{folder}: no room left to write the weights.*previous one is untouched"):
        checkpoint.write_folder(folder, "the weights", fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert checkpoint.load(folder)[1]["step"] == 1


FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from nemo_cascade.learner import checkpoint, parallel
from nemo_cascade.types import UserError
parallel.start()
folder = Path(sys.argv[1])
checkpoint.save(folder, {"a": torch.ones(10)}, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.save(folder, {"a": torch.ones(1_000_000)}, {"step": 2})
except UserError as error:
    print(error)
print(checkpoint.load(folder)[1]["step"], sorted(path.name for path in folder.parent.iterdir()))
parallel.stop()
"""


def test_a_file_that_really_cannot_grow_is_one_clear_line(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", FILL, str(tmp_path / "step")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith(f"{tmp_path / 'step'}: ")
    assert "no room left to write the training checkpoint (File too large)" in lines[0]
    assert lines[1] == "1 ['step']"


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path: Path):
    partial = tmp_path / ".step.partial"
    partial.mkdir()
    (partial / "junk").write_text("half")
    checkpoint.save(tmp_path / "step", {"a": torch.ones(1)}, {"step": 5})
    assert not partial.exists()
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [
        "checkpoint.json", "random.pt", "tensor0_pipeline0_expert0.pt",
    ]  # fmt: skip


def test_a_cut_or_foreign_checkpoint_is_named(tmp_path: Path):
    folder = tmp_path / "step"
    with pytest.raises(UserError, match="not a training checkpoint"):
        checkpoint.load(folder)
    checkpoint.save(folder, {"a": torch.ones(100)}, {"step": 5})
    part = folder / checkpoint.part_name()
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{part}: the checkpoint cannot be read"):
        checkpoint.load(folder)
    meta = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(meta | {"parts": ["a", "b"]}))
    with pytest.raises(UserError, match="as 2 model-parallel parts.*resume with the layout"):
        checkpoint.load(folder)
