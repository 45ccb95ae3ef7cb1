"""The training loops: `sft`, `grpo`, `mopd`. Each fits one screen and sees only the protocols."""
