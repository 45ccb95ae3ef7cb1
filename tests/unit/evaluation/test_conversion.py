"""`nemo-cascade convert`: every pair of formats, bit-exact, resumable after a kill, checked at the end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cascade import cli
from nemo_cascade.config.paths import PACKAGED
from nemo_cascade.evaluation import conversion
from nemo_cascade.models import hf_copy
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_folder import INDEX, content_sha256, read_header
from nemo_cascade.observe.transfer import TransferLine
from tests.flow.test_trouble import disk

ROOT = Path(__file__).resolve().parents[3]
NANO = PACKAGED["nano"]

# A conversion that is killed with SIGKILL after `sys.argv[1]` shards, or halfway through the next tensor's bytes.
DIES = """
import os, signal, sys
from nemo_cascade import cli
from nemo_cascade.models import hf_writer
after, midway, finished = int(sys.argv[1]), sys.argv[2] == "midway", 0
whole, put = hf_writer.ShardWriter._finish, hf_writer._put
def finish(self, shard):
    global finished
    whole(self, shard)
    finished += 1
    if finished == after and not midway:
        os.kill(os.getpid(), signal.SIGKILL)
def half(stream, data, offset):
    if finished == after and midway:
        put(stream, data.cast("B")[: data.nbytes // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    put(stream, data, offset)
hf_writer.ShardWriter._finish, hf_writer._put = finish, half
sys.exit(cli.main(sys.argv[3:]))
"""


def killed(words: list[str], after: int, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(after), where, *words], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def standing(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("model-*")}


@pytest.mark.parametrize("where", ["between", "midway"])
def test_a_killed_conversion_goes_on_behind_its_finished_shards(tmp_path: Path, capsys, where: str) -> None:
    words = ["convert", str(NANO), str(tmp_path / "out"), "--shard-size", "300KB"]
    killed(words, 3, where)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    before = standing(partial)
    damaged = partial / "model-00002-of-00008.safetensors"
    with damaged.open("r+b") as stream:  # a finished shard whose bytes are no longer those that were written
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))

    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip() == content_sha256(NANO)
    after = standing(tmp_path / "out")
    kept = [f"model-0000{number}-of-00008.safetensors" for number in (1, 3)]
    assert all(after[name] == before[name] for name in kept)
    assert after[damaged.name] != before[damaged.name]
    assert len(after) == 8
    assert content_sha256(tmp_path / "out", check=True) == content_sha256(NANO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_another_command_starts_afresh(tmp_path: Path, capsys) -> None:
    words = ["convert", str(NANO), str(tmp_path / "out"), "--shard-size", "300KB"]
    killed(words, 2, "between")
    before = standing(tmp_path / ".out.partial")
    assert cli.main([*words, "--dtype", "fp32"]) == 0
    headers = read_header(tmp_path / "out")
    assert {header.dtype for header in headers.values()} == {"F32"}
    assert capsys.readouterr().out.strip() == content_sha256(tmp_path / "out", check=True)
    assert not set(standing(tmp_path / "out").values()) & set(before.values())


def test_two_conversions_to_one_target(tmp_path: Path, capsys) -> None:
    with hf_copy.only_writer(tmp_path / ".out.partial", tmp_path / "out"):
        assert cli.main(["convert", str(NANO), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: another process is writing it; wait for it or stop it\n"


def test_what_recent_transformers_saves_becomes_the_published_form(tmp_path: Path, capsys) -> None:
    """`model.` names and experts in one tensor, read one expert at a time."""
    source = tmp_path / "packed"
    source.mkdir()
    tensors = load_file(NANO / "model.safetensors")
    packed = {name.replace("backbone.", "model."): part for name, part in tensors.items() if ".experts." not in name}
    for layer in NemotronHConfig.preset("nano").layers("E"):
        for which in ("up_proj", "down_proj"):
            stem = f"layers.{layer}.mixer.experts"
            packed[f"model.{stem}.{which}"] = torch.stack(
                [tensors[f"backbone.{stem}.{expert}.{which}.weight"] for expert in range(8)]
            )
    save_file(packed, source / "model.safetensors")
    (source / "config.json").write_text((NANO / "config.json").read_text())
    (source / "super_reasoning_parser.py").write_text("parser")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    (source / "tokenizer.json").write_text("{}")
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--shard-size", "300KB"]) == 0
    assert capsys.readouterr().out.strip() == content_sha256(NANO)  # bit for bit, whatever names it came under
    total = sum(header.size for header in read_header(NANO).values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == total
    assert (tmp_path / "out" / "super_reasoning_parser.py").read_text() == "parser"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 11]}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_transformers_loads_what_convert_writes(tmp_path: Path) -> None:
    """With its own class, and through `auto_map` and the code files of the folder."""
    transformers = pytest.importorskip("transformers")
    conversion.convert(NANO, tmp_path / "out", "fp32", 400_000)
    stored = dict(hf_copy.stored(tmp_path / "out"))
    for trusted in (False, True):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=trusted)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True, trust_remote_code=trusted
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert (config.model_type, model.config.routed_scaling_factor) == ("nemotron_h", 2.5)
        assert model.state_dict()["model.layers.2.mixer.experts.up_proj"].equal(
            torch.stack([stored[f"backbone.layers.2.mixer.experts.{expert}.up_proj.weight"] for expert in range(8)])
        )
    model.save_pretrained(tmp_path / "theirs")
    assert conversion.convert(tmp_path / "theirs", tmp_path / "back") == content_sha256(tmp_path / "out")


@pytest.mark.slow
def test_a_nemo_file_there_and_back_is_bit_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 folder -> .nemo (fp32 inside) -> bf16 folder; the parameters of a nano model are exact in both.

    Tokenizer, chat template, generation config and code files come back as well.
    """
    sha256 = conversion.convert(NANO, tmp_path / "bf16", "bf16")
    (tmp_path / "bf16" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "bf16" / "super_reasoning_parser.py").write_text("parser")
    assert conversion.convert(tmp_path / "bf16", tmp_path / "nano.nemo") == sha256
    assert conversion.convert(tmp_path / "nano.nemo", tmp_path / "back", "bf16", 300_000) == sha256
    wide = conversion.convert(tmp_path / "nano.nemo", tmp_path / "wide")
    assert wide == conversion.nemo_sha256(tmp_path / "nano.nemo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "bf16", "nano.nemo", "wide"]
    assert "tokenizer" not in capsys.readouterr().err
    beside = {path.name: path.read_bytes() for path in (tmp_path / "bf16").iterdir() if "model" not in path.name}
    beside = {name: content for name, content in beside.items() if name not in ("config.json", "checksums.json")}
    assert len(beside) >= 7 and beside.keys() > {"tokenizer.json", "chat_template.jinja", "super_reasoning_parser.py"}
    assert {name: (tmp_path / "back" / name).read_bytes() for name in beside} == beside


@pytest.mark.slow
def test_a_disk_too_small_for_a_nemo_file(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "2M") as small:
        with pytest.raises(conversion.UserError, match=r"nano\.nemo"):
            conversion.convert(NANO, small / "nano.nemo")
        assert list(small.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOURCE", "HERE"], "already there; give a new path"),
        (["SOURCE", "HERE/out", "--shard-size", "many"], "--shard-size: 'many' is not a size"),
        (["HERE/nowhere", "HERE/out"], "config.json is missing, this is not a complete Hugging Face folder"),
        (["HERE/nowhere.nemo", "HERE/out"], "nowhere.nemo: no such file"),
        (["SOURCE", "HERE/out", "--tokenizer", "HERE"], "no tokenizer.json there"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    places = {"SOURCE": str(NANO), "HERE": str(tmp_path)}
    filled = [word.replace("SOURCE", places["SOURCE"]).replace("HERE", places["HERE"]) for word in words]
    assert cli.main(["convert", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_vocabulary_never_gets_the_nano_tokenizer() -> None:
    large = NemotronHConfig.preset("nemotron_h_50m")
    assert conversion._tokenizer(None, None, large) is None
    assert conversion._tokenizer(None, None, NemotronHConfig.preset("nano")).name == "tokenizer"


def test_sizes() -> None:
    sizes = [conversion.size_in_bytes(text) for text in ("5GB", "300mb", "1.5G", "12 KB", "7")]
    assert sizes == [5_000_000_000, 300_000_000, 1_500_000_000, 12_000, 7]


def test_plain_progress_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    line = TransferLine(stream)
    line.begin("writing", 3, 6_000_000_000)
    line.started -= 4.0  # four seconds ago
    for size in (1_000_000_000, 2_000_000_000):
        line.advance(size)
    assert stream.getvalue() == ""  # less than five seconds since the last line
    assert line.describe(4.0) == "2/3 tensors  3.0 GB of 6.0 GB  0.75 GB/s  4s left"
    line.advance(3_000_000_000)
    assert stream.getvalue().startswith("writing    3/3 tensors  6.0 GB of 6.0 GB  1.")
    assert stream.getvalue().endswith(" GB/s  0s left\n")
