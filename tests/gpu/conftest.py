"""What Transformer Engine reads at import must be set before any test file is read."""

import os

os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
