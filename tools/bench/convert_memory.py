"""Peak memory of export, conversion and import against the largest shard and the whole checkpoint.

    python tools/bench/convert_memory.py --model nemotron_h_1b --folder /tmp/space

Weights are random. Each phase runs in a process of its own; `above` is its peak resident memory above what it held
before the phase began, so that interpreter, torch and, for the import, the policy itself do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nemo_cascade.models import hf_copy
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_extras import write_extras
from nemo_cascade.models.hf_folder import read_header, weight_files
from nemo_cascade.models.hf_writer import Planned, ShardWriter, plan_shards

PHASES = ("write", "copy", "unpack", "widen", "import", "export")
"""write: random weights, bf16 shards. copy: other shards. unpack: from transformers' stacked experts. widen: to fp32.
import: into a bf16 policy. export: from it."""


def main() -> None:
    """Run every phase and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="preset of conf/model (default nano)")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9, help="largest shard (default 5 GB)")
    parser.add_argument("--folder", type=Path, help="where the folders go; needs four times the bf16 size")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(measure(options.phase, options.model, options.folder, options.shard_bytes)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = {}
        if not options.json:
            print(f"{options.model}: MB; shards of at most {options.shard_bytes / 1e6:,.1f}")
            print("".join(f"{title:>{width}}" for title, width in COLUMNS.items()))
        for phase in PHASES:
            rows[phase] = in_own_process(phase, options.model, Path(folder), options.shard_bytes)
            if not options.json:
                print(line(rows[phase]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


COLUMNS = {"phase": 8, "total": 10, "largest shard": 15, "largest tensor": 16, "above": 10, "peak": 10, "seconds": 9}


def line(row: dict[str, float]) -> str:
    """One row of the table, in megabytes."""
    values = [f"{row[title.replace(' ', '_')] / 1e6:,.1f}" for title in list(COLUMNS)[1:-1]]
    cells = [str(row["phase"]), *values, f"{row['seconds']:.1f}"]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def in_own_process(phase: str, model: str, folder: Path, shard_bytes: int) -> dict[str, float]:
    """One row of the table."""
    command = [sys.executable, __file__, "--phase", phase, "--model", model]
    command += ["--folder", str(folder), "--shard-bytes", str(shard_bytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(phase: str, model: str, folder: Path, shard_bytes: int) -> dict[str, float]:
    """Run one phase here and say what it took."""
    config = NemotronHConfig.preset(model)
    run, written = prepare(phase, config, folder, shard_bytes)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.monotonic()
    run()
    seconds, peak = time.monotonic() - started, resident("VmHWM")
    sizes = [header.size for header in read_header(written).values()]
    return {
        "phase": phase,
        "total": sum(sizes),
        "largest_tensor": max(sizes),
        "largest_shard": max(file.stat().st_size for file in weight_files(written)),
        "above": peak - before,
        "peak": peak,
        "seconds": seconds,
    }  # type: ignore[dict-item]


def prepare(phase: str, config: NemotronHConfig, folder: Path, shard_bytes: int) -> tuple[Callable[[], object], Path]:
    """What to run, with everything loaded that does not count, and the folder whose sizes are shown."""
    plain, packed = folder / "plain", folder / "packed"
    if phase == "write":
        return lambda: write_both(config, plain, packed, shard_bytes), plain
    if phase in ("copy", "unpack", "widen"):
        source = packed if phase == "unpack" else plain
        dtype = "fp32" if phase == "widen" else hf_copy.KEEP
        return lambda: hf_copy.copy_folder(source, folder / phase, dtype, None, shard_bytes), folder / phase
    from nemo_cascade.models import convert, nemotron_h, parallel

    layout = parallel.start()
    model = nemotron_h.build(config, layout, "bf16")
    if phase == "import":
        return lambda: convert.load_folder(model, plain), plain
    return lambda: convert.save_folder(model, config, folder / phase, "bf16", None, shard_bytes), folder / phase


def write_both(config: NemotronHConfig, plain: Path, packed: Path, shard_bytes: int) -> None:
    """The same random model in published form and as recent transformers saves it."""
    write(config, config.tensor_shapes(), plain, shard_bytes)
    shapes = {}
    for name, shape in config.tensor_shapes().items():
        stem, _, rest = name.replace("backbone.", "model.").partition(".experts.")
        if not rest:
            shapes[stem] = shape
        elif rest.startswith("0."):
            shapes[f"{stem}.experts.{rest.split('.')[1]}"] = (config.n_routed_experts, *shape)
    write(config, shapes, packed, shard_bytes)


def write(config: NemotronHConfig, shapes: dict[str, tuple[int, ...]], folder: Path, shard_bytes: int) -> None:
    """Random weights under any names."""
    folder.mkdir()
    plan = [Planned(name, "BF16", shape) for name, shape in shapes.items()]
    writer = ShardWriter(folder, plan_shards(plan, shard_bytes))
    for name, tensor in random_tensors(shapes):
        hf_copy.write_tensor(writer, name, tensor, tensor.dtype)
    writer.finish()
    writer.forget()
    write_extras(config, folder, "bfloat16", None)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal values; a million are drawn once and shifted per tensor, since only their bytes count here."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, (name, shape) in enumerate(shapes.items()):
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        for part in tensor.view(-1).split(block.numel()):
            part.copy_(block.roll(number)[: part.numel()])
        yield name, tensor


def resident(key: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
