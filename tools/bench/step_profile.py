"""Where the time of one training step goes, and how it grows with tokens, parameters and experts.

    python -m tools.bench.step_profile --model nano
    python -m tools.bench.step_profile --model nemotron_h_50m --no-growth

One step is forward, backward and AdamW of SFT on full sequences. One thread, random weights, fp32. Time is the
processor's, so that a busy machine disturbs less; the profiler itself adds some to every operation, most to small ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.learner import parallel  # first: it sets what torch reads at import
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models import attention, attention_native, mixer_native, onednn
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.mixer_native import MixerSizes
from nemo_cascade.types import Sequence
from tools.bench.clock import in_turn, median_ratio

# A step is cut by the outermost of these names above an operation; backward nodes are named after the forward's.
PARTS = {
    "projections": ("LinearWithGradAccumulation", "_Linear", "aten::linear"),  # and the output layer
    "experts": ("_GroupedSquaredReluMLP",),
    "mixer in C": ("_Mix",),
    "scan": ("_ChunkedScan",),
    "convolution": ("_CausalConvSilu",),
    "norms and gates": ("_GroupedRMSNorm", "_SiluGate"),
    "attention": ("_Attend", "scaled_dot_product", "ScaledDotProduct"),
    "router": ("RouterGating", "TopkBackward", "aten::topk", "Sigmoid", "aten::sigmoid"),
    "log-probabilities": ("_TargetLogprobs", "_ChunkedLogprobs"),
    "optimizer": ("optimizer",),
    "reduce": ("reduce",),
    "gradient buffers": ("AccumulateGrad",),
}  # fmt: skip
KINDS = {
    "fused kernels": (
        "_Mix", "_MixBackward", "_Attend", "_AttendBackward", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "matrix products": (
        "aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "mkldnn::_linear_pointwise",
    ),
    "copies": (
        "aten::copy_", "aten::cat", "aten::index_select", "aten::index", "aten::index_copy_", "aten::zero_",
        "aten::fill_", "aten::masked_select", "aten::scatter", "aten::scatter_", "aten::scatter_add_", "aten::gather",
        "aten::clone", "aten::flip", "aten::index_put_", "aten::_index_put_impl_",
    ),
}  # fmt: skip
# What a step is made of on a CPU beside PyTorch, by what one has without it: the function that switches it off, and
# whether this machine has it.
REPLACED = {
    "the mixer in PyTorch": ((MixerSizes, "usable"), mixer_native.library),
    "attention in PyTorch": ((attention, "usable"), attention_native.library),
    "fp32 products by MKL": ((onednn, "here"), onednn.here),
}
REPEATS, GAIN_REPEATS = 5, 10


def main() -> None:
    """Print the profile and the growth table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="preset of conf/model (default nano)")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--no-growth", action="store_true", help="the profile alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parallel.start(threads=1)
    config = NemotronHConfig.preset(options.model)
    found: dict[str, Any] = {"profile": profiled(config, options.sequences, options.length)}
    found["gains"] = gains(config, options.sequences, options.length)
    if not options.no_growth:
        found["growth"] = growth(config, options.length)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{options.model}, {options.sequences} x {options.length} tokens: share of the step's time")
    print_profile(found["profile"])
    for name, ratio in found["gains"].items():
        print(f"a step takes {ratio:.2f} times as long with {name}")
    if "growth" in found:
        print(f"\n{'step':<34}{'tokens':>8}{'parameters':>14}{'seconds':>9}{'us/token':>10}")
    for row in found.get("growth", ()):
        print(f"{row['what']:<34}{row['tokens']:>8}{row['parameters']:>14,}{row['seconds']:>9.3f}"
              f"{row['microseconds_per_token']:>10.1f}")  # fmt: skip


def learner_of(config: NemotronHConfig, tokens: int) -> MegatronLearner:
    """A Learner that takes `tokens` as one micro-batch."""
    settings = LearnerSettings(
        OptimizerConfig(lr=1e-4, clip_grad=1.0), 100, micro_batch_tokens=tokens,
        hardware=HardwareConfig(threads_per_rank=1),
    )  # fmt: skip
    return MegatronLearner(config, settings)


def sequences_of(config: NemotronHConfig, count: int, length: int) -> list[Sequence]:
    """Random tokens, all of them trained."""
    draw = random.Random(0)
    return [
        Sequence(tuple(draw.randrange(3, config.vocab_size) for _ in range(length)), (1,) * length)
        for _ in range(count)
    ]


