"""The 30B preset against what is published: names, shapes, counts and config fields, without one byte of weights.

Three independent tables must agree: ours, the Megatron model on the meta device, and transformers' own model there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_cascade.learner.parallel import ParallelLayout
from nemo_cascade.models import convert, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_extras import write_extras
from nemo_cascade.models.names import slots

PRESET = "nemotron_3_nano_30b_a3b"
PARAMETERS, TENSORS = 31_577_940_288, 6243
# method 8.3, by hand: (name below the layer, shape) for one layer of each kind, experts apart
HIDDEN = 2688
LAYER = {
    "M": {
        "norm.weight": (HIDDEN,),
        "mixer.in_proj.weight": (10304, HIDDEN),
        "mixer.conv1d.weight": (6144, 1, 4),
        "mixer.conv1d.bias": (6144,),
        "mixer.A_log": (64,),
        "mixer.D": (64,),
        "mixer.dt_bias": (64,),
        "mixer.norm.weight": (4096,),
        "mixer.out_proj.weight": (HIDDEN, 4096),
    },
    "*": {
        "norm.weight": (HIDDEN,),
        "mixer.q_proj.weight": (4096, HIDDEN),
        "mixer.k_proj.weight": (256, HIDDEN),
        "mixer.v_proj.weight": (256, HIDDEN),
        "mixer.o_proj.weight": (HIDDEN, 4096),
    },
    "E": {
        "norm.weight": (HIDDEN,),
        "mixer.gate.weight": (128, HIDDEN),
        "mixer.gate.e_score_correction_bias": (128,),
        "mixer.shared_experts.up_proj.weight": (3712, HIDDEN),
        "mixer.shared_experts.down_proj.weight": (HIDDEN, 3712),
        **{f"mixer.experts.{expert}.up_proj.weight": (1856, HIDDEN) for expert in range(128)},
        **{f"mixer.experts.{expert}.down_proj.weight": (HIDDEN, 1856) for expert in range(128)},
    },
}
ATTENTION = (5, 12, 19, 26, 33, 42)
EXPERTS = (1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51)


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the published checkpoint, from the table above."""
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.weight": (131072, HIDDEN),
        "backbone.norm_f.weight": (HIDDEN,),
        "lm_head.weight": (131072, HIDDEN),
    }
    for index in range(52):
        kind = "*" if index in ATTENTION else "E" if index in EXPERTS else "M"
        shapes.update({f"backbone.layers.{index}.{name}": shape for name, shape in LAYER[kind].items()})
    return shapes


def counts(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    return sum(math.prod(shape) for shape in shapes.values()), len(shapes)


def test_the_preset_has_every_published_tensor(expected: dict[str, tuple[int, ...]]) -> None:
    assert counts(expected) == (PARAMETERS, TENSORS)
    assert NemotronHConfig.preset(PRESET).tensor_shapes() == expected


def test_the_megatron_model_has_every_published_tensor(
    expected: dict[str, tuple[int, ...]], layout: ParallelLayout
) -> None:
    config = NemotronHConfig.preset(PRESET)
    with torch.device("meta"):
        model = nemotron_h.build(config, layout)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = {}
    for name, slot in slots(model, config):
        rows = sum(piece.shape[0] for piece in slot.pieces)
        assert slot.shape == (rows, *slot.pieces[0].shape[1:])
        assert sum(piece.view.numel() for piece in slot.pieces) == math.prod(slot.shape)
        found[name] = slot.shape
    assert found == expected
    held = sum(tensor.numel() for tensor in model.parameters())
    held += sum(tensor.numel() for name, tensor in model.named_buffers() if name.endswith("expert_bias"))
    assert held == PARAMETERS  # and no parameter that the table does not know


def test_transformers_has_every_published_tensor(expected: dict[str, tuple[int, ...]]) -> None:
    transformers = pytest.importorskip("transformers")
    content = json.loads(json.dumps(NemotronHConfig.preset(PRESET).to_hf_json()))
    with torch.device("meta"):
        theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**content))
    found = {}
    for packed, tensor in theirs.state_dict().items():
        for name, part in convert._canonical(packed, tensor):
            assert name not in found
            found[name] = tuple(part.shape)
    assert found == expected
    assert counts(found) == (PARAMETERS, TENSORS)


# The published config.json (method 8.1), written by hand; the two fields where an export differs on purpose are below.
PUBLISHED: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    },
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
    "max_position_embeddings": 262144,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "residual_in_fp32": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "expand": 2,
    "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32",
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "intermediate_size": 1856,
    "moe_intermediate_size": 1856,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 3712,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "use_mamba_kernels": True,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}
ON_PURPOSE = {"time_step_min": 1e-20, "time_step_init_min": 0.001, "mamba_n_groups": 8}


def test_the_exported_config_is_the_published_one_field_by_field(tmp_path: Path) -> None:
    write_extras(NemotronHConfig.preset(PRESET), tmp_path, "bfloat16", None)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content == PUBLISHED | ON_PURPOSE
    for key in ("n_group", "topk_group", "n_groups", "chunk_size", "vocab_size"):
        assert type(content[key]) is int, key  # engines compute with them; a float or a string fails late
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "configuration_nemotron_h.py", "modeling_nemotron_h.py",
    }  # fmt: skip


def test_the_published_config_is_read_as_the_preset() -> None:
    read = NemotronHConfig.from_hf_json(PUBLISHED | {"time_step_min": 0.001})
    assert read == NemotronHConfig.preset(PRESET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', a nemotron_h model is needed"),
        ({"moe_latent_size": 1024}, "moe_latent_size 1024 is not supported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported, this code needs 'relu2'"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1 is not supported"),
        ({"num_hidden_layers": 50}, "num_hidden_layers is 50, hybrid_override_pattern has 52 letters"),
        ({"n_group": 8}, "n_group 8 is not supported"),
        ({"n_group": "1"}, "n_group is '1', int is needed"),
    ],
)
def test_another_architecture_is_refused(changes: dict[str, Any], message: str) -> None:
    from nemo_cascade.types import UserError

    with pytest.raises(UserError) as caught:
        NemotronHConfig.from_hf_json(PUBLISHED | {"time_step_min": 0.001} | changes, "x/config.json")
    assert message in str(caught.value)
