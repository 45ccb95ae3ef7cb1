"""NemotronH as a Megatron-core MambaModel: the trainable policy of every stage."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.mamba import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from nemo_cascade.models import cpu, layout_rules
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.context import RowCut
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.models.moe import counting_only
from nemo_cascade.models.packed import PackedRow, packed_row
from nemo_cascade.models.precision import BF16_LAYERS, apply, check_installed, transformer_options
from nemo_cascade.models.spec import layer_spec
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    from nemo_cascade.models.parallel import ParallelLayout
    from nemo_cascade.models.routing import Routing



@dataclass(frozen=True)
class Row:
    """A packed row on its way through the model: padded to what the ranks need and, with context parallelism, cut."""

    tokens_t: torch.Tensor  # this rank's tokens
    packed: PackedRow
    count: int  # tokens of the row without the padding at its end
    length: int  # with it
    counted: bool = True

    def own(self, values_T: torch.Tensor) -> torch.Tensor:
        """This rank's part of a value per token; 0 at padding."""
        padded = torch.nn.functional.pad(values_T, (0, self.length - self.count))
        return padded if self.packed.cut is None else self.packed.cut.own(padded)

    def whole(self, values_t: torch.Tensor) -> torch.Tensor:
        """The values [T, ...] of the whole row without its padding, on every context-parallel rank; differentiable.

        For a loss that all these ranks compute alike: each token is then counted once.
        """
        if self.packed.cut is not None:
            values_t = self.packed.cut.whole(values_t, same_use=True)
        return values_t[: self.count]


