"""Which pinned requirements an image lacks: printed, one a line, for pip.

NVIDIA's containers carry their own builds of torch, Transformer Engine and their friends; replacing one of them with
a wheel from the public index breaks the others. So what is there stays, whatever its version, and is listed on stderr
when the version differs from our pin. Only what our lines are written against, OURS, is brought to the pin in any
case.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

OURS = ("megatron-core", "nemo-toolkit")


def missing(lines: list[str]) -> tuple[list[str], list[str]]:
    """(requirements to install, notes about present ones of another version)."""
    wanted, notes = [], []
    for line in lines:
        if "==" not in line or line.startswith("#"):
            continue
        name, version = line.split("==")
        try:
            present = metadata.version(name)
        except metadata.PackageNotFoundError:
            wanted.append(line)
            continue
        if present != version and name in OURS:
            wanted.append(line)
        elif present != version:
            notes.append(f"{name}: the image has {present}, tested with {version}")
    return wanted, notes


def main(path: Path) -> None:
    """Print what is missing; say on stderr what differs."""
    wanted, notes = missing(path.read_text().splitlines())
    print("\n".join(wanted))
    print("\n".join(notes), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
