"""Put a finished one-stage cascade's weights into the package: the end of `make nano-base` and `make nano-judge`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from nemo_cascade.cascade.manifest import read_manifest

SIZE_LIMIT = 8 * 2**20


def ship(cascade_folder: Path, target: Path) -> Path:
    """Replace `target` by the Hugging Face folder of the cascade's last stage."""
    manifest = read_manifest(cascade_folder)
    entry = manifest.stages[-1]
    folder = manifest.folders[entry.name]
    if not folder.is_done(entry.key):
        raise SystemExit(f"{folder.path}: not finished; run the cascade first")
    size = sum(path.stat().st_size for path in folder.hf.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{folder.hf}: {size} bytes are too many to ship; export in bf16")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder.hf, target)
    return target


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), Path(sys.argv[2])))
