"""Keep what libraries say at import out of what a user reads: our own lines would drown in it."""

from __future__ import annotations

import logging
import os
import warnings

CHATTY = ("megatron", "nemo_logger", "torch.distributed", "nv_one_logger", "httpx", "transformers")


def quiet_libraries() -> None:
    """Errors only, from the libraries that a stage or a command loads; call it before they are imported."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|nemo)\.")
