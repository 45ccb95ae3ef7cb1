"""Peak memory of a row's log-probabilities, forward and backward: all logits at once against chunks of them.

    python -m tools.bench.logprobs_memory --tokens 8192 --vocabulary 131072 [--device cuda --dtype bf16 --width 1536]

Hidden states, weight and their gradients belong to both ways and have rows of their own in the table. Each way runs in
a process of its own; `above` is its peak memory (on a CPU resident, on a card allocated) above what it held before the
forward pass began. All logits at once take three times their size: 13 GB with the defaults.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from nemo_cascade.algorithms.kept import logprobs_and_entropy
from nemo_cascade.learner.output import output_logprobs
from tools.bench.convert_memory import resident

WAYS = ("naive", "chunked")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Run both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=64, help="of the hidden states (default 64)")
    parser.add_argument("--chunk-logits", type=int, help="at once (default: as many as the Learner takes)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of hidden states and weight")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help="this one only, in this process")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU and this machine has none; leave the option out")
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    rows = {way: in_own_process(way) for way in WAYS}
    rows["naive_over_chunked"] = rows["naive"]["above"] / rows["chunked"]["above"]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{options.tokens:,} tokens x {options.vocabulary:,}: MB; the logits alone {rows['naive']['logits'] / 1e6:,.1f}"
    )
    print(f"{'way':>8}{'gradients':>11}{'above':>10}{'seconds':>10}")
    for way in WAYS:
        row = rows[way]
        print(f"{way:>8}{row['gradients'] / 1e6:>11,.1f}{row['above'] / 1e6:>10,.1f}{row['seconds']:>10.3f}")


def in_own_process(way: str) -> dict[str, float]:
    """One row of the table, with the words this command was called with."""
    command = [sys.executable, "-m", "tools.bench.logprobs_memory", "--way", way, *sys.argv[1:]]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of random weights here, and what they took in bytes and seconds."""
    torch.set_num_threads(1)
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[options.dtype]
    hidden, weight = (
        torch.randn(count, options.width, generator=draw).to(options.device, dtype).requires_grad_()
        for count in (options.tokens, options.vocabulary)
    )
    targets = torch.randint(0, options.vocabulary, (options.tokens,), generator=draw).to(options.device)

    def step(rows: int, columns: int) -> None:
        own, part, chosen = hidden[:rows], weight[:columns], targets[:rows] % columns
        if way == "naive":
            logprobs, _ = logprobs_and_entropy((own @ part.t()).float(), chosen)
        else:
            logprobs, _ = output_logprobs(own, part, chosen, chunk_logits=options.chunk_logits)
        logprobs.sum().backward()

    if options.device == "cpu":
        step(2, 8)  # what only the first call allocates
    else:
        step(options.tokens, options.vocabulary)  # on a card also what is loaded and chosen once
    hidden.grad = weight.grad = None
    before = start_peak(options.device)
    started = time.monotonic()
    step(options.tokens, options.vocabulary)
    peak = end_peak(options.device)
    seconds = time.monotonic() - started
    assert hidden.grad is not None and weight.grad is not None
    return {
        "logits": float(options.tokens * options.vocabulary * 4),
        "gradients": float((hidden.grad.numel() + weight.grad.numel()) * dtype.itemsize),
        "above": float(peak - before),
        "seconds": seconds,
    }


def start_peak(device: str) -> float:
    """What is held now, in bytes; the peak starts anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return held


def end_peak(device: str) -> float:
    """The most that was held since `start_peak`, once everything is computed."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


if __name__ == "__main__":
    main()
