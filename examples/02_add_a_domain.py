"""A domain in one file outside the package (`reverse_words.py`), taught by SFT and sharpened by GRPO. About 40 seconds.

python examples/02_add_a_domain.py
"""

import json
import os
import tempfile
from pathlib import Path

from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.domains import load
from nemo_cascade.types import Scored

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prove the reward, then train on it."""
    os.chdir(ROOT)  # the domain is named by its path
    domain = load("examples/reverse_words.py:ReverseWords")
    for case in domain.cases():
        outcome = domain.score(case.task, case.transcript)
        assert isinstance(outcome, Scored)
        assert outcome.reward == case.reward, case.because
        print(f"reward {outcome.reward:.0f} for {case.transcript.final.content!r}: {case.because}")
    with tempfile.TemporaryDirectory() as output:
        folder = run(load_cascade("examples/reverse/cascade.yaml", [f"output={output}"]), Options(), print)
        (metrics,) = folder.glob("reverse_rl-*/metrics.jsonl")
        rewards = [json.loads(line)["reward"] for line in metrics.read_text().splitlines()]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"mean reward of the first five steps {first:.2f}, of the last five {last:.2f}")
    assert last > first, "GRPO did not raise the reward"


if __name__ == "__main__":
    main()
