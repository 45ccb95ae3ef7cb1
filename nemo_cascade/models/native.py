"""C files of this package, compiled on first use and kept in the user's cache.

Without a C compiler, or with NEMO_CASCADE_NATIVE=0, PyTorch does the same work; which of the two is logged once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

LOG = logging.getLogger(__name__)
# Tuning for AMD Zen makes gcc avoid chains of fused multiply-adds, which halves the speed of the products here.
FLAGS = (
    "-O3", "-march=native", "-mtune=generic", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fopenmp-simd",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
COMPILE_DEADLINE_S = 120


def compiled(source: Path, what: str) -> ctypes.CDLL | None:
    """The loaded library of a C file, or None where it cannot be had. `what` it does is said in the log."""
    if os.environ.get("NEMO_CASCADE_NATIVE", "1") == "0":
        LOG.info("%s in plain PyTorch (NEMO_CASCADE_NATIVE=0)", what)
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        LOG.info("%s in plain PyTorch: no C compiler", what)
        return None
    try:
        loaded = ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()[-500:]
        LOG.warning("%s in plain PyTorch: %s could not be built: %s", what, source.name, said or error)
        return None
    LOG.info("%s in compiled C", what)
    return loaded


def _built(source: Path, compiler: str) -> Path:
    """The shared object for this source, its headers, compiler and processor; built aside and renamed."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    abilities = next((line for line in lines if line.startswith("flags")), "")
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    identity = "|".join([*texts, compiler, platform.machine(), abilities, *FLAGS])
    key = hashlib.sha256(identity.encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_cascade"
    target = cache / f"{source.stem}_{key[:16]}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            built = Path(aside) / f"{source.stem}.so"
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(source), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_DEADLINE_S)
            built.replace(target)
    return target
