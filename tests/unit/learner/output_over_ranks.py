"""One of two ranks, each with half of the vocabulary: `output_over_ranks.py FOLDER DTYPE` writes the numbers of RANK.

In float32 the kernels for a card compute them, in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.learner import output
from nemo_cascade.learner.output import output_logprobs

DISTRIBUTIONS = (RAW, Distribution(temperature=1.3, top_p=0.9, top_k=11), Distribution(top_p=0.5))


def problem(count: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states and weight that want gradients, targets, and the gradient of each log-probability."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in ((count, width), (vocabulary, width), (count,))
    )
    targets = torch.randint(0, vocabulary, (count,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def main(folder: str, rank: int, dtype: torch.dtype) -> None:
    """The numbers of every distribution in FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    if dtype == torch.float32:
        output._Vocabulary.kernels = property(lambda self: not self.distribution.cuts)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    answers = []
    for distribution in DISTRIBUTIONS:
        hidden, weight, targets, upstream = problem(23, 48, 10, dtype)
        mine = weight.detach().chunk(2)[rank].clone().requires_grad_()
        logprobs, entropy = output_logprobs(hidden, mine, targets, distribution, dist.group.WORLD, chunk_logits=7 * 24)
        (logprobs * upstream).sum().backward()
        answers.append((logprobs.detach(), entropy, hidden.grad, mine.grad))
    torch.save(answers, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(os.environ["RANK"]), getattr(torch, sys.argv[2]))
