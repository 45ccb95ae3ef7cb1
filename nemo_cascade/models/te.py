"""The layer spec `te`: Transformer Engine's norms, linear layers, attention and grouped experts, mamba-ssm's kernels.

Not megatron-core's mamba_stack_spec, for two reasons. Its TELayerNormColumnParallelLinear keeps a layer's norm inside
the first projection (`in_proj.layer_norm_weight`), so that its checkpoints and those of the local spec have different
names; here the norm is a module of its own in both and all names agree but those of the experts, where a grouped GEMM
wants one tensor per expert (`names.py` knows both). And its MambaMixer keeps dt_bias in the parameters' dtype and
refuses to run without mamba-ssm; here it is our mixer between Transformer Engine's linear layers, with the kernels
where they are installed. The price: one more write and read of the normalised activations per layer.

Imported only where the spec is built: everything here needs Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.mamba import Mamba2Mixer, MixerShape, MixerSubmodules
from nemo_cascade.models.moe import counted_as_dense
from nemo_cascade.models.routing import MoETransformerLayer

LOG = logging.getLogger(__name__)


class TEExperts(TEGroupedMLP):
    """Megatron's grouped experts, whose gradients are summed over the ranks that hold the same experts.

    TEGroupedLinear counts experts as dense weights when there is no expert parallelism. With sequence parallelism each
    tensor-parallel rank's experts see tokens of their own, so that would leave out the other ranks' part.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection)
        for weight in self.parameters():
            weight.allreduce = counted_as_dense(pg_collection)  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]  # in the gradient norm, as LocalExperts


def mixer_class() -> type[Mamba2Mixer]:
    """The mixer on mamba-ssm's kernels where they are installed, else the PyTorch one."""
    if importlib.util.find_spec("mamba_ssm") is None:
        LOG.info("layer_spec te: mamba_ssm is not installed, the Mamba scan runs in PyTorch")
        return Mamba2Mixer
    from nemo_cascade.models.mamba_kernels import KernelMixer

    return KernelMixer


def te_spec(config: NemotronHConfig, shape: MixerShape) -> ModuleSpec:
    """The stack of a NemotronH on Transformer Engine; needs bf16."""
    norm = ModuleSpec(module=TENorm, params={"eps": config.layer_norm_epsilon})
    mixer = ModuleSpec(
        module=mixer_class(),
        params={"shape": shape},
        submodules=MixerSubmodules(in_proj=TEColumnParallelLinear, out_proj=TERowParallelLinear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=TEColumnParallelLinear, core_attention=TEDotProductAttention, linear_proj=TERowParallelLinear
        ),
    )
    shared = ModuleSpec(
        module=SharedExpertMLP,
        submodules=MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear),
    )
    experts: Any = ModuleSpec(
        module=TEExperts,
        submodules=MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear),
    )
    moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=TENorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                params={"moe_layers": tuple(layer + 1 for layer in config.layers("E"))},
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=TENorm, mlp=moe, mlp_bda=get_bias_dropout_add),
            ),
        ),
    )
