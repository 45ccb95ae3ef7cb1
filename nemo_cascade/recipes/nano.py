"""The nano cascade through NeMo-Run: `python -m nemo_cascade.recipes.nano`, on this machine unless told otherwise."""

from __future__ import annotations

import sys

from nemo_cascade.recipes.experiment import main

if __name__ == "__main__":  # NeMo-Run imports this file again
    sys.exit(main("nano", "local"))
