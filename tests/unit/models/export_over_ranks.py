"""Run by test_convert_layouts.py, once per rank: bf16 exports at several layouts, and a disk that fills up."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from nemo_cascade.models import convert, hf_copy, nemotron_h, parallel
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.models.hf_writer import WriteFailed

LAYOUTS = (
    parallel.ParallelLayout(expert=2),
    parallel.ParallelLayout(pipeline=2),
    parallel.ParallelLayout(tensor=2, expert=2),
)


def main(folder: Path) -> None:
    """Raise where a layout exports other bytes than what it loaded, or where a failed export stops the other rank."""
    config = read_config(folder / "hf")
    expected = (folder / "sha256").read_text()
    for number, layout in enumerate(LAYOUTS):
        parallel.start(layout, seed=1, rendezvous=folder / f"meet-{number}")
        rank = torch.distributed.get_rank()
        model = nemotron_h.build(config, layout, "bf16")
        convert.load_folder(model, folder / "hf")
        found = convert.save_folder(model, config, folder / f"again-{number}", "bf16", None, 300_000)
        if found != (expected if rank == 0 else ""):
            raise AssertionError(f"{layout}: the export differs from what was loaded")
        convert.save_folder(model, config, folder / "kept", hf_copy.KEEP)
        if rank == 0:
            pairs = zip(hf_copy.stored(folder / "hf"), hf_copy.stored(folder / "kept"), strict=True)
            if not all(ours.float().equal(theirs.float()) for (_, ours), (_, theirs) in pairs):
                raise AssertionError(f"{layout}: an export in the parameters' own dtypes differs")
        parallel.stop()
    fill_the_disk(folder)


def fill_the_disk(folder: Path) -> None:
    """Rank 0 may write no file above 100 kB; both ranks must come through and be able to go on together."""
    layout = parallel.start(parallel.ParallelLayout(expert=2), rendezvous=folder / "meet-full")
    rank = torch.distributed.get_rank()
    model = nemotron_h.build(read_config(folder / "hf"), layout, "bf16")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        convert.save_folder(model, model.hf_config, folder / "full", "bf16")
    except WriteFailed as error:
        if rank != 0 or "into model.safetensors" not in str(error):
            raise
    else:
        if rank == 0:
            raise AssertionError("the limit was not felt")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    convert.save_folder(model, model.hf_config, folder / "full", "bf16")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