def profiled(config: NemotronHConfig, count: int, length: int) -> dict[str, dict[str, float]]:
    """Share of the step's time by part and kind of operation, and by kind over all parts."""
    learner, sequences = learner_of(config, count * length), sequences_of(config, count, length)
    objective = cross_entropy("token")
    labelled(learner.trainer, "step", "optimizer")
    labelled(learner.trainer, "reduce_gradients", "reduce")
    learner.update(sequences, objective)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(REPEATS):
            learner.update(sequences, objective)
    spent: Counter[tuple[str, str]] = Counter()
    for event in record.events():
        if event.name.startswith("aten::") or part_of(event) != "rest":
            spent[part_of(event), kind_of(event.name)] += event.self_cpu_time_total
        else:
            spent["rest", "Python and autograd"] += event.self_cpu_time_total
    total = sum(spent.values())
    table: dict[str, dict[str, float]] = {}
    for (part, kind), microseconds in spent.items():
        for row in (part, "all"):
            table.setdefault(row, {})
            table[row][kind] = table[row].get(kind, 0.0) + microseconds / total
    return table


def labelled(owner: Any, method: str, label: str) -> None:
    """Name what happens inside a method in the profile."""
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return inner(*args, **kwargs)

    setattr(owner, method, outer)


def part_of(event: Any) -> str:
    """The part that an operation belongs to; `rest` where no name above it says so."""
    part = "rest"
    while event is not None:
        part = next((name for name, marks in PARTS.items() if any(mark in event.name for mark in marks)), part)
        event = event.cpu_parent
    return part


def kind_of(name: str) -> str:
    """What an operation does. The fused kernels (Mamba mixer in C, attention) hold matrix products, too."""
    return next(
        (kind for kind, names in KINDS.items() if name in names),
        "elementwise" if name.startswith("aten::") else "Python and autograd",
    )


def print_profile(table: dict[str, dict[str, float]]) -> None:
    """One line per part, the largest first."""
    kinds = ["matrix products", "fused kernels", "elementwise", "copies", "Python and autograd"]
    print(f"{'part':<20}{'all':>8}" + "".join(f"{kind:>21}" for kind in kinds))
    for part, row in sorted(table.items(), key=lambda item: -sum(item[1].values())):
        cells = "".join(f"{row.get(kind, 0.0):>21.1%}" for kind in kinds)
        print(f"{part:<20}{sum(row.values()):>8.1%}{cells}")


def growth(config: NemotronHConfig, length: int) -> list[dict[str, Any]]:
    """Seconds of a step against tokens, depth and experts, around 16 sequences."""
    cases = [(f"{count} x {length} tokens", config, count) for count in (1, 4, 16, 64)]
    cases += [("one sequence of 16 x the length", config, -16)]
    for factor in (2, 4):
        pattern = config.hybrid_override_pattern * factor
        cases.append((f"{factor} x the layers", dataclasses.replace(config, hybrid_override_pattern=pattern), 16))
    for factor in (2, 4, 8):
        experts = config.n_routed_experts * factor
        cases.append((f"{experts} experts", dataclasses.replace(config, n_routed_experts=experts), 16))
    return [measured(what, model, count, length) for what, model, count in cases]


def gains(config: NemotronHConfig, count: int, length: int) -> dict[str, float]:
    """How many times longer a step takes with one of our CPU parts replaced by PyTorch: in turn, of medians."""
    learner, sequences = learner_of(config, count * length), sequences_of(config, count, length)
    objective = cross_entropy("token")
    cases = {name: [switch] for name, (switch, there) in REPLACED.items() if there()}
    cases |= {"all of these": [switch for switches in cases.values() for switch in switches]} if cases else {}
    whole = "as it is"

    def step(name: str) -> dict[str, float]:
        with ExitStack() as stack:
            for owner, function in cases.get(name, []):
                stack.enter_context(patch.object(owner, function, lambda *_: False))
            started = time.process_time()
            learner.update(sequences, objective)
            return {name: time.process_time() - started}

    seconds = in_turn([functools.partial(step, name) for name in (whole, *cases)], GAIN_REPEATS, warmup=2)
    return {name: median_ratio(seconds, name, whole) for name in cases}


def measured(what: str, config: NemotronHConfig, count: int, length: int) -> dict[str, Any]:
    """One row: the median of a few steps. A negative count is one sequence of so many lengths."""
    tokens = abs(count) * length
    learner = learner_of(config, tokens)
    sequences = sequences_of(config, max(count, 1), tokens if count < 0 else length)
    objective, seconds = cross_entropy("token"), []
    learner.update(sequences, objective)
    for _ in range(REPEATS):
        started = time.process_time()
        learner.update(sequences, objective)
        seconds.append(time.process_time() - started)
    middle = statistics.median(seconds)
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    return {
        "what": what, "tokens": tokens, "parameters": parameters, "seconds": middle,
        "microseconds_per_token": middle / tokens * 1e6,
    }  # fmt: skip


if __name__ == "__main__":
    main()
