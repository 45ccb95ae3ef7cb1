"""Peak memory of a row's log-probabilities, forward and backward: all logits at once against chunks of them.

    python tools/bench/logprobs_memory.py --tokens 8192 --vocabulary 131072

Hidden states, weight and their gradients belong to both ways and have rows of their own in the table. Each way runs in
a process of its own; `above` is its peak resident memory above what it held before the forward pass began. All logits
at once take three times their size: 13 GB with the defaults.
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
from nemo_cascade.learner.output import CHUNK_LOGITS, output_logprobs
from tools.bench.convert_memory import resident

WAYS = ("naive", "chunked")


def main() -> None:
    """Run both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=64, help="of the hidden states (default 64)")
    parser.add_argument("--chunk-logits", type=int, default=CHUNK_LOGITS, help=f"at once (default {CHUNK_LOGITS:,})")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help="this one only, in this process")
    options = parser.parse_args()
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
    print(f"{'way':>8}{'gradients':>11}{'above':>10}{'seconds':>9}")
    for way in WAYS:
        row = rows[way]
        print(f"{way:>8}{row['gradients'] / 1e6:>11,.1f}{row['above'] / 1e6:>10,.1f}{row['seconds']:>9.1f}")


def in_own_process(way: str) -> dict[str, float]:
    """One row of the table, with the words this command was called with."""
    command = [sys.executable, "-m", "tools.bench.logprobs_memory", "--way", way, *sys.argv[1:]]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of random weights here, and what they took in bytes and seconds."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(count, options.width, generator=draw).requires_grad_()
        for count in (options.tokens, options.vocabulary)
    )
    targets = torch.randint(0, options.vocabulary, (options.tokens,), generator=draw)
    output_logprobs(hidden[:2], weight[:8], targets[:2] % 8)[0].sum().backward()  # what only the first call allocates
    hidden.grad = weight.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.monotonic()
    if way == "naive":
        logprobs, _ = logprobs_and_entropy(hidden @ weight.t(), targets)
    else:
        logprobs, _ = output_logprobs(hidden, weight, targets, chunk_logits=options.chunk_logits)
    logprobs.sum().backward()
    seconds, peak = time.monotonic() - started, resident("VmHWM")
    assert hidden.grad is not None and weight.grad is not None
    return {
        "logits": float(options.tokens * options.vocabulary * 4),
        "gradients": float((hidden.grad.numel() + weight.grad.numel()) * 4),
        "above": float(peak - before),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
