"""Exports of a policy that is cut over ranks and lies in bf16: the bytes of the checkpoint it was loaded from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.config.paths import PACKAGED
from nemo_cascade.models import convert, hf_copy
from nemo_cascade.models.config import NemotronHConfig


@pytest.mark.slow
def test_bf16_exports_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    # every value fits bf16, so that it does not matter which parameters a bf16 policy keeps in fp32
    rounded = ((name, tensor.bfloat16()) for name, tensor in hf_copy.stored(PACKAGED["nano"]))
    sha256 = convert.save_folder(rounded, NemotronHConfig.preset("nano"), tmp_path / "hf", "bf16")
    (tmp_path / "sha256").write_text(sha256)
    script = Path(__file__).with_name("export_over_ranks.py")
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=500)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
