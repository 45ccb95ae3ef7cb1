"""What several flow tests compare with."""

import pytest

from nemo_cascade.config.paths import PACKAGED
from tests.flow.real_cascade import Cascade


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Cascade:
    """The real cascade, run once without any trouble."""
    for name, folder in PACKAGED.items():
        if not (folder / "config.json").is_file():
            pytest.skip(f"hf:{name} is not trained yet: make nano-base nano-judge")
    cascade = Cascade(tmp_path_factory.mktemp("uninterrupted"))
    done = cascade.run(PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return cascade
