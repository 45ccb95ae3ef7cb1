"""What a stage cost, read from its metrics: steps, rollouts, tokens. The comparisons of tools/ count with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_cascade.cascade.artifacts import StageFolder, read_lines


@dataclass(frozen=True)
class Cost:
    """What training took. `sampled`: tokens drawn from the policy, those of dropped groups included; `trained`: tokens
    that passed forward and backward through the Learner, prompts included. A teacher's or reference's forward pass is
    in neither.
    """

    steps: int = 0
    rollouts: int = 0
    sampled: int = 0
    trained: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Sampled and trained tokens together: the budget that strategies share."""
        return self.sampled + self.trained

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps, self.rollouts + other.rollouts, self.sampled + other.sampled,
            self.trained + other.trained, self.seconds + other.seconds,
        )  # fmt: skip


def cost_of(folder: StageFolder, steps: int | None = None) -> Cost:
    """The cost of a stage's first `steps` steps; of all that were taken when None."""
    lines = list(read_lines(folder.metrics))
    return total(cost_of_step(line) for line in lines[:steps])


def cost_of_step(line: dict[str, float]) -> Cost:
    """One line of metrics.jsonl. An SFT step has no rollouts, and its `tokens` are the trained ones."""
    seconds = line.get("seconds/total", 0.0)
    if "rollouts" not in line:
        return Cost(1, 0, 0, round(line["tokens"]), seconds)
    dropped = line.get("groups_dropped", 0.0) * line["rollouts"] / line["groups"]
    trained = round(line.get("packed_tokens", 0.0))
    return Cost(1, round(line["rollouts"] + dropped), round(line["tokens"]), trained, seconds)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of several costs."""
    found = Cost()
    for cost in costs:
        found += cost
    return found
