"""`nemo-cascade parity`: what a user types, and what the exit code, the table and the JSON say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cascade import cli
from nemo_cascade.config.paths import NANO_TOKENIZER, PACKAGED
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.evaluation.parity import Prompts
from nemo_cascade.learner.parallel import ParallelLayout

NANO = PACKAGED["nano"]
FEW = ["--prompts", "5", "--max-tokens", "60"]
pytestmark = pytest.mark.skipif(not (NANO / "config.json").is_file(), reason="the nano base is not trained yet")


@pytest.fixture
def parity(
    layout: ParallelLayout, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*words: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["parity", *words, *FEW, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the nano base with other weights."""
    shutil.copytree(NANO, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_nano_base_computes_the_same_in_both_engines(parity) -> None:
    code, found = parity("hf:nano", "hf:nano")
    assert code == 0
    assert (found["a"]["engine"], found["b"]["engine"]) == ("megatron", "transformers")
    assert 0 < found["p99"] <= found["max_logprob_difference"] < 5e-5
    assert (found["agrees"], found["tolerance"], found["first_bad_layer"]) == (True, 1e-4, None)
    assert [(layer["name"], layer["kind"]) for layer in found["layers"]] == [
        ("backbone.embeddings", "embedding"),
        ("backbone.layers.0", "mamba"), ("backbone.layers.1", "attention"), ("backbone.layers.2", "experts"),
        ("backbone.layers.3", "mamba"), ("backbone.layers.4", "attention"), ("backbone.layers.5", "experts"),
        ("backbone.norm_f", "norm"), ("lm_head", "head"),
    ]  # fmt: skip
    assert all(layer["cosine"] > 1 - 1e-9 and layer["max_difference"] < 1e-3 for layer in found["layers"])
    assert found["sequences"] == 5 and 100 < found["positions"] <= 300
    assert set(found["modes"]) == {"packed", "unpacked"}


def test_a_spoilt_conversion_is_found_by_layer_and_tensor(parity, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = "backbone.layers.4.mixer.k_proj.weight"
        tensors[name] = tensors[name].roll(32, 0)
        tensors["backbone.layers.5.mixer.experts.6.down_proj.weight"] *= 1.5

    spoilt = str(changed(tmp_path / "spoilt", spoil))
    code, found = parity("hf:nano", spoilt)
    assert code == 1
    assert found["b"]["engine"] == "megatron"
    assert found["first_bad_layer"] == "backbone.layers.4"
    assert found["bad_layers"] == ["backbone.layers.4", "backbone.layers.5"]
    assert found["max_logprob_difference"] > 1e-2
    rolled, scaled = found["tensors"]
    assert rolled["name"] == "backbone.layers.4.mixer.k_proj.weight"
    assert rolled["norm_a"] == pytest.approx(rolled["norm_b"], rel=1e-12)
    assert scaled["norm_b"] == pytest.approx(1.5 * scaled["norm_a"], rel=1e-3)

    code, found = parity(spoilt, "hf:nano", "--engine-b", "transformers")
    assert (code, found["first_bad_layer"], found["tensors"]) == (1, "backbone.layers.4", None)


def test_the_table_names_the_first_layer_that_differs(
    layout: ParallelLayout, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.3.mixer.D"].zero_()

    assert cli.main(["parity", "hf:nano", str(changed(tmp_path / "spoilt", spoil)), *FEW]) == 1
    lines = capsys.readouterr().out.splitlines()
    marked = [line.split()[0] for line in lines if line.endswith("  differs")]
    assert marked == ["backbone.layers.3"]
    assert "the first layer that differs is backbone.layers.3, mamba" in lines[-1]
    assert any(line.startswith("backbone.layers.3.mixer.D") for line in lines)


def test_the_tolerance_decides_the_exit_code(parity, tmp_path: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.norm_f.weight"] *= 1.01

    nudged = str(changed(tmp_path / "nudged", nudge))
    code, found = parity("hf:nano", nudged)
    assert code == 1 and found["first_bad_layer"] == "backbone.norm_f"
    assert parity("hf:nano", nudged, "--tolerance", "1.0")[0] == 0
    assert parity("hf:nano", "hf:nano", "--engine-b", "megatron", "--tolerance", "1e-30")[0] == 0  # bit-equal
    assert parity("hf:nano", "hf:nano", "--tolerance", "1e-12")[0] == 1


def test_a_router_scale_in_the_config_alone_is_seen_and_said(parity, tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "scaled")
    path = tmp_path / "scaled" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"routed_scaling_factor": 1.0}))
    code, found = parity("hf:nano", str(tmp_path / "scaled"))
    assert (code, found["bad_layers"], found["tensors"]) == (1, ["backbone.layers.2", "backbone.layers.5"], [])
    assert found["notes"] == ["config.json differs: routed_scaling_factor is 2.5 in A and 1.0 in B"]


def test_a_clamp_of_the_time_step_is_explained(parity, tmp_path: Path) -> None:
    """The published config makes transformers clamp; nano's time steps are large enough that 0.05 shows."""
    shutil.copytree(NANO, tmp_path / "clamped")
    path = tmp_path / "clamped" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_min": 0.05}))
    code, found = parity(str(tmp_path / "clamped"), str(tmp_path / "clamped"))
    assert (code, found["bad_layers"]) == (1, ["backbone.layers.0", "backbone.layers.3"])
    assert "transformers clamps the time step" in found["notes"][0]


def test_a_finished_stage_and_a_text_file(parity, tmp_path: Path) -> None:
    stage = tmp_path / "sft-1234abcd"
    shutil.copytree(NANO, stage / "hf")
    (stage / "config.yaml").write_text("kind: sft\n")
    assert cli.main(["parity", str(stage), "hf:nano"]) == 2
    (stage / "record.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("The fish is blue.\nIt swims.\n\n\nThe sun is yellow.\n")
    code, found = parity(str(stage), "hf:nano", "--text", str(text))
    assert (code, found["sequences"], found["a"]["path"]) == (0, 2, str(stage / "hf"))
    assert found["max_logprob_difference"] == 0.0 and found["tensors"] == []


@pytest.mark.slow
def test_a_nemo_file_in_both_engines(
    layout: ParallelLayout, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "nano.nemo")
    assert cli.main(["convert", "hf:nano", file]) == 0
    capsys.readouterr()
    results = []
    for words in (["hf:nano", file], [file, file]):
        assert cli.main(["parity", *words, *FEW, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert (results[0]["max_logprob_difference"], results[0]["tensors"]) == (0.0, [])
    assert results[1]["b"]["engine"] == "transformers"
    assert 0 < results[1]["max_logprob_difference"] < 5e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf:nano", "nowhere"], "B: nowhere: no such folder; give a Hugging Face folder"),
        (["none.nemo", "hf:nano"], "A: none.nemo: no such file"),
        (["hf:nano", "WIDER"], "A and B are different architectures: hidden_size 128 and 256"),
        (["hf:nano", "VOCABULARY"], "A has a vocabulary of 512 tokens and B of 1024"),
        (["hf:nano", "hf:nano", "--text", "nowhere.txt"], "--text nowhere.txt: cannot be read as text"),
        (["hf:nano", "hf:nano", "--tolerance", "0"], "--tolerance 0.0: a positive number is needed"),
        (["hf:nano", "hf:nano", "--prompts", "0"], "--prompts and --max-tokens must be at least 1"),
        (["hf:nano", "CUT"], "model.safetensors: cut short"),
        (["hf:nano", "CUT", "--engine-b", "transformers"], "model.safetensors: cut short"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    layout: ParallelLayout, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((NANO / "config.json").read_text())
    for name, change in (("WIDER", {"hidden_size": 256}), ("VOCABULARY", {"vocab_size": 1024}), ("CUT", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content | change))
    (tmp_path / "CUT" / "model.safetensors").write_bytes((NANO / "model.safetensors").read_bytes()[:-1000])
    places = [str(tmp_path / word) if word.isupper() else word for word in words]
    assert cli.main(["parity", *places]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_prompts_are_drawn_by_seed_from_every_domain() -> None:
    tokenizer = ChatTokenizer(NANO_TOKENIZER)
    once, again, other = (Prompts(count=12, seed=seed).token_ids(tokenizer) for seed in (3, 3, 4))
    assert once == again and len(once) == 12
    assert sum(one != two for one, two in zip(once, other, strict=True)) > 8
    assert len({tuple(sequence) for sequence in once}) == 12
    assert max(map(len, Prompts(count=12, longest=20).token_ids(tokenizer))) == 20
    texts = [tokenizer.decode(sequence) for sequence in once]
    assert all("<|im_start|>assistant" in text for text in texts)
