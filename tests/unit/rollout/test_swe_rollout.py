"""A released software row through the Collector: tokens of tool calls in, the repository's own tests out."""

from __future__ import annotations

from pathlib import Path

from nemo_cascade.config.schema import FiltersConfig, SamplingConfig
from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentic import SweAgentic
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.types import Invalid, Json, Message, Scored, Task
from tests.unit.domains.swe_rows import FAULT, REPAIR, repository, row
from tests.unit.rollout.standins import CountDomain, ScriptedSampler, nano_chat

CHAT = nano_chat()


def called(name: str, **arguments: str) -> str:
    """A tool call as the model writes it."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def collected(domain: SweAgentic, task: Task, script: list[str], **sampling: int):
    """One rollout of this script, turn by turn; the last entry is repeated."""

    def answer(text: str, seed: int) -> str:
        turn = text.count("<tool_response>")
        return script[min(turn, len(script) - 1)]

    knobs = {"max_new_tokens": 200, "max_prompt_tokens": 6000, "max_total_tokens": 8000, **sampling}
    play = Collector(
        {domain.name: domain},
        ScriptedSampler(CHAT, answer),
        CHAT,
        SamplingConfig(**knobs),
        FiltersConfig(max_invalid_share=1.0),
    )
    try:
        (rollout,) = play.collect(lambda count, attempt: [task] if not attempt else [], 1, 1, 0, 0).groups[0].rollouts
    finally:
        play.close()
    return rollout


def test_rollouts_of_a_released_row(tmp_path: Path) -> None:
    folder = tmp_path / "acme__shop"
    folder.mkdir()
    base = repository(folder)
    services = Services()
    options: dict[str, Json] = {"repositories": str(tmp_path), "memory_mb": 1024, "scratch_mb": 64}
    repair = called("edit", path="shop/prices.py", old=FAULT, new=REPAIR)
    look = called("run", command="grep -n RATE shop/prices.py")
    try:
        domain = SweAgentic(services, options)
        task = domain.parse_row(row(base), "rows:1")
        rollout = collected(domain, task, [look, repair, called("finish")])
        assert rollout.outcome == Scored(1.0, {"fail_to_pass": 1.0, "pass_to_pass": 1.0}, "all tests pass")
        said = [message.content for message in rollout.transcript.messages if message.role == "tool"]
        assert said[0].startswith("3:RATE = 20\n") and said[1] == "ok"
        ids = list(CHAT.prompt_ids(task))
        assert list(rollout.token_ids[: len(ids)]) == ids and 0 < rollout.num_sampled < len(rollout.token_ids) - len(
            ids
        )

        few = SweAgentic(services, {**options, "max_turns": 2})  # the repair is made, and the model goes on
        rollout = collected(few, few.parse_row(row(base), "rows:1"), [repair, look])
        assert rollout.transcript.truncated
        assert rollout.outcome == Invalid("resolved, but cut off by the limit on turns or context")
        full = len(ids) + len(CHAT.encode_text(repair)) + 60  # the window ends inside the second turn
        rollout = collected(domain, task, [repair, "I wonder. " * 100], max_total_tokens=full)
        assert rollout.transcript.truncated and len(rollout.token_ids) <= full
        assert rollout.outcome == Invalid("resolved, but cut off by the limit on turns or context")
        rollout = collected(domain, task, [look, "I wonder. " * 100], max_total_tokens=full)
        assert isinstance(rollout.outcome, Scored) and rollout.outcome.reward == 0.0
    finally:
        services.close()


class TwoTurns(CountDomain):
    """Up to four turns, two for these tasks."""

    def turns(self, task: Task) -> int:
        return 2


def test_a_domain_may_give_its_tasks_turns_of_their_own() -> None:
    task = Task("count-1", "count", (Message("user", "count"),))
    for domain, turns in ((CountDomain(), 3), (TwoTurns(), 2)):
        play = Collector(
            {"count": domain},
            ScriptedSampler(CHAT, lambda text, seed: "1"),
            CHAT,
            SamplingConfig(40, max_total_tokens=400),
        )
        (rollout,) = play.evaluate_tasks([task], 1, 0)
        play.close()
        assert sum(message.role == "assistant" for message in rollout.transcript.messages) == turns
        assert rollout.transcript.truncated == (turns == 2)
