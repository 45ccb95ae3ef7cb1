"""The one table of what every tensor is stored in: by the Learner, in an exported folder, in an engine. No torch here.

Whoever allocates, exports or refits asks this table, and what was built is checked against it, so that no weight is
rounded without a line that says so. `python -m tools.precision_table` prints it.

A weight that decides over small differences (router), that enters an exponent of an exponent (A_log, dt_bias) or that
stays near 1, where bf16 steps by 2^-8 (norms, D), is fp32 in every profile: no learning rate of 1e-6 moves it in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nemo_cascade.types import UserError

FP32, BF16 = "float32", "bfloat16"
BITS = {"float64": 64, FP32: 32, BF16: 16, "float16": 16}


@dataclass(frozen=True)
class Profile:
    """A value of `hardware.precision`. `matrices`: the dtype of the weights that are multiplied, and of activations.

    `recipe` names how the operands of a product are rounded to FP8 (models/fp8_emulation.py, and Transformer Engine
    under the same name); `emulated` does it in PyTorch. `environment` is what Transformer Engine reads at its import.
    """

    name: str
    matrices: str
    recipe: str | None = None
    emulated: bool = False
    environment: Mapping[str, str] | None = None

    @property
    def token_multiple(self) -> int:
        """Packed rows are filled up to a multiple of this many tokens: they are summed over in the weight gradient."""
        return {None: 1, "blockwise": 128, "mxfp8": 32}[self.recipe]

    @property
    def needs_te(self) -> bool:
        """Only Transformer Engine multiplies in FP8; without it Megatron-core would train in bf16 and say nothing."""
        return self.recipe is not None and not self.emulated


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("fp32", FP32),
        Profile("bf16", BF16),
        # scales 448 / max in fp32 as in NVIDIA's reinforcement learning recipe; without the variable powers of two
        Profile("hopper_fp8", BF16, "blockwise", environment={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}),
        Profile("blackwell_mxfp8", BF16, "mxfp8"),
        Profile("hopper_fp8_emulated", BF16, "blockwise", emulated=True),
        Profile("blackwell_mxfp8_emulated", BF16, "mxfp8", emulated=True),
    )
}


@dataclass(frozen=True)
class Kind:
    """Tensors that are treated alike, found by the end of their published name.

    `wide`: fp32 in every profile and every export. `fp8`: an operand that FP8 profiles round in the product.
    `rounded_by`: engines that hold it in bf16 although it is fp32 here; a refit to them is reported.
    """

    name: str
    endings: tuple[str, ...]
    wide: bool = False
    fp8: bool = False
    trained: bool = True
    rounded_by: frozenset[str] = frozenset()


_TRTLLM = frozenset({"trtllm"})
KINDS = (
    Kind("embedding", ("embeddings.weight",)),
    Kind("output layer", ("lm_head.weight",)),
    Kind("norm", (".norm.weight", "norm_f.weight"), wide=True, rounded_by=_TRTLLM),
    Kind("Mamba projections", ("mixer.in_proj.weight", "mixer.out_proj.weight"), fp8=True),
    Kind("convolution", ("conv1d.weight", "conv1d.bias")),
    Kind("A_log, D, dt_bias", ("mixer.A_log", "mixer.D", "mixer.dt_bias"), wide=True),
    Kind("attention projections", ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"), fp8=True),
    Kind("router", ("gate.weight",), wide=True, rounded_by=_TRTLLM),
    Kind("expert bias", ("gate.e_score_correction_bias",), wide=True, trained=False),
    Kind("experts, shared expert", ("up_proj.weight", "down_proj.weight"), fp8=True),
)
EXPORTS = ("fp32", "bf16")
ENGINES = ("local", "trtllm")  # ours holds fp32; TensorRT-LLM the model's dtype, bf16, but for the decay and the bias


def kind_of(name: str) -> Kind:
    """The kind of a published tensor name."""
    for kind in KINDS:
        if name.endswith(kind.endings):
            return kind
    raise UserError(f"tensor {name} is of no kind that models/dtypes.py knows; check it against the model's config")


def profile_of(precision: str) -> Profile:
    """The profile of a `hardware.precision`."""
    if precision not in PROFILES:
        raise UserError(f"hardware.precision: {precision!r} is not one of {', '.join(PROFILES)}")
    return PROFILES[precision]


def learner_dtype(kind: Kind, precision: str, spec: str = "local") -> str:
    """What the Learner holds and computes with.

    Transformer Engine's norms want the dtype of their input: with `te` they are bf16 parameters with an fp32 master
    copy, and are computed in fp32 inside the kernel.
    """
    if kind.wide and not (spec == "te" and kind.name == "norm"):
        return FP32
    return profile_of(precision).matrices


def export_dtype(kind: Kind, policy: str) -> str:
    """What a folder exported with `precision_export` holds."""
    if policy not in EXPORTS:
        raise UserError(f"precision_export: {policy!r} is not one of {', '.join(EXPORTS)}")
    return FP32 if policy == "fp32" or kind.wide else BF16


def engine_dtype(kind: Kind, engine: str) -> str:
    """What a sampling engine holds."""
    if engine not in ENGINES:
        raise UserError(f"sampler: engine {engine!r} is not one of {', '.join(ENGINES)}: its dtypes are unknown")
    return FP32 if engine == "local" or (kind.wide and engine not in kind.rounded_by) else BF16


def narrower(target: str, source: str) -> bool:
    """Whether `target` holds fewer bits than `source`."""
    return BITS[target] < BITS[source]


def expect(name: str, found: str, precision: str, spec: str = "local") -> None:
    """Stop when the Learner's tensor is not what the table says: what ran would not be what the config says."""
    wanted = learner_dtype(kind_of(name), precision, spec)
    if found != wanted:
        raise UserError(
            f"hardware.precision: {precision} keeps {name} in {wanted}, but the Learner holds it in {found}; nothing "
            "was exported or refitted. Something cast the model after it was built"
        )


def summary(kinds: Iterable[str]) -> str:
    """`2 norm, 1 router` from the kinds of single tensors."""
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
