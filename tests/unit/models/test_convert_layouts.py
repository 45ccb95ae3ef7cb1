"""Exports of a policy that is cut over ranks and lies in bf16: the bytes of the checkpoint it was loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.config.paths import PACKAGED
from nemo_cascade.models import convert, hf_copy
from nemo_cascade.models.config import NemotronHConfig
from tests import ranks
from tests.unit.models import export_over_ranks


@pytest.mark.slow
def test_bf16_exports_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    # every value fits bf16, so that it does not matter which parameters a bf16 policy keeps in fp32
    rounded = ((name, tensor.bfloat16()) for name, tensor in hf_copy.stored(PACKAGED["nano"]))
    sha256 = convert.save_folder(rounded, NemotronHConfig.preset("nano"), tmp_path / "hf", "bf16")
    (tmp_path / "sha256").write_text(sha256)
    ranks.run(export_over_ranks.__file__, str(tmp_path))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
