"""What goes wrong while a stage runs: broken rows, broken checkpoints, bad judges, a full disk.

One line says what and how to repair it; what is done stays done, and the same command goes on after the repair.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.real_cascade import ROOT, Cascade, environment
from tests.flow.test_bad_input import JUDGED, JUDGED_STAGE, ONE_STAGE, RL, SFT, TWO_STAGES, refusal
from tests.unit.reward.judging import JudgeServer
from tests.waiting import there, wait_until

pytestmark = pytest.mark.slow
ROW = {"responses_create_params": {"input": [{"role": "user", "content": "1+1="}]}, "expected_answer": "2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Cascade:
    """One stage, done."""
    cascade = Cascade(tmp_path_factory.mktemp("trained"), ONE_STAGE, {"sft": SFT})
    done = cascade.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return cascade


def beside(trained: Cascade, folder: Path, head: str, stages: dict[str, str]) -> Cascade:
    """A cascade whose `sft` is the trained one."""
    cascade = Cascade(folder, head, stages)
    sft = trained.stage("sft").path
    shutil.copytree(sft, cascade.folder / sft.name)
    return cascade


def test_a_row_with_a_broken_field(trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    broken = {**ROW, "responses_create_params": {"input": 7}}
    rows.write_text(f"{json.dumps(ROW)}\n{json.dumps(broken)}\n")
    stages = {"sft": SFT, "rl": RL.replace("{math: 1}}", f"{{math: 1}}, files: {{math: [{rows}]}}}}")}
    cascade = beside(trained, tmp_path, TWO_STAGES, stages)
    said = refusal(cascade.run(), 1)
    assert said.startswith("stage rl failed (exit code 2): ")
    assert f"{rows}:2 responses_create_params: field 'input' must be a list, this is int" in said
    other = {**ROW, "responses_create_params": {"input": [{"role": "user", "content": "1+2="}]}}
    rows.write_text(f"{json.dumps(ROW)}\n{json.dumps(other)}\n")
    done = cascade.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/2] sft: done (" in done.stdout


def test_a_checkpoint_with_a_tensor_of_another_shape(trained, tmp_path):
    folder = tmp_path / "bent"
    shutil.copytree(trained.stage("sft").hf, folder)
    bend(folder / "model.safetensors", "backbone.norm_f.weight", [2, 64])
    done = Cascade(tmp_path, ONE_STAGE, {"sft": SFT.replace("init: base", f"init: hf:{folder}")}).run()
    said = refusal(done, 1)
    assert f"{folder}: tensor backbone.norm_f.weight has shape [2, 64], the model needs [128]" in said


def bend(path: Path, tensor: str, shape: list[int]) -> None:
    """Give a tensor of a safetensors file another shape of the same size."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[tensor]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def judged(folder: Path, url: str, timeout_s: float) -> str:
    judge = f"judge: {{url: '{url}/v1', timeout_s: {timeout_s}, retries: 0}}\n"
    return refusal(Cascade(folder, JUDGED_STAGE + judge, {"judged": JUDGED}).run(), 1)


def test_a_judge_that_hangs(tmp_path):
    with JudgeServer(lambda _: "{}", delay=20.0) as server:
        said = judged(tmp_path, server.url, 0.5)
    assert f"judge judge at {server.url}/v1/chat/completions gave no answer within 0.5 s" in said
    assert "4 of 4 rollouts are invalid, above 20%" in said
    assert "repair what scores them (judge, sandbox, network)" in said


def test_a_judge_that_answers_rubbish(tmp_path):
    with JudgeServer(lambda _: "as a language model I would rather not") as server:
        said = judged(tmp_path, server.url, 20.0)
    assert "the judge's 1 answers hold no scores; is it a judge?" in said
    assert "filters.max_invalid_share" in said


def test_transformer_engine_without_a_gpu(tmp_path):
    cascade = Cascade(tmp_path, ONE_STAGE, {"sft": SFT})
    said = refusal(cascade.run("hardware.layer_spec=te", "hardware.precision=hopper_fp8"), 1)
    assert "hardware.precision: hopper_fp8 needs a GPU and this machine has none; set it to fp32, or to " in said
    assert "hopper_fp8_emulated to see what FP8 does" in said


def test_a_port_in_use(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "nemo_cascade.rollout.server", "--port", str(port), "--model"]
        command.append(str(trained.stage("sft").hf))
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 2
    assert done.stderr == f"--port {port}: the port is in use on 127.0.0.1; choose another one, or 0 for a free one\n"


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own with little room."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_for_a_checkpoint(tmp_path):
    with disk(tmp_path / "disk", "8M") as small:
        cascade = Cascade(tmp_path, ONE_STAGE, {"sft": SFT})
        said = refusal(cascade.run(f"output={small}"), 1)
        assert "/checkpoints/step_000001: no room left to write the training checkpoint" in said
        assert "free space and start again" in said
        assert not list(small.glob("real/sft-*/checkpoints/*"))
        subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
        done = cascade.run(f"output={small}")
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_limit_on_the_size_of_files(tmp_path):
    """`ulimit -f` in 512 or 1024 bytes, by shell: too little for a checkpoint of 13 MB either way."""
    cascade = Cascade(tmp_path, ONE_STAGE, {"sft": SFT})
    limited = ["bash", "-c", 'ulimit -f 4096; exec "$@"', "bash", *cascade.command()]
    done = subprocess.run(
        limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    said = refusal(done, 1)
    assert "/checkpoints/step_000001: no room left to write the training checkpoint (File too large)" in said


def test_a_disk_that_fills_up_while_metrics_are_written(tmp_path):
    long = SFT.replace("num_steps: 1", "num_steps: 60\nsave_every: 3")
    with disk(tmp_path / "disk", "64M") as small:
        cascade = Cascade(tmp_path, ONE_STAGE, {"sft": long})
        filler = threading.Thread(target=fill_after, args=(small, "real/sft-*/checkpoints/step_000003/*"))
        filler.start()
        done = cascade.run(f"output={small}")
        filler.join()
        said = refusal(done, done.returncode)
        assert "no space left while writing" in said or "no room left to write" in said
        assert "free space and" in said
        (small / "filler").unlink()
        done = cascade.run(f"output={small}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert ", on from step " in done.stdout
        steps = [json.loads(line)["step"] for line in next(small.glob("real/sft-*/metrics.jsonl")).open()]
        assert steps == list(range(60))


def fill_after(folder: Path, pattern: str) -> None:
    """Wait for the file, then leave no byte free."""
    wait_until(lambda: there(folder, pattern), pattern, 0.01)
    with (folder / "filler").open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