class NemotronH(MambaModel):
    """The policy: MambaModel whose input is one packed row of tokens.

    `hf_config` is the architecture; `config` is Megatron's TransformerConfig; `precision` and `layer_spec` are those of
    the hardware file and say which dtype each tensor has (models/dtypes.py).
    """

    def __init__(
        self, hf_config: NemotronHConfig, precision: str = "fp32", layer_spec: str = "local", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.hf_config = hf_config
        self.precision, self.layer_spec = precision, layer_spec

    def row(
        self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, counted: bool = True, routing: Routing | None = None
    ) -> Row:
        """A packed row as this rank computes it. Collective where experts are spread over ranks.

        `cu_seqlens` on the host spares a wait for the device.

        `counted` False: no token of it counts in the routers' statistics. `routing` records the experts of the row's
        one call of `run`, or replays others.
        """
        count = tokens_T.shape[0]
        tokens_T, cu_seqlens = self._filled(tokens_T, cu_seqlens)
        group = self.pg_collection.cp
        cut = RowCut.of(cu_seqlens, group, tokens_T.device) if group.size() > 1 else None
        packed = packed_row(cu_seqlens, self.hf_config.chunk_size, cut, tokens_T.device)
        if routing is not None:
            routing.begin(count, tokens_T.shape[0], self.hf_config.num_experts_per_tok, self.pg_collection.tp)
            packed.routing = routing
        return Row(tokens_T if cut is None else cut.own(tokens_T), packed, count, tokens_T.shape[0], counted)

    def run(self, row: Row) -> torch.Tensor:
        """This pipeline stage on its tokens: hidden states [t, 1, hidden], or on the last stage logits [t, vocabulary]
        in fp32.
        """
        output = self._layers_of(row)
        if not self.post_process:
            return output
        logits = output.squeeze(0)
        if self.pg_collection.tp.size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits)
        return logits.float()

    def hidden(self, row: Row) -> torch.Tensor:
        """What the last pipeline stage's output layer would read [t, hidden], for `learner/output.py`.

        Every tensor-parallel rank gets all t tokens; gradients are summed over these ranks, each giving what follows
        from its part of the vocabulary.
        """
        assert self.post_process, "only the last pipeline stage has an output layer"
        self.post_process = False  # Megatron's forward then ends before the output layer
        try:
            hidden_t1H = self._layers_of(row)
        finally:
            self.post_process = True
        if self.config.sequence_parallel:
            hidden_t1H = gather_from_sequence_parallel_region(hidden_t1H, group=self.pg_collection.tp)
        return hidden_t1H.squeeze(1)

    def _layers_of(self, row: Row) -> torch.Tensor:
        """Megatron's forward of a row."""
        with counting_only(self, self._counted(row)):
            output: torch.Tensor = self(
                input_ids=row.tokens_t.unsqueeze(0),
                position_ids=None,
                attention_mask=None,
                packed_seq_params=row.packed,
            )
        return output

    def packed_logits(
        self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, routing: Routing | None = None
    ) -> torch.Tensor:
        """Logits [T, vocabulary] in fp32 of one packed row; row t predicts the token after t inside its sequence.

        `routing` as in `row`. Not for pipeline stages: there `learner/pipeline.py` lets Megatron's schedule call `run`.
        """
        row = self.row(tokens_T, cu_seqlens, routing=routing)
        return row.whole(self.run(row))

    def _counted(self, row: Row) -> torch.Tensor | None:
        """Which of the tokens that this rank routes are real [t], None when all are."""
        if row.counted and row.count == row.length:
            return None
        real_t = row.own(torch.full((row.count,), row.counted, device=row.tokens_t.device))
        ranks = self.pg_collection.tp
        return real_t.chunk(ranks.size())[ranks.rank()]

    def _filled(self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The row with one sequence of padding at its end where the ranks need it, else as it is.

        Sequence and context parallelism cut the row evenly, the allgather dispatcher joins rows of equal length from
        all expert-parallel ranks, and FP8 sums over whole blocks of the tokens that a rank holds.
        """
        context, experts = self.pg_collection.cp.size(), self.pg_collection.ep
        pieces = self.pg_collection.tp.size() * (2 * context if context > 1 else 1)
        multiple = pieces * profile_of(self.precision).token_multiple
        count = tokens_T.shape[0]
        wanted = torch.tensor([count])
        if experts.size() > 1:
            wanted = wanted.to(tokens_T.device)
            torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX, group=experts)
        extra = -(-int(wanted) // multiple) * multiple - count
        if extra == 0:
            return tokens_T, cu_seqlens
        padding = tokens_T.new_full((extra,), self.hf_config.pad_token_id)
        return torch.cat([tokens_T, padding]), torch.cat([cu_seqlens, cu_seqlens[-1:] + extra])


def transformer_config(
    config: NemotronHConfig,
    layout: ParallelLayout,
    precision: str = "fp32",
    spec: str = "local",
    bf16_layers: int = BF16_LAYERS,
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
        moe_token_dispatcher_type=layout.megatron_dispatcher(),
        moe_grouped_gemm=profile_of(precision).needs_te,  # Transformer Engine's; ours needs no word
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
        **transformer_options(
            precision, spec, layout_rules.fp8_exempt(config, layout.tensor, precision), bf16_layers
        ),
    )


def _output_init(config: NemotronHConfig) -> Any:
    """Projections into the residual stream start smaller by sqrt(2 layers): its variance does not grow with depth."""
    if not config.rescale_prenorm_residual:
        return init_method_normal(config.initializer_range)
    return scaled_init_method_normal(config.initializer_range, config.num_hidden_layers, 2.0)


def build(
    config: NemotronHConfig,
    layout: ParallelLayout,
    precision: str = "fp32",
    spec: str = "local",
    bf16_layers: int = BF16_LAYERS,
) -> NemotronH:
    """This rank's part of a randomly initialised policy; `learner.parallel.start` must have run with the same layout.

    The random weights follow torch's seed. `bf16_layers` at each end are left out of FP8. Raises UserError where a
    layout does not divide the model.
    """
    _check_layout(config, layout, spec)
    if spec == "te" and precision == "fp32":
        raise UserError(
            "hardware.layer_spec: te has no attention kernel for packed rows in fp32; set precision: bf16 or "
            "layer_spec: local"
        )
    check_installed(precision, spec)
    cpu.name_missing_gemm()
    cpu.install()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    started = (groups.tp.size(), groups.ep.size(), groups.pp.size(), groups.cp.size())
    if started != (layout.tensor, layout.expert, layout.pipeline, layout.context):
        raise UserError(
            f"the ranks were started with tensor, expert, pipeline, context {started}, the model is built for "
            f"{(layout.tensor, layout.expert, layout.pipeline, layout.context)}; start them with one layout"
        )
    cuda = torch.cuda.is_available()
    with torch.device("cuda") if cuda else contextlib.nullcontext():  # 30B random numbers take minutes on the host
        model = NemotronH(
            config,
            precision,
            spec,
            config=transformer_config(config, layout, precision, spec, bf16_layers),
            mamba_stack_spec=layer_spec(spec, config, precision, layout.dispatcher_here()),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            hybrid_override_pattern=config.hybrid_override_pattern,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            pg_collection=groups,
        )
    # Stages tell each other the length of every row. Set here because TransformerConfig would refuse it together with
    # the allgather dispatcher, which needs equal rows over expert-parallel ranks only: `NemotronH.row` pads to that.
    model.config.variable_seq_lengths = layout.pipeline > 1
    apply(model, precision, spec)
    if cuda:
        model.cuda()
    return model


def _check_layout(config: NemotronHConfig, layout: ParallelLayout, spec: str) -> None:
    """A layout must cut heads, groups, layers and experts evenly; said here, because Megatron's assertions name no
    key.
    """
    cut = layout_rules.Cut(layout.tensor, layout.pipeline, layout.context, layout.expert, layout.dispatcher)
    for key, reason in layout_rules.problems(config, cut):
        raise UserError(f"hardware.{key}: {reason}")
    if layout.context > 1 and spec != "local":
        raise UserError(f"hardware.context_parallel: {layout.context} needs hardware.layer_spec: local, got {spec}")
