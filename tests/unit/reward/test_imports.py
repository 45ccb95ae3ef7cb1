"""Importing the graders loads nothing heavy: `nemo-cascade check` answers on a login node without torch."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "sympy", "math_verify", "httpx", "py3langid", "transformers")
MODULES = (
    "genrm", "gym.client", "gym.service", "instructions", "judge", "math_equal", "math_worker", "mcqa", "repository",
    "sandbox", "schema", "search_replace",
)  # fmt: skip


def test_graders_import_without_heavy_packages() -> None:
    lines = [f"import nemo_cascade.reward.{name}" for name in MODULES]
    lines += ["import sys", f"print([name for name in {HEAVY} if name in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr
