"""The experts of a rollout: of every token of the conversation, whoever shared the batch and however many turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nemo_cascade.config.schema import SamplingConfig
from nemo_cascade.domains import SingleTurn
from nemo_cascade.models.decode import DecodeModel
from nemo_cascade.observe.rollouts import experts_file, read_groups, write_rollouts
from nemo_cascade.rollout.collect import Collected, Collector
from nemo_cascade.rollout.conversation import Conversation
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.rollout.source import RecordedRollouts, SampledRollouts
from nemo_cascade.types import (
    NO_CHOICE,
    Completion,
    Group,
    Message,
    Outcome,
    Request,
    Rollout,
    SamplingParams,
    Scored,
    Task,
    Transcript,
    UserError,
)
from tests.unit.rollout.standins import nano_chat, random_weights, tiny_config

CONFIG = tiny_config()
CHAT = nano_chat()
TASKS = [Task(f"lookup-{word}", "lookup", (Message("user", word),)) for word in ("fox", "owl")]


class Lookup:
    """A tool that answers whatever it is asked, twice."""

    def __init__(self) -> None:
        self.asked = 0

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        self.asked += 1
        return None if self.asked == 3 else (Message("tool", f"entry {self.asked} of {len(message.content)}"),)

    def close(self) -> None:
        pass


class LookupDomain(SingleTurn):
    """Three assistant turns with a tool's answer between them; rewards differ with the length of the last."""

    name = "lookup"
    max_turns = 3

    def begin(self, task: Task) -> Lookup:  # type: ignore[override]
        return Lookup()

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        return Scored(float(len(transcript.final.content)))


def sampler(max_batch: int = 128) -> LocalSampler:
    """Random weights under which most answers end before their limit."""
    made = LocalSampler(CONFIG, max_batch=max_batch)
    weights = random_weights(CONFIG, scale=0.15)
    weights["lm_head.weight"][CHAT.im_end_id] *= 6.0  # far above or far below every other token
    made.load_weights(iter(weights.items()), 0)
    return made


def recomputed(tokens: tuple[int, ...]) -> np.ndarray:
    """[tokens, MoE layers, top-k] in ascending order, from reading all of them at once."""
    experts: list[bytes] = []
    named = random_weights(CONFIG, scale=0.15)
    DecodeModel(CONFIG, named).prefill([tokens], experts=experts)
    return np.sort(table(experts[0], len(tokens)), -1)


def table(experts: bytes, tokens: int) -> np.ndarray:
    return np.frombuffer(experts, np.uint8).reshape(tokens, len(CONFIG.layers("E")), CONFIG.num_experts_per_tok)


def collected(experts: bool = True) -> Collected:
    """Two groups of four."""
    collector = Collector({"lookup": LookupDomain()}, sampler(), CHAT, SamplingConfig(12, max_total_tokens=160))
    collector.routed_experts = experts
    found = SampledRollouts(collector, 2, 4, seed=1).groups(0, lambda count, attempt: TASKS)
    collector.close()
    return found


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def test_rows_that_join_and_leave_a_batch_keep_their_own() -> None:
    """Eleven requests, three at a time, two of them with the same prompt; every other one asks."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 512, size).tolist()) for size in (4, 37, 9, 1, 20)]
    engine = sampler(max_batch=3).engine()
    asked = [Request(prompts[index % 5], index, 3 + index) for index in range(11)]
    for index, request in enumerate(asked):
        engine.add(index, request, SamplingParams(14, stop_ids=(CHAT.im_end_id,), routed_experts=index % 2 == 0))
    found: dict[int, Completion] = {}
    while engine.busy:
        found.update(engine.step())
    for index, completion in found.items():
        tokens = asked[index].token_ids + completion.token_ids
        if index % 2:
            assert completion.routed_experts == b""
            continue
        own = table(completion.routed_experts, len(tokens))
        assert np.array_equal(np.sort(own[:-1], -1), recomputed(tokens)[:-1]), index
        assert (own[-1] == NO_CHOICE).all()
    assert sorted(found) == list(range(11))


def test_a_conversation_with_tools_has_the_experts_of_all_its_tokens() -> None:
    rollouts = rollouts_of(collected().groups)
    turns = [sum(message.role == "tool" for message in rollout.transcript.messages) for rollout in rollouts]
    assert len(rollouts) == 8 and max(turns) == 2
    for rollout in rollouts:
        own = table(rollout.routed_experts, len(rollout.token_ids))
        assert np.array_equal(np.sort(own[:-1], -1), recomputed(rollout.token_ids)[:-1])
        assert (own[-1] == NO_CHOICE).all() and rollout.loss_mask[-1] == 1
    assert {rollout.routed_experts for rollout in rollouts_of(collected(experts=False).groups)} == {b""}


def test_a_token_keeps_the_experts_by_which_it_was_sampled() -> None:
    """The next turn reads the conversation again and may see a tie the other way; only new tokens take its word."""
    conversation = Conversation(TASKS[0], 0, 0, 0, Lookup(), 3, [1, 2])
    conversation.hear(Completion((3, 4), (-1.0, -1.0), "stop", 0, bytes([10, 11, 12, NO_CHOICE])), CHAT)
    assert conversation.routed_experts == bytes([10, 11, 12, NO_CHOICE])
    conversation.take((Message("tool", "x"),), CHAT, 160)
    length = len(conversation.token_ids)
    again = bytes([20 + index for index in range(length)]) + bytes([99, NO_CHOICE])
    conversation.hear(Completion((5, CHAT.im_end_id), (-1.0, -1.0), "stop", 0, again), CHAT)
    assert conversation.routed_experts == bytes([10, 11, 12]) + again[3:]
    conversation.take(None, CHAT, 160)
    assert conversation.rollout().routed_experts == conversation.routed_experts


def test_recorded_experts_read_back_equal(tmp_path) -> None:
    found = collected()
    for replica in range(2):
        write_rollouts(tmp_path, 3, found.groups[replica : replica + 1], replica=replica)
    for replicas in (1, 2):
        sources = [RecordedRollouts(tmp_path, replica, replicas, experts=True) for replica in range(replicas)]
        groups = [group for source in sources for group in source.groups(3, lambda count, attempt: []).groups]
        groups.sort(key=lambda group: group.task.id)
        for one, other in zip(rollouts_of(groups), rollouts_of(found.groups), strict=True):
            assert one.token_ids == other.token_ids
            assert one.routed_experts == other.routed_experts != b""
    assert {rollout.routed_experts for rollout in rollouts_of(read_groups(tmp_path, 3))} == {b""}
    for damaged in (b"PK but no archive", b""):
        experts_file(tmp_path, 3, 1).write_bytes(damaged)
        with pytest.raises(UserError, match=r"step_000003.1.npz: the recorded experts cannot be read"):
            read_groups(tmp_path, 3, experts=True)
    experts_file(tmp_path, 3, 1).unlink()
    with pytest.raises(UserError, match=r"step_000003.1.npz: no such file, so these rollouts do not say"):
        read_groups(tmp_path, 3, experts=True)
    write_rollouts(tmp_path, 3, read_groups(tmp_path, 3, 0))  # again, without experts: those of before are gone
    assert not experts_file(tmp_path, 3).exists()


def test_models_whose_experts_cannot_be_told_are_refused() -> None:
    dense = LocalSampler(tiny_config(hybrid_override_pattern="M*M"))
    dense.load_weights(iter(random_weights(dense.config).items()), 0)
    with pytest.raises(UserError, match="the model has no layer of experts"):
        list(dense.sample([Request((1,), 0, 1)], SamplingParams(1, routed_experts=True)))
    many = LocalSampler(tiny_config(n_routed_experts=256, moe_intermediate_size=1))
    many.load_weights(iter(random_weights(many.config).items()), 0)
    with pytest.raises(UserError, match="expert numbers are bytes, the model has 256"):
        list(many.sample([Request((1,), 0, 1)], SamplingParams(1, routed_experts=True)))
