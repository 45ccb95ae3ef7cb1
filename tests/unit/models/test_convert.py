from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cascade.models import convert, hf_folder, names, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import UserError


def exported(model: NemotronH, config: NemotronHConfig) -> dict[str, torch.Tensor]:
    return dict(convert.export_weights(model, config))


def other_model(config: NemotronHConfig) -> NemotronH:
    from nemo_cascade.learner.parallel import ParallelLayout

    return nemotron_h.build(config, ParallelLayout())


def test_export_has_the_published_names_shapes_and_order(model: NemotronH, config: NemotronHConfig) -> None:
    tensors = exported(model, config)
    assert [(name, tuple(tensor.shape)) for name, tensor in tensors.items()] == list(config.tensor_shapes().items())


def test_export_hands_out_copies(model: NemotronH, config: NemotronHConfig) -> None:
    before = exported(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(
        (after - before[name]).abs().max() > 0.5
        for name, after in exported(model, config).items()
        if "correction" not in name
    )


@pytest.mark.parametrize("style", ["published", "transformers"])
def test_import_of_export_is_bit_equal(model: NemotronH, config: NemotronHConfig, style: str) -> None:
    tensors = exported(model, config)
    named = dict(tensors)
    if style == "transformers":
        named = {
            name.replace("backbone.", "model."): tensor for name, tensor in tensors.items() if ".experts." not in name
        }
        for layer in config.layers("E"):
            for which in ("up_proj", "down_proj"):
                stem = f"layers.{layer}.mixer.experts"
                parts = [
                    tensors[f"backbone.{stem}.{expert}.{which}.weight"] for expert in range(config.n_routed_experts)
                ]
                named[f"model.{stem}.{which}"] = torch.stack(parts)
    target = other_model(config)
    convert.import_weights(target, config, reversed(named.items()))
    again = exported(target, config)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_folder_round_trip_and_content_hash(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    one = convert.save_folder(model, config, tmp_path / "one")
    many = convert.save_folder(model, config, tmp_path / "many", shard_bytes=300_000)
    assert one == many == hf_folder.content_sha256(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 5
    target = other_model(config)
    convert.load_folder(target, tmp_path / "many")
    tensors, again = exported(model, config), exported(target, config)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert hf_folder.read_config(tmp_path / "one") == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]  # nothing half-written stays


def test_the_hash_sees_one_changed_value(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    first = convert.save_folder(model, config, tmp_path / "hf")
    with torch.no_grad():
        model.decoder.layers[0].mixer.D[3] += 1e-3
    assert convert.save_folder(model, config, tmp_path / "hf") != first


def test_bf16_export_keeps_what_decides_in_fp32(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    convert.save_folder(model, config, tmp_path, dtype_policy="bf16")
    kept = {
        name.split("mixer.")[-1] for name, header in hf_folder.read_header(tmp_path).items() if header.dtype == "F32"
    }
    norms = {f"backbone.layers.{layer}.norm.weight" for layer in range(config.num_hidden_layers)}
    decides = {"gate.weight", "gate.e_score_correction_bias", "A_log", "D", "dt_bias", "norm.weight"}
    assert kept == {*decides, *norms, "backbone.norm_f.weight"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    convert.load_folder(model, tmp_path)


def test_tokenizer_files_travel(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "modeling_nemotron_h.py",
        "configuration_nemotron_h.py",
        "nano_reasoning_parser.py",
        "x.bin",
    ):
        (source / name).write_text(name)
    convert.save_folder(model, config, tmp_path / "hf", tokenizer_from=source)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "hf" / "nano_reasoning_parser.py").is_file()
    assert not (tmp_path / "hf" / "x.bin").exists()
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]


def test_a_wrong_shape_names_tensor_shapes_and_remedy_and_changes_nothing(
    model: NemotronH, config: NemotronHConfig, tmp_path: Path
) -> None:
    convert.save_folder(model, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.layers.1.mixer.k_proj.weight"] = torch.zeros(32, 128)
    tensors["lm_head.weight"] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    before = exported(model, config)
    with pytest.raises(UserError) as caught:
        convert.load_folder(model, tmp_path)
    for part in ("backbone.layers.1.mixer.k_proj.weight", "[32, 128]", "[64, 128]", "config.json"):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in exported(model, config).items())


def test_what_is_missing_is_named(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        convert.load_folder(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        convert.load_folder(model, tmp_path)
    convert.save_folder(model, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing, the first is backbone\.norm_f\.weight"):
        convert.load_folder(model, tmp_path)
    with pytest.raises(UserError, match=r"norm_f\.weight; the checkpoint is incomplete"):
        convert.import_weights(model, config, tensors.items())
    with pytest.raises(UserError, match=r"tensor rotary does not belong"):
        convert.import_weights(model, config, [("rotary", torch.zeros(1))])
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut short"):
        convert.load_folder(model, tmp_path)


def test_a_failed_export_leaves_the_old_folder(model: NemotronH, config: NemotronHConfig, tmp_path: Path) -> None:
    sha256 = convert.save_folder(model, config, tmp_path / "hf")

    def broken():  # type: ignore[no-untyped-def]
        yield "lm_head.weight", torch.zeros(config.vocab_size, config.hidden_size)
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"no way to write hf \(disk full\)"):
        convert.save_folder(broken(), config, tmp_path / "hf")
    assert hf_folder.content_sha256(tmp_path / "hf") == sha256
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_kv_groups_spread_over_ranks_are_cut_where_megatron_cuts_them() -> None:
    # 4 query heads and 2 KV groups over 4 ranks: q0 q1 | k0 v0 | q2 q3 | k1 v1
    nano = NemotronHConfig.preset("nano")
    config = dataclasses.replace(nano, num_attention_heads=4, num_key_value_heads=2, head_dim=1)
    parts = {"q": torch.arange(4.0)[:, None], "k": torch.tensor([[10.0], [11]]), "v": torch.tensor([[20.0], [21]])}
    held = []
    for rank in range(4):
        local = torch.full((2, 1), -1.0)
        group = SimpleNamespace(size=lambda: 4, rank=lambda own=rank: own)
        for which, rows in parts.items():
            names._fused_rows(local, which, config, 4).write(rows, group)
        held.append(local[:, 0].tolist())
    assert held == [[0, 1], [10, 20], [2, 3], [11, 21]]
