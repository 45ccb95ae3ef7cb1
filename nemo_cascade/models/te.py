"""The layer spec `te`: Transformer Engine's norms, linear layers, attention and FP8 experts, mamba-ssm's kernels.

Not megatron-core's mamba_stack_spec, for two reasons. Its TELayerNormColumnParallelLinear keeps a layer's norm inside
the first projection (`in_proj.layer_norm_weight`), so that its checkpoints and those of the local spec have different
names; here the norm is a module of its own in both and all names agree but, in FP8, those of the experts, where its
grouped GEMM wants one tensor per expert (`names.py` knows both). And its MambaMixer keeps dt_bias in the parameters'
dtype and refuses to run without mamba-ssm; here it is our mixer between Transformer Engine's linear layers, with the
kernels where they are installed. The price: one more write and read of the normalised activations per layer.

In bf16 experts are those of the local spec: on Hopper one kernel a product, where Transformer Engine starts one an
expert.

Imported only where the spec is built: everything here needs Transformer Engine.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.models.moe import LocalExperts, counted_as_dense
from nemo_cascade.models.spec import Parts, mixer_class


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


def te_parts(config: NemotronHConfig, precision: str) -> Parts:
    """Transformer Engine's part of the stack; needs bf16 or FP8."""
    grouped = ModuleSpec(
        module=TEExperts,
        submodules=MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear),
    )
    return Parts(
        stack=MambaStack,
        mixer=mixer_class(),
        column=TEColumnParallelLinear,
        row=TERowParallelLinear,
        core_attention=TEDotProductAttention,
        experts=grouped if profile_of(precision).needs_te else LocalExperts,
        norm=TENorm,
        mamba_norm=ModuleSpec(module=TENorm, params={"eps": config.layer_norm_epsilon}),
    )
