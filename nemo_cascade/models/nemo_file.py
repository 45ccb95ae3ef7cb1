"""Is a `.nemo` file whole? It is a tar with the model's config and its weights as torch saves them."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from nemo_cascade.types import UserError


def check_nemo_file(path: str | Path) -> None:
    """Read the file to its end, each tensor against the checksum that torch wrote beside it and never looks at.

    UserError says what is damaged, before anything is loaded.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is None or not member.name.endswith(".ckpt"):
                    continue
                with zipfile.ZipFile(stream) as weights:
                    if (damaged := weights.testzip()) is not None:
                        raise UserError(f"{path}: {damaged} in {Path(member.name).name} is damaged; {_REMEDY}")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        said = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path}: not a .nemo file, damaged or cut short ({said}); {_REMEDY}") from error


_REMEDY = "copy or export it again"
