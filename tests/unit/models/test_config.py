from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import UserError


def test_the_published_model_has_its_published_size() -> None:
    config = NemotronHConfig.preset("nemotron_3_nano_30b_a3b")
    shapes = config.tensor_shapes()
    assert config.parameter_count() == 31_577_940_288
    assert len(shapes) == 6243
    assert config.active_parameter_count() == 3_227_754_816  # "3.2B active": the output layer counted, the table not
    assert [len(config.layers(kind)) for kind in "ME*"] == [23, 23, 6]
    assert config.layers("*") == [5, 12, 19, 26, 33, 42]
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (10304, 2688)
    assert shapes["backbone.layers.5.mixer.q_proj.weight"] == (4096, 2688)
    assert shapes["backbone.layers.51.mixer.experts.127.down_proj.weight"] == (2688, 1856)


def test_hf_json_round_trip() -> None:
    for name in ("nano", "nemotron_3_nano_30b_a3b"):
        config = NemotronHConfig.preset(name)
        content = config.to_hf_json()
        assert NemotronHConfig.from_hf_json(content) == config
        assert content["time_step_min"] < 1e-10  # transformers clamps by it, Megatron does not


def test_layers_block_type_is_read_where_the_pattern_is_missing() -> None:
    content = NemotronHConfig.preset("nano").to_hf_json()
    del content["hybrid_override_pattern"]
    content["layers_block_type"] = ["mamba", "full_attention", "moe"]
    assert NemotronHConfig.from_hf_json(content).hybrid_override_pattern == "M*E"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "M*X"}, "hybrid_override_pattern"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must lie in 1..n_routed_experts 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
        ({"hidden_size": "big"}, "hidden_size is 'big', int is needed"),
        ({"hiden_size": 3}, "did you mean hidden_size"),
    ],
)
def test_a_wrong_value_is_one_clear_line(changes: dict[str, object], message: str) -> None:
    fields = {**NemotronHConfig.preset("nano").__dict__, **changes}
    with pytest.raises(UserError) as caught:
        NemotronHConfig.from_mapping(fields)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"nano, nemotron_3_nano_30b_a3b"):
        NemotronHConfig.preset("nanno")


def test_a_broken_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("vocab_size: [")
    with pytest.raises(UserError, match=r"model\.yaml: not valid YAML"):
        NemotronHConfig.from_yaml(path)


def test_config_and_folder_reading_need_no_torch() -> None:
    program = (
        "import sys, nemo_cascade.models.config, nemo_cascade.models.hf_folder as f;"
        "nemo_cascade.models.config.NemotronHConfig.preset('nano').parameter_count();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
