"""Rollouts on a NeMo-Gym server, token in and token out, as the loops play them."""

from __future__ import annotations

import pytest

from nemo_cascade import domains
from nemo_cascade.config.schema import FiltersConfig, SamplingConfig
from nemo_cascade.data.gym_wire import row_of
from nemo_cascade.domains.nemo_gym import NemoGym
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.gym.service import GymHttpServer, GymService
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.types import Invalid, Message, Rollout, Task, UserError
from tests.unit.rollout.standins import ScriptedSampler, nano_chat

CHAT = nano_chat()


def spoken(message: Message, thinking: bool) -> str:
    return CHAT.decode(CHAT.completion_ids(message, thinking)[:-1])


def collected(domain: Domain, task: Task, turns: list[str]) -> list[Rollout]:
    """Four rollouts of one task that all say these turns."""

    def answer(text: str, seed: int) -> str:
        return turns[text.count("<tool_response>")]

    filters = FiltersConfig(max_invalid_share=0.5)
    play = Collector(
        {domain.name: domain},
        ScriptedSampler(CHAT, answer),
        CHAT,
        SamplingConfig(max_new_tokens=90, max_total_tokens=900),
        filters,
    )
    groups = play.collect(lambda count, attempt: [] if attempt else [task], 1, 4, seed=1, step=2).groups
    play.close()
    return list(groups[0].rollouts)


def test_a_step_over_http_collects_what_a_step_here_collects() -> None:
    direct = domains.load("tool_use")
    server = GymHttpServer("127.0.0.1", 0, GymService(direct))
    server.start()
    remote = NemoGym(None, {"url": server.url, "timeout_s": 20.0})
    for task in direct.tasks("train", 6, seed=1):
        twin = remote.parse_row(row_of(task), "row")
        for flaw_rate in (0.0, 1.0):
            said = [m for m in direct.demonstrate(task, 1, flaw_rate) if m.role == "assistant"]
            turns = [spoken(message, task.thinking) for message in said]
            here, there = collected(direct, task, turns), collected(remote, twin, turns)
            assert [r.token_ids for r in there] == [r.token_ids for r in here]
            assert [r.loss_mask for r in there] == [r.loss_mask for r in here]
            assert [r.outcome for r in there] == [r.outcome for r in here]
            assert {r.reward for r in there} == {1.0 - flaw_rate}
    remote.close()
    server.stop()


def test_a_server_that_goes_down_aborts_the_step_and_trains_nothing() -> None:
    direct = domains.load("tool_use")
    task = direct.tasks("train", 1, seed=1)[0]
    turns = [spoken(message, task.thinking) for message in direct.demonstrate(task, 1) if message.role == "assistant"]
    server = GymHttpServer("127.0.0.1", 0, GymService(direct))
    server.start()
    remote = NemoGym(None, {"url": server.url, "timeout_s": 30.0, "retries": 1})
    twin = remote.parse_row(row_of(task), "row")
    assert not any(isinstance(rollout.outcome, Invalid) for rollout in collected(remote, twin, turns))
    server.stop()
    with pytest.raises(UserError, match=r"filters.max_invalid_share: 4 of 4 .*/seed_session failed"):
        collected(remote, twin, turns)
    remote.close()
