"""The modules that Megatron's MambaStack builds its layers from. `local` runs anywhere, `te` on Transformer Engine."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_cascade.models.attention import CoreAttention
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.linear import LocalColumnLinear, LocalRowLinear
from nemo_cascade.models.mamba import Mamba2Mixer, MixerShape, MixerSubmodules
from nemo_cascade.models.moe import LocalExperts
from nemo_cascade.models.norms import RMSNorm
from nemo_cascade.models.routing import MoETransformerLayer
from nemo_cascade.types import UserError

LOG = logging.getLogger(__name__)


class LocalStack(MambaStack):
    """MambaStack with our final norm: megatron/core/ssm/mamba_block.py hard-codes Transformer Engine's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, post_layer_norm=False)
        if kwargs.get("post_process", True):
            self.final_norm = RMSNorm(self.config, self.config.hidden_size)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layers, then the final norm on the last pipeline stage."""
        hidden: torch.Tensor = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if "final_norm" in self._modules else hidden


def layer_spec(
    name: str, config: NemotronHConfig, precision: str = "fp32", dispatcher: str = "allgather"
) -> ModuleSpec:
    """The stack spec called `name` (hardware.layer_spec): local or te. `dispatcher` as in hardware.moe_dispatcher."""
    if name == "local":
        return stack_spec(config, local_parts(precision), dispatcher)
    if name == "te":
        return stack_spec(config, _te_parts(config, precision), dispatcher)
    raise UserError(f"hardware.layer_spec: {name!r} is not one of local, te")


def _mixer_shape(config: NemotronHConfig) -> MixerShape:
    """What the mixers of both specs are told about the architecture."""
    return MixerShape(
        conv_kernel=config.conv_kernel,
        chunk_size=config.chunk_size,
        time_step_min=config.time_step_min,
        time_step_max=config.time_step_max,
        time_step_floor=config.time_step_floor,
        norm_eps=config.layer_norm_epsilon,
    )


@dataclass(frozen=True)
class Parts:
    """What the two specs put into the same places of the stack.

    `column` and `row` are linear layers cut over tensor-parallel ranks by output and by input; `mamba_norm` stands
    where the layer passes its norm no epsilon.
    """

    stack: Any
    mixer: Any
    column: Any
    row: Any
    core_attention: Any
    experts: Any
    norm: Any
    mamba_norm: Any


def stack_spec(config: NemotronHConfig, parts: Parts, dispatcher: str) -> ModuleSpec:
    """The stack of a NemotronH from these parts. Norms are modules of their own; only FP8 experts differ in names."""
    mixer = ModuleSpec(
        module=parts.mixer,
        params={"shape": _mixer_shape(config)},
        submodules=MixerSubmodules(in_proj=parts.column, out_proj=parts.row),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column, core_attention=parts.core_attention, linear_proj=parts.row
        ),
    )
    shared = ModuleSpec(
        module=SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
    )
    moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=parts.experts, shared_experts=shared))
    return ModuleSpec(
        module=parts.stack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(norm=parts.mamba_norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=parts.norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                params={
                    "moe_layers": tuple(layer + 1 for layer in config.layers("E")),
                    "local": dispatcher == "local",
                },
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=parts.norm, mlp=moe, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )


def local_parts(precision: str) -> Parts:
    """Our modules between Megatron's parallel linear layers.

    On a card scan and norms run on mamba-ssm's kernels where they are installed, but in fp32, whose products they round
    to TF32.
    """
    mixer = mixer_class() if torch.cuda.is_available() and precision != "fp32" else Mamba2Mixer
    return Parts(
        stack=LocalStack, mixer=mixer, column=LocalColumnLinear, row=LocalRowLinear,
        core_attention=CoreAttention, experts=LocalExperts, norm=mixer.norm_class, mamba_norm=mixer.norm_class,
    )  # fmt: skip


def mixer_class() -> type[Mamba2Mixer]:
    """The mixer on mamba-ssm's kernels where they are installed, else the PyTorch one."""
    if importlib.util.find_spec("mamba_ssm") is None:
        LOG.info("mamba_ssm is not installed, the Mamba scan runs in PyTorch")
        return Mamba2Mixer
    try:
        from nemo_cascade.models.mamba_kernels import KernelMixer
    except ImportError as error:
        raise UserError(
            f"mamba_ssm is installed and cannot be imported ({error}); build it and causal_conv1d for this torch, or "
            "uninstall both: the scan then runs in PyTorch"
        ) from error
    return KernelMixer


def _te_parts(config: NemotronHConfig, precision: str) -> Parts:
    """Transformer Engine's layers (`te.py`), where it is installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "hardware.layer_spec: te needs the package transformer_engine (2.9 to 2.11), which is not installed; "
            "run in the GPU container or set layer_spec: local"
        )
    from nemo_cascade.models.te import te_parts

    return te_parts(config, precision)
