"""A cascade of two stages, run, resumed and read from Python. About 40 seconds.

python examples/03_two_stage_cascade.py
"""

import tempfile
from pathlib import Path

from nemo_cascade.cascade.report import write_report
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.config.load import load_cascade

SMALL = [
    "stages=[nano/sft, nano/if_rl]", "hardware=cpu1", "stages.*.num_steps=4",
    "stages.sft.tokens_per_step=2048", "stages.if_rl.prompts_per_step=4",
    "evaluation.select=16", "evaluation.report=16", "evaluation.other_mode=0",
    "evaluation.domains=[instruction_following, math]",
]  # fmt: skip


def main() -> None:
    """Run `sft` and `if_rl` of the nano cascade at a small size, twice."""
    with tempfile.TemporaryDirectory() as output:
        cascade = load_cascade("nano", [*SMALL, f"output={output}"])
        lines: list[str] = []
        run(cascade, Options(), print)
        print("the same again:")
        folder = run(cascade, Options(), lambda line: (print(line), lines.append(line))[0])
        assert all(": done (" in line for line in lines if line.startswith("[")), lines
        report: Path = write_report(folder)
        print(f"{report.name}: {report.stat().st_size // 1024} KiB, open it in a browser")


if __name__ == "__main__":
    main()
