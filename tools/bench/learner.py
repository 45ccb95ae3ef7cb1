"""What our training costs and whether it is right, next to code that nobody here wrote: `transformers` and TRL.

    python tools/bench/learner.py [--json] [--repeats 5] [--parts train train_50m grpo agreement packing]
    python tools/bench/learner.py --device cuda --dtype bf16 [--layer-spec te] [--json]

All ratios are measured in one run, the sides in turn, and are medians; above 1 ours is faster. Same weights, same
batch, same dtype, one thread. On a CPU seconds are the process's processor time (clock.py). Needs TRL for the parts
grpo and agreement: `make bench` installs it into the environment and runs all of this (two minutes of one
idle core).

On a GPU: SFT and the GRPO training step of the 1B model, tokens/s and MFU, SFT also against transformers; the
comparisons with TRL stay on the CPU, where our local sampler is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[2])

from nemo_cascade.observe.quiet import quiet_libraries
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    from tools.bench.training_step import Machine

NEEDS_TRL = ("grpo", "agreement")
# What is asked of each number; a difference must lie below, everything else above.
TARGETS = {
    "train_vs_transformers": 1.5, "train_vs_transformers_50m": 1.1, "share_of_limit": 0.6, "grpo_step_vs_trl": 2.0,
    "packing_fill": 0.95, "loss_difference_vs_trl": 1e-5, "gradient_difference_vs_trl": 1e-5,
    "loss_difference_through_model_vs_trl": 1e-4, "gradient_difference_through_model_vs_trl": 1e-4,
}  # fmt: skip

Numbers = dict[str, float]


def train(machine: Machine, repeats: int) -> Numbers:
    """The nano model, 16 sequences of 128 tokens."""
    from tools.bench.training_step import Workload, compare

    numbers = compare(Workload("nano"), machine, repeats)
    kept = {"train_vs_transformers": numbers.pop("vs_transformers"), "share_of_limit": numbers.pop("share_of_limit")}
    return kept | {f"train_{name}": value for name, value in numbers.items()}


def train_50m(machine: Machine, repeats: int) -> Numbers:
    """The model of 50 million parameters, the same batch."""
    from tools.bench.training_step import Workload, compare

    numbers = compare(Workload("nemotron_h_50m"), machine, repeats, warmup=1)
    kept = {"train_vs_transformers_50m": numbers.pop("vs_transformers")}
    return kept | {f"train_50m_{name}": value for name, value in numbers.items()}


def grpo(_: Machine, repeats: int) -> Numbers:
    """GRPO against TRL's trainer: whole steps as the base answers (some 15 tokens), the update alone, and whole steps
    whose answers have exactly 128 tokens.
    """
    from tools.bench.grpo_step import update_alone, whole_step
    from tools.bench.trl_peer import Prompts

    long = Prompts(max_new_tokens=128, to_the_limit=True)
    return (
        whole_step(Prompts(), "grpo_step", repeats)
        | update_alone(repeats)
        | whole_step(long, "grpo_step_128", repeats, warmup=1)
    )


def agreement(_: Machine, repeats: int) -> Numbers:
    """The worst relative differences to TRL over all formulas, and through the model."""
    from tools.bench.trl_agreement import FORMULAS, on_same_logprobs, through_the_model

    found = [on_same_logprobs(formula) for formula in FORMULAS]
    whole = through_the_model()
    assert whole.loss is not None
    return {
        "loss_difference_vs_trl": max(difference.loss for difference in found if difference.loss is not None),
        "gradient_difference_vs_trl": max(difference.gradient for difference in found),
        "loss_difference_through_model_vs_trl": whole.loss,
        "gradient_difference_through_model_vs_trl": whole.gradient,
    }


def packing(_: Machine, repeats: int) -> Numbers:
    """No timing: the share of the tokens of all rows that is filled."""
    from tools.bench.packing_fill import fill

    return {"packing_fill": fill()}


def on_gpu(machine: Machine, repeats: int) -> Numbers:
    """The 1B model in rows of 8,192 tokens: SFT against transformers, and the GRPO training step."""
    import torch

    from tools.bench.training_step import Workload, compare, grpo_training

    work = Workload("nemotron_h_1b", sequences=4, length=2048)
    numbers = compare(work, machine, repeats)
    kept = {
        "train_vs_transformers": numbers["vs_transformers"], "share_of_limit": numbers["share_of_limit"],
        "sft_tokens_per_second": numbers["tokens_per_second_ours_update"],
        "transformers_tokens_per_second": numbers["tokens_per_second_theirs_update"],
    }  # fmt: skip
    kept |= {f"sft_{name}": numbers[name] for name in ("mfu_ours_update", "mfu_theirs_update") if name in numbers}
    torch.cuda.empty_cache()
    return kept | {f"grpo_update_{name}": value for name, value in grpo_training(work, machine, repeats).items()}


PARTS: dict[str, Callable[[Machine, int], Numbers]] = {
    "train": train, "train_50m": train_50m, "grpo": grpo, "agreement": agreement, "packing": packing,
}  # fmt: skip


def check(given: argparse.Namespace) -> None:
    """Refuse what cannot run, before anything heavy is imported."""
    if given.repeats < 1:
        raise UserError(f"--repeats: {given.repeats} is below 1")
    missing = [part for part in given.parts if part in NEEDS_TRL]
    if given.device == "cpu" and missing and importlib.util.find_spec("trl") is None:
        raise UserError(f"trl is not installed, which {' and '.join(missing)} need: run `make bench` (it installs it)")


def measure(given: argparse.Namespace) -> Numbers:
    """Everything that was asked for, on one rank of one thread."""
    from nemo_cascade.learner import parallel  # first: it sets what torch reads at import

    import torch  # isort: skip

    from tools.bench.training_step import Machine

    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda needs an NVIDIA GPU and this machine has none; leave the option out")
    machine = Machine(torch.device(given.device), given.dtype, given.layer_spec)
    parallel.start(seed=1, threads=1)
    try:
        if given.device == "cuda":
            return on_gpu(machine, given.repeats) | packing(machine, given.repeats)
        numbers: Numbers = {}
        for part in given.parts:
            numbers |= PARTS[part](machine, given.repeats)
        return numbers
    finally:
        parallel.stop()


def line(name: str, value: float) -> str:
    """A number as a person reads it, with its target."""
    shown = f"{name:42} {value:12,.0f}" if value >= 1000 else f"{name:42} {value:12.4g}"
    target = TARGETS.get(name)
    if target is None:
        return shown
    difference = "difference" in name
    verdict = "reached" if (value <= target if difference else value >= target) else "MISSED"
    return f"{shown}   {'at most' if difference else 'at least'} {target:g}: {verdict}"


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 2 when something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds; the median is printed")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layer-spec", choices=("local", "te"), default="local", help="of our model, on a GPU")
    given = parser.parse_args(arguments)
    quiet_libraries()
    warnings.filterwarnings("ignore")  # of the peers; what this prints is all that is to be read
    try:
        check(given)
        numbers = measure(given)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    text = json.dumps(numbers, indent=1) if given.json else "\n".join(line(*item) for item in numbers.items())
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
