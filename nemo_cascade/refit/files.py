"""Refit through a shared folder: the Learner writes a Hugging Face folder, the Sampler reads it, perhaps elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from nemo_cascade.models.hf_copy import stored
from nemo_cascade.protocols import Learner, Sampler
from nemo_cascade.refit.checksum import ChecksummedSampler, expect_equal
from nemo_cascade.refit.rounding import Rounding

KEPT_FOLDERS = 2  # a sampler may still be reading the previous one


class FolderSampler(ChecksummedSampler, Protocol):
    """A Sampler that can read a Hugging Face folder; its checksum is then the folder's content sha256."""

    def load_folder(self, folder: str | Path, version: int) -> None:
        """Take the weights of the folder: all of them or, on an error, none."""


class FileRefit:
    """Every refit is a folder `version_000012` below `folder`, complete or absent (the Learner renames it into place).

    Both sides hash what is in the folder; the two newest folders stay.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def refit(self, learner: Learner, sampler: Sampler, version: int) -> str:
        """Export, load, compare; returns the content sha256 of the weights."""
        path = self.folder / f"version_{version:06d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # launch pairs this refit with samplers that read folders
        reader: FolderSampler = sampler  # type: ignore[assignment]
        rounding = Rounding(reader.holds)
        sent = learner.export(str(path))
        if rounding.possible:
            for name, tensor in stored(path):
                rounding.add(name, tensor)
        rounding.report(version)
        reader.load_folder(path, version)
        expect_equal(sent, reader.checksum, version)
        for old in sorted(self.folder.glob("version_*"))[:-KEPT_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
        return sent
