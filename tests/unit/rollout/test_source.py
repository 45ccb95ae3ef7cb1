"""A replica's leader shares its groups, or why there are none; recorded groups read back equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.config.schema import FiltersConfig, SamplingConfig
from nemo_cascade.observe.rollouts import write_rollouts
from nemo_cascade.rollout.collect import Collected, Collector
from nemo_cascade.rollout.source import RecordedRollouts, SampledRollouts
from nemo_cascade.types import Message, Task, UserError
from tests.unit.rollout.standins import EchoDomain, ScriptedSampler, nano_chat

CHAT = nano_chat()
TASKS = [Task(f"echo-{word}", "echo", (Message("user", word),), truth={"word": "fox"}) for word in ("fox", "owl")]


def leader(max_invalid_share: float = 0.2) -> Collector:
    sampler = ScriptedSampler(CHAT, lambda text, seed: "fox" if seed % 2 else "break")
    filters = FiltersConfig(max_invalid_share=max_invalid_share)
    return Collector({"echo": EchoDomain()}, sampler, CHAT, SamplingConfig(max_new_tokens=9), filters)


class Link:
    """The leader's message to the others."""

    def __init__(self) -> None:
        self.sent: Collected | UserError | None = None

    def share(self, found: Collected | UserError | None) -> Collected | UserError:
        self.sent = found if found is not None else self.sent
        assert self.sent is not None
        return self.sent


def test_ranks_without_a_collector_get_the_leaders_groups() -> None:
    link = Link()
    given = SampledRollouts(leader(1.0), 2, 4, seed=1, share=link.share).groups(3, lambda count, attempt: TASKS)
    got = SampledRollouts(None, 2, 4, seed=1, share=link.share).groups(3, lambda count, attempt: [])
    assert got is given
    assert [group.task.id for group in got.groups] == ["echo-fox", "echo-owl"]


def test_the_leaders_error_stops_every_rank() -> None:
    link = Link()
    for collector in (leader(0.01), None):
        source = SampledRollouts(collector, 2, 8, seed=1, share=link.share)
        with pytest.raises(UserError, match="filters.max_invalid_share"):
            source.groups(3, lambda count, attempt: TASKS)


def test_recorded_rollouts_train_again_without_a_sampler(tmp_path: Path) -> None:
    collected = SampledRollouts(leader(1.0), 2, 4, seed=1).groups(5, lambda count, attempt: TASKS)
    write_rollouts(tmp_path, 5, collected.groups)
    again = RecordedRollouts(tmp_path).groups(5, lambda count, attempt: [])
    assert again.tokens == collected.tokens and again.invalid == collected.invalid > 0
    for mine, theirs in zip(again.groups, collected.groups, strict=True):
        assert mine.in_loss == theirs.in_loss
        for one, other in zip(mine.rollouts, theirs.rollouts, strict=True):
            assert (one.token_ids, one.loss_mask, one.versions) == (other.token_ids, other.loss_mask, other.versions)
            assert one.logprobs == pytest.approx(other.logprobs) and one.outcome == other.outcome
    with pytest.raises(UserError, match="no recorded rollouts of step 6"):
        RecordedRollouts(tmp_path).groups(6, lambda count, attempt: [])


def test_recorded_groups_are_dealt_to_another_number_of_replicas(tmp_path: Path) -> None:
    collected = SampledRollouts(leader(1.0), 2, 4, seed=1).groups(0, lambda count, attempt: TASKS)
    for replica in range(2):
        write_rollouts(tmp_path, 0, collected.groups[replica : replica + 1], replica=replica)

    def dealt(replica: int, replicas: int) -> list[str]:
        found = RecordedRollouts(tmp_path, replica, replicas).groups(0, lambda count, attempt: [])
        return [group.task.id for group in found.groups]

    assert [dealt(0, 2), dealt(1, 2)] == [["echo-fox"], ["echo-owl"]]
    assert sorted(dealt(0, 1)) == ["echo-fox", "echo-owl"]
    assert sorted(dealt(0, 3) + dealt(1, 3) + dealt(2, 3)) == ["echo-fox", "echo-owl"]
