"""Where a cascade runs: NeMo-Run experiments on this machine, in Docker, or on Slurm. `conf` says what runs.

NeMo-Run submits and shows; truth stays in the markers of the stage folders. Its local executor goes on after a failed
stage, its relaunch forgets dependencies, and its `_DONE` does not mean success, so a relaunch here is a new
experiment of what is not done, and every stage guards itself.
"""
