"""Which parallel layouts a model can run in, and which layers FP8 leaves out, said with the reason, without torch.

`nemo-cascade check` asks here first, the Learner again when it builds the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_cascade.models.config import NemotronHConfig

# What both widths of a weight must be multiples of on each rank. 16 is the floor of every FP8 matrix product.
FP8_MULTIPLES = {
    "hopper_fp8": (128, "its scales cover blocks of 128 x 128"),
    "blackwell_mxfp8": (32, "it has one scale per 32 values"),
}


@dataclass(frozen=True)
class Cut:
    """Over how many ranks tensors, layers, tokens and experts are cut, and how tokens reach experts."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    dispatcher: str = "auto"


def problems(model: NemotronHConfig, cut: Cut) -> Iterator[tuple[str, str]]:
    """(key of the hardware file, reason) of everything that keeps this model from running in this layout."""
    yield from _tensor_problems(model, cut.tensor)
    if model.n_routed_experts % cut.expert:
        yield "expert_parallel", f"{cut.expert} does not divide the model's n_routed_experts {model.n_routed_experts}"
    if cut.dispatcher == "local" and cut.expert > 1:
        yield (
            "moe_dispatcher",
            f"local moves no token to other ranks and expert_parallel is {cut.expert}; set it to auto",
        )
    layers = model.num_hidden_layers
    if layers % cut.pipeline:
        yield (
            "pipeline_parallel",
            f"{cut.pipeline} does not divide the {layers} layers of hybrid_override_pattern into equal stages",
        )
    if cut.context > 1 and not model.mamba_num_heads % cut.tensor and not model.n_groups % cut.tensor:
        yield from _context_problems(model, cut)


def _tensor_problems(model: NemotronHConfig, ranks: int) -> Iterator[tuple[str, str]]:
    for name, whole in (
        ("n_groups", model.n_groups),
        ("mamba_num_heads", model.mamba_num_heads),
        ("num_attention_heads", model.num_attention_heads),
        ("vocab_size", model.vocab_size),
        ("moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size),
    ):
        if whole % ranks:
            yield "tensor_parallel", f"{ranks} does not divide the model's {name} {whole}"
    groups = model.num_key_value_heads
    if groups % ranks and ranks % groups:
        yield (
            "tensor_parallel",
            f"{ranks} neither divides the model's num_key_value_heads {groups} nor is a multiple of it",
        )


def _context_problems(model: NemotronHConfig, cut: Cut) -> Iterator[tuple[str, str]]:
    """The scan exchanges tokens for heads: a context-parallel rank scans a share of a tensor-parallel rank's heads."""
    heads, groups = model.mamba_num_heads // cut.tensor, model.n_groups // cut.tensor
    if heads % cut.context:
        yield (
            "context_parallel",
            f"{cut.context} does not divide the {heads} Mamba heads that a tensor-parallel rank holds",
        )
    elif groups % cut.context and cut.context % groups:
        yield (
            "context_parallel",
            f"{cut.context} neither divides the {groups} Mamba groups that a tensor-parallel rank holds nor is a "
            "multiple of them",
        )


def fp8_widths(model: NemotronHConfig, tensor: int) -> dict[str, tuple[int, int]]:
    """(rows, columns) on one rank of each kind of weight that FP8 multiplies, under Megatron's module names.

    Router, embedding and output layer never are. Experts are not cut over tensor-parallel ranks.
    """
    hidden, width, shared = model.hidden_size, model.head_dim, model.moe_shared_expert_intermediate_size // tensor
    in_proj = (model.mamba_inner + model.conv_channels + model.mamba_num_heads) // tensor
    qkv = (model.num_attention_heads + 2 * model.num_key_value_heads) * width // tensor
    widths = {
        "M": {"mixer.in_proj": (in_proj, hidden), "mixer.out_proj": (hidden, model.mamba_inner // tensor)},
        "*": {
            "self_attention.linear_qkv": (qkv, hidden),
            "self_attention.linear_proj": (hidden, model.num_attention_heads * width // tensor),
        },
        "E": {
            "mlp.experts.linear_fc1": (model.moe_intermediate_size, hidden),
            "mlp.experts.linear_fc2": (hidden, model.moe_intermediate_size),
            "mlp.shared_experts.linear_fc1": (shared, hidden),
            "mlp.shared_experts.linear_fc2": (hidden, shared),
        },
    }
    return {name: size for kind, named in widths.items() if model.layers(kind) for name, size in named.items()}


def fp8_exempt(model: NemotronHConfig, tensor: int, precision: str) -> dict[str, str]:
    """Module -> reason for the weights that stay bf16 under an FP8 precision; empty for other precisions."""
    if precision not in FP8_MULTIPLES:
        return {}
    multiple, why = FP8_MULTIPLES[precision]
    reasons, whole = {}, fp8_widths(model, 1)
    for module, size in fp8_widths(model, tensor).items():
        if odd := [width for width in size if width % multiple]:
            cut = "" if odd[0] in whole[module] else f" after tensor_parallel {tensor}"
            reasons[module] = f"width {odd[0]:,}{cut} is no multiple of {multiple}, and {why}"
    return reasons


def fp8_problem(model: NemotronHConfig, tensor: int, precision: str) -> str:
    """Why an FP8 precision would leave nothing in FP8; empty when something is."""
    exempt = fp8_exempt(model, tensor, precision)
    if not exempt or len(exempt) < len(fp8_widths(model, tensor)):
        return ""
    module, reason = next(iter(exempt.items()))
    return f"{precision} leaves no layer in FP8: {module}: {reason}; use bf16"
