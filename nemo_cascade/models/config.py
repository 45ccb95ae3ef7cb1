"""The shape of a NemotronH model: the fields of its Hugging Face config, its tensors and its size, without torch.

`nemo-cascade check` and `plan` read this on a login node; `models/nemotron_h.py` turns it into a Megatron-core config.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from nemo_cascade.config.paths import conf_dir
from nemo_cascade.types import Json, UserError

LAYER_KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention"}
HF_LAYER_SYMBOLS = {
    "linear_attention": "M", "mamba": "M", "moe": "E", "full_attention": "*", "attention": "*", "mlp": "-",
}  # fmt: skip
# transformers 5 clamps the time step from below by `time_step_min` when it prefills, not when it decodes; Megatron, the
# mamba_ssm kernels, vLLM, SGLang and TensorRT-LLM never clamp. An exported config carries this bound instead: too small
# to change anything in fp32 or bf16, and unlike 0 it has the logarithm that transformers' random initialisation takes.
NO_CLAMP = 1.0e-20
# What the published config.json says beside the fields of NemotronHConfig: every NemotronH that this code computes has
# these values, so the same table is exported and, on reading, refused where a value differs.
FIXED: dict[str, Json] = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
}
# Read by one engine or another, without effect on what is computed here.
INERT: dict[str, Json] = {
    "mamba_ssm_cache_dtype": "float32",
    "expand": 2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_in_fp32": False,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "use_mamba_kernels": True,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class NemotronHConfig:
    """The architecture of one NemotronH model under the names of its Hugging Face config.

    Widths count channels; `hybrid_override_pattern` has one letter per layer: M Mamba-2, E experts, * attention.
    `time_step_*` shape the random initialisation of dt_bias and never clamp at run time.
    """

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    conv_kernel: int = 4
    chunk_size: int = 128
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    layer_norm_epsilon: float = 1.0e-5
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1.0e-4
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse what no NemotronH can be, naming the key."""
        unknown = sorted(set(self.hybrid_override_pattern) - set(LAYER_KINDS))
        if unknown or not self.hybrid_override_pattern:
            raise UserError(
                f"model: hybrid_override_pattern {self.hybrid_override_pattern!r} must consist of "
                f"M (Mamba-2), E (experts) and * (attention); found {unknown or 'nothing'}"
            )
        for key, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
        ):
            whole, divisor = dataclasses.asdict(self)[key], dataclasses.asdict(self)[part]
            if divisor < 1 or whole % divisor:
                raise UserError(f"model: {key} {whole} must be a multiple of {part} {divisor}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise UserError(
                f"model: num_experts_per_tok {self.num_experts_per_tok} must lie in "
                f"1..n_routed_experts {self.n_routed_experts}"
            )
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        """Values that a published config may hold but that this code would not compute."""
        wanted: dict[str, Json] = {
            "tie_word_embeddings": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "n_shared_experts": 1,
        }  # fmt: skip
        values = dataclasses.asdict(self)
        for key, value in wanted.items():
            if values[key] != value:
                raise UserError(f"model: {key} {values[key]} is not supported, NemotronH models use {value}")

    @property
    def num_hidden_layers(self) -> int:
        """Layers, one mixer each."""
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner(self) -> int:
        """Channels of the Mamba mixer, heads x head width (not a multiple of `hidden_size`)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    def layers(self, kind: str) -> list[int]:
        """Indices of the layers of one kind (a letter of the pattern)."""
        return [index for index, letter in enumerate(self.hybrid_override_pattern) if letter == kind]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor of the checkpoint, in layer order, experts one by one."""
        shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (self.vocab_size, self.hidden_size)}
        of_kind = {"M": self._mamba_shapes(), "E": self._moe_shapes(), "*": self._attention_shapes()}
        for index, letter in enumerate(self.hybrid_override_pattern):
            prefix = f"backbone.layers.{index}."
            shapes[prefix + "norm.weight"] = (self.hidden_size,)
            shapes.update({f"{prefix}mixer.{name}": shape for name, shape in of_kind[letter].items()})
        shapes["backbone.norm_f.weight"] = (self.hidden_size,)
        shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _mamba_shapes(self) -> dict[str, tuple[int, ...]]:
        in_proj = self.mamba_inner + self.conv_channels + self.mamba_num_heads
        per_head = (self.mamba_num_heads,)
        return {
            "in_proj.weight": (in_proj, self.hidden_size),
            "conv1d.weight": (self.conv_channels, 1, self.conv_kernel),
            "conv1d.bias": (self.conv_channels,),
            "A_log": per_head,
            "D": per_head,
            "dt_bias": per_head,
            "norm.weight": (self.mamba_inner,),
            "out_proj.weight": (self.hidden_size, self.mamba_inner),
        }

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj.weight": (query, self.hidden_size),
            "k_proj.weight": (key_value, self.hidden_size),
            "v_proj.weight": (key_value, self.hidden_size),
            "o_proj.weight": (self.hidden_size, query),
        }

    def _moe_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, shared = self.hidden_size, self.moe_shared_expert_intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "gate.weight": (self.n_routed_experts, hidden),
            "gate.e_score_correction_bias": (self.n_routed_experts,),
        }
        for expert in range(self.n_routed_experts):
            shapes[f"experts.{expert}.up_proj.weight"] = (self.moe_intermediate_size, hidden)
            shapes[f"experts.{expert}.down_proj.weight"] = (hidden, self.moe_intermediate_size)
        shapes["shared_experts.up_proj.weight"] = (shared, hidden)
        shapes["shared_experts.down_proj.weight"] = (hidden, shared)
        return shapes

    def parameter_count(self) -> int:
        """Parameters of the whole model: every tensor of the checkpoint, the router's expert bias included."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def active_parameter_count(self) -> int:
        """Parameters that one token meets: the experts it is not routed to and the embedding table left out."""
        idle = self.n_routed_experts - self.num_experts_per_tok
        per_expert = 2 * self.hidden_size * self.moe_intermediate_size
        embeddings = self.vocab_size * self.hidden_size
        return self.parameter_count() - len(self.layers("E")) * idle * per_expert - embeddings

    def to_hf_json(self) -> dict[str, Json]:
        """The content of config.json: what transformers' NemotronHForCausalLM, vLLM and TensorRT-LLM read.

        `time_step_min` is NO_CLAMP so that transformers computes what Megatron computes; the bound of the random
        initialisation travels as `time_step_init_min`.
        """
        fields = dataclasses.asdict(self)
        fields["time_step_min"] = NO_CLAMP
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            **fields,
            "num_hidden_layers": self.num_hidden_layers,
            "time_step_init_min": self.time_step_min,
            "intermediate_size": self.moe_intermediate_size,
            "norm_eps": self.layer_norm_epsilon,
            "mamba_n_groups": self.n_groups,  # SGLang builds its mixers from this name
            **FIXED,
            **INERT,
        }

    @classmethod
    def from_hf_json(cls, content: Mapping[str, Json], source: str = "config.json") -> NemotronHConfig:
        """Read a Hugging Face config; keys that say nothing about the shape are ignored.

        `source` names the file in error messages.
        """
        if content.get("model_type") != "nemotron_h":
            raise UserError(f"{source}: model_type is {content.get('model_type')!r}, a nemotron_h model is needed")
        for key, value in {**FIXED, "moe_latent_size": None}.items():
            if content.get(key, value) != value:
                raise UserError(f"{source}: {key} {content[key]!r} is not supported, this code needs {value!r}")
        values = dict(content)
        if "hybrid_override_pattern" not in values:
            layers = values.get("layers_block_type") or values.get("layer_types") or []
            symbols = [HF_LAYER_SYMBOLS.get(str(kind), "?") for kind in layers]  # type: ignore[union-attr]
            values["hybrid_override_pattern"] = "".join(symbols)
        elif values.get("num_hidden_layers") not in (None, len(str(values["hybrid_override_pattern"]))):
            raise UserError(
                f"{source}: num_hidden_layers is {values['num_hidden_layers']}, hybrid_override_pattern has "
                f"{len(str(values['hybrid_override_pattern']))} letters"
            )
        values["time_step_min"] = values.get("time_step_init_min", values.get("time_step_min", 0.001))
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = values["eos_token_id"][0]  # type: ignore[index]
        known = {field.name for field in dataclasses.fields(cls)}
        return cls._checked({key: value for key, value in values.items() if key in known}, source)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Json], source: str = "model") -> NemotronHConfig:
        """Read the fields themselves; an unknown key is an error that offers the nearest name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f", did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
                raise UserError(f"{source}: unknown key {key!r}{hint}")
        return cls._checked(dict(content), source)

    @classmethod
    def _checked(cls, values: dict[str, Json], source: str) -> NemotronHConfig:
        """Build after a check of presence and type: a wrong value fails with its key and not in a matrix product."""
        for field in dataclasses.fields(cls):
            if field.name not in values:
                if field.default is dataclasses.MISSING:
                    raise UserError(f"{source}: key {field.name} is missing")
                continue
            value = values[field.name]
            numbers: dict[str, tuple[type, ...]] = {
                "int": (int,),
                "float": (int, float),
                "bool": (bool,),
                "str": (str,),
            }
            wanted = numbers[str(field.type)]
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise UserError(f"{source}: {field.name} is {value!r}, {field.type} is needed")
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def from_yaml(cls, path: str | Path) -> NemotronHConfig:
        """Read a model file such as conf/model/nano.yaml."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"model file {path} does not exist")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: a mapping of model fields is needed")
        return cls.from_mapping(content, str(path))

    @classmethod
    def preset(cls, name: str) -> NemotronHConfig:
        """The model of conf/model/NAME.yaml, or of a path to such a file."""
        folder = conf_dir() / "model"
        path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"model {name!r}: no file {path}; known models: {known}")
        return cls.from_yaml(path)
