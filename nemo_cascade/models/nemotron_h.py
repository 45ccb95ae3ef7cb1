"""NemotronH as a Megatron-core MambaModel: the trainable policy of every stage."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.mamba import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from nemo_cascade.models import cpu
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.packed import PackedRow, packed_row
from nemo_cascade.models.precision import transformer_options
from nemo_cascade.models.spec import layer_spec
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    from nemo_cascade.models.parallel import ParallelLayout
    from nemo_cascade.models.routing import Routing

PER_HEAD = ("A_log", "D", "dt_bias")  # stay fp32 whatever the precision


class NemotronH(MambaModel):
    """The policy: MambaModel whose input is one packed row of tokens.

    `hf_config` is the architecture; `config` is Megatron's TransformerConfig.
    """

    def __init__(self, hf_config: NemotronHConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hf_config = hf_config

    def packed_row(self, cu_seqlens: torch.Tensor) -> PackedRow:
        """The boundaries of a packed row in the form that `forward` takes as `packed_seq_params`."""
        return packed_row(cu_seqlens, self.hf_config.chunk_size)

    def packed_logits(
        self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, gather: bool = True, routing: Routing | None = None
    ) -> torch.Tensor:
        """Logits [T, vocabulary] in fp32 of one packed row; row t predicts the token after t inside its sequence.

        `gather` False keeps this tensor-parallel rank's slice of the vocabulary. `routing` records this call's experts
        or replays others. Not for pipeline stages: there Megatron's schedules call `forward` with
        `self.packed_row(cu_seqlens)`.
        """
        count = tokens_T.shape[0]
        tokens_T, cu_seqlens = self._filled(tokens_T, cu_seqlens)
        row = self.packed_row(cu_seqlens)
        if routing is not None:
            routing.begin(count, tokens_T.shape[0], self.hf_config.num_experts_per_tok, self.pg_collection.tp)
            row.routing = routing
        logits = self(
            input_ids=tokens_T.unsqueeze(0),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=row,
        ).squeeze(0)[:count]
        if gather and parallel_state.get_tensor_model_parallel_world_size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits)
        return logits.float()

    def _filled(self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The row with one sequence of padding at its end where the ranks need it, else as it is.

        Sequence parallelism cuts the row evenly over tensor-parallel ranks, and the allgather dispatcher joins rows of
        equal length from all expert-parallel ranks.
        """
        ranks, experts = self.pg_collection.tp.size(), self.pg_collection.ep
        count = tokens_T.shape[0]
        wanted = torch.tensor([count])
        if experts.size() > 1:
            wanted = wanted.to(tokens_T.device)
            torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX, group=experts)
        extra = -(-int(wanted) // ranks) * ranks - count
        if extra == 0:
            return tokens_T, cu_seqlens
        padding = tokens_T.new_full((extra,), self.hf_config.pad_token_id)
        return torch.cat([tokens_T, padding]), torch.cat([cu_seqlens, cu_seqlens[-1:] + extra])


def transformer_config(
    config: NemotronHConfig, layout: ParallelLayout, precision: str = "fp32", spec: str = "local"
) -> TransformerConfig:
    """Megatron's names for the same architecture (method 8.3, CONFIG mapping pairs)."""
    cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.moe_intermediate_size,
        moe_ffn_hidden_size=config.moe_intermediate_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        num_moe_experts=config.n_routed_experts,
        moe_router_topk=config.num_experts_per_tok,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_pre_softmax=False,
        moe_router_topk_scaling_factor=config.routed_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,  # the Learner calls moe.update_expert_bias with the stage's rate
        moe_token_dispatcher_type=layout.dispatcher_here(),
        moe_grouped_gemm=spec == "te",
        mamba_state_dim=config.ssm_state_size,
        mamba_head_dim=config.mamba_head_dim,
        mamba_num_heads=config.mamba_num_heads,
        mamba_num_groups=config.n_groups,
        is_hybrid_model=True,
        normalization="RMSNorm",
        layernorm_epsilon=config.layer_norm_epsilon,
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=init_method_normal(config.initializer_range),
        output_layer_init_method=_output_init(config),
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        **transformer_options(precision, spec),
    )


def _output_init(config: NemotronHConfig) -> Any:
    """Projections into the residual stream start smaller by sqrt(2 layers): its variance does not grow with depth."""
    if not config.rescale_prenorm_residual:
        return init_method_normal(config.initializer_range)
    return scaled_init_method_normal(config.initializer_range, config.num_hidden_layers, 2.0)


def build(config: NemotronHConfig, layout: ParallelLayout, precision: str = "fp32", spec: str = "local") -> NemotronH:
    """This rank's part of a randomly initialised policy; `learner.parallel.start` must have run with the same layout.

    The random weights follow torch's seed. Raises UserError where a layout does not divide the model.
    """
    _check_layout(config, layout)
    if spec == "te" and precision == "fp32":
        raise UserError(
            "hardware.layer_spec: te has no attention kernel for packed rows in fp32; set precision: bf16 or "
            "layer_spec: local"
        )
    cpu.install()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.tp.size() != layout.tensor or groups.ep.size() != layout.expert:
        raise UserError(
            f"the ranks were started with tensor {groups.tp.size()} and expert {groups.ep.size()}, "
            f"the model is built for tensor {layout.tensor} and expert {layout.expert}; start them with one layout"
        )
    cuda = torch.cuda.is_available()
    with torch.device("cuda") if cuda else contextlib.nullcontext():  # 30B random numbers take minutes on the host
        model = NemotronH(
            config,
            config=transformer_config(config, layout, precision, spec),
            mamba_stack_spec=layer_spec(spec, config),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            hybrid_override_pattern=config.hybrid_override_pattern,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            pg_collection=groups,
        )
    if cuda:
        model.cuda()
    return model


def _check_layout(config: NemotronHConfig, layout: ParallelLayout) -> None:
    """A layout must cut heads, groups and experts evenly; said here, because Megatron's assertions name no key."""
    for key, size in (("n_groups", config.n_groups), ("mamba_num_heads", config.mamba_num_heads),
                      ("num_attention_heads", config.num_attention_heads), ("vocab_size", config.vocab_size),
                      ("num_key_value_heads", config.num_key_value_heads)):  # fmt: skip
        if size % layout.tensor:
            raise UserError(f"hardware.tensor_parallel: {layout.tensor} does not divide the model's {key} {size}")
    if config.n_routed_experts % layout.expert:
        raise UserError(
            f"hardware.expert_parallel: {layout.expert} does not divide the model's "
            f"n_routed_experts {config.n_routed_experts}"
        )
    if config.num_hidden_layers % layout.pipeline:
        raise UserError(
            f"hardware.pipeline_parallel: {layout.pipeline} does not divide the model's "
            f"{config.num_hidden_layers} layers"
        )
