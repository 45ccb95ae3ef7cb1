"""The paper's cascade on the 30B-A3B model through NeMo-Run, on Slurm.

`python -m nemo_cascade.recipes.nemotron_cascade_2 --dry-run` prints the job scripts. Copy
conf/executor/slurm.yaml, fill in the account and the image, and pass it as `--executor my_cluster.yaml`.
"""

from __future__ import annotations

import sys

from nemo_cascade.recipes.experiment import main

if __name__ == "__main__":  # NeMo-Run imports this file again
    sys.exit(main("nemotron_cascade_2", "slurm"))
