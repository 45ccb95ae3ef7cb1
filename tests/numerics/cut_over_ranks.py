"""Run by test_layouts.py, once per rank: load a folder at several layouts and compare with what one rank computes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_cascade.learner import parallel
from nemo_cascade.models import convert, hf_folder, nemotron_h

LAYOUTS = (
    parallel.ParallelLayout(tensor=2),
    parallel.ParallelLayout(expert=2),
    parallel.ParallelLayout(tensor=2, expert=2),
    parallel.ParallelLayout(pipeline=2),
)


def main(folder: Path) -> None:
    """Raise where a layout disagrees."""
    config = hf_folder.read_config(folder / "hf")
    expected = torch.load(folder / "expected.pt")
    for number, layout in enumerate(LAYOUTS):
        parallel.start(layout, seed=1, rendezvous=folder / f"meet-{number}")
        rank = torch.distributed.get_rank()
        model = nemotron_h.build(config, layout)
        convert.load_folder(model, folder / "hf")
        if layout.pipeline == 1:  # a pipeline stage runs only inside Megatron's schedules
            # with expert parallelism alone the two ranks are two replicas with rows of different length
            tokens, bounds, logits = expected[rank if layout.tensor == 1 else 0]
            torch.testing.assert_close(model.packed_logits(tokens, bounds), logits, atol=2e-4, rtol=0)
        sha256 = convert.save_folder(model, config, folder / f"again-{number}")
        if rank == 0 and sha256 != hf_folder.content_sha256(folder / "hf"):
            raise AssertionError(f"{layout}: the export differs from what was loaded")
        parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
