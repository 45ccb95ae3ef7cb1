"""The same checkpoint on one rank and cut over two: same logits, same export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from nemo_cascade.models import convert
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH


def test_tensor_and_expert_parallel_ranks_compute_what_one_rank_does(
    model: NemotronH, config: NemotronHConfig, tmp_path: Path
) -> None:
    convert.save_folder(model, config, tmp_path / "hf")
    expected = []
    for lengths in ([40, 13, 24], [31]):
        tokens = torch.randint(0, config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(2))
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        with torch.no_grad():
            expected.append((tokens, bounds, model.packed_logits(tokens, bounds)))
    torch.save(expected, tmp_path / "expected.pt")
    script = Path(__file__).with_name("cut_over_ranks.py")
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
        outputs = [process.communicate(timeout=120)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
