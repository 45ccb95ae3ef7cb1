"""Collection with real domains, the real tokenizer and a scripted sampler that answers out of order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from nemo_cascade.config.schema import FiltersConfig, SamplingConfig
from nemo_cascade.protocols import Domain
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.rollout.conversation import request_seed
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.types import Invalid, Message, Outcome, Scored, Task, Transcript, UserError
from tests.unit.rollout.standins import (
    CountDomain,
    EchoDomain,
    LengthDomain,
    RankDomain,
    ScriptedSampler,
    StuckDomain,
    nano_chat,
    random_weights,
    tiny_config,
)

CHAT = nano_chat()


def echo(word: str, prompt: str = "say") -> Task:
    return Task(f"echo-{word}", "echo", (Message("user", f"{prompt} {word}"),), truth={"word": word})


def collector(
    domains: Sequence[Domain],
    answer: Callable[[str, int], str],
    filters: Mapping[str, object] | None = None,
    **sampling: int,
) -> Collector:
    knobs = {"max_new_tokens": 40, "max_total_tokens": 400, **sampling}
    named = {domain.name: domain for domain in domains}
    return Collector(
        named, ScriptedSampler(CHAT, answer), CHAT, SamplingConfig(**knobs), FiltersConfig(**(filters or {}))
    )


def give(*batches: Sequence[Task]):
    return lambda count, attempt: list(batches[attempt]) if attempt < len(batches) else []


def half_right(text: str, seed: int) -> str:
    """The asked word on even seeds; "easy" words always."""
    word = text.split("say ")[1].split("<")[0].strip()
    return word if "easy" in word or seed % 2 == 0 else "no"


def test_single_turn_groups_hold_what_was_sampled() -> None:
    play = collector([EchoDomain()], half_right)
    collected = play.collect(give([echo("fox"), echo("owl")]), 2, 6, seed=3, step=4)
    assert [group.task.id for group in collected.groups] == ["echo-fox", "echo-owl"]
    for group in collected.groups:
        assert [rollout.sample for rollout in group.rollouts] == list(range(6))
        prompt = CHAT.prompt_ids(group.task)
        for rollout in group.rollouts:
            right = request_seed(3, 4, group.task.id, rollout.sample, 0) % 2 == 0
            said = group.task.truth["word"] if right else "no"
            sampled = [*CHAT.encode_text(str(said)), CHAT.im_end_id]
            assert list(rollout.token_ids) == prompt + sampled
            assert list(rollout.loss_mask) == [0] * len(prompt) + [1] * len(sampled)
            assert list(rollout.logprobs) == [0.0] * len(prompt) + [-0.5] * len(sampled)
            assert list(rollout.versions) == [-1] * len(prompt) + [5] * len(sampled)
            assert rollout.reward == float(right)
    assert collected.rollouts == 12
    assert collected.tokens == sum(rollout.num_sampled for group in collected.groups for rollout in group.rollouts)


def test_the_same_task_twice_in_a_step_gets_other_random_streams() -> None:
    play = collector([EchoDomain()], half_right)
    play.collect(give([echo("fox"), echo("fox")]), 2, 4, seed=3, step=4)
    seeds = [request.seed for request in play.sampler.batches[0]]
    assert len(set(seeds)) == 8


def test_multi_turn_appends_ids_and_closes_environments() -> None:
    def count(text: str, seed: int) -> str:
        return str(text.count("next") + 1)

    domain = CountDomain()
    play = collector([domain], count)
    task = Task("count-1", "count", (Message("user", "count"),))
    rollout = play.collect(give([task]), 1, 2, seed=0, step=0).groups[0].rollouts[0]
    assert rollout.reward == 1.0
    said = [f"{message.role}:{message.content}" for message in rollout.transcript.messages]
    assert said == ["assistant:1", "user:next 1", "assistant:2", "user:next 2", "assistant:3"]
    demonstrated, mask = CHAT.encode_conversation(task, rollout.transcript.messages)
    # The demonstration's assistant turns hold the same ids only where the template's empty thinking is in the prompt.
    assert sum(rollout.loss_mask) == sum(mask)
    assert list(rollout.token_ids) == demonstrated
    assert list(rollout.loss_mask) == mask
    assert domain.closed == ["count-1", "count-1"]


def test_turn_limit_with_the_environment_waiting_is_truncated() -> None:
    domain = CountDomain(max_turns=2)
    play = collector([domain], lambda text, seed: str(text.count("next") + 1))
    rollout = (
        play.collect(give([Task("count-1", "count", (Message("user", "count"),))]), 1, 2, 0, 0).groups[0].rollouts[0]
    )
    assert rollout.transcript.truncated
    assert [message.role for message in rollout.transcript.messages] == ["assistant", "user", "assistant"]
    assert rollout.reward == 0.0


def test_token_limits_cut_turns_and_conversations() -> None:
    play = collector([EchoDomain()], lambda text, seed: "a b c d e f g h", max_new_tokens=3)
    rollout = play.collect(give([echo("fox")]), 1, 2, 0, 0).groups[0].rollouts[0]
    assert rollout.num_sampled == 3 and rollout.transcript.truncated
    task = Task("count-1", "count", (Message("user", "count"),))
    room = len(CHAT.prompt_ids(task)) + 4
    play = collector([CountDomain()], lambda text, seed: "1", max_total_tokens=room)
    rollout = play.collect(give([task]), 1, 2, 0, 0).groups[0].rollouts[0]
    assert len(rollout.token_ids) <= room and rollout.transcript.truncated


def test_dynamic_filtering_replaces_groups_until_the_batch_is_full() -> None:
    play = collector([EchoDomain()], half_right, {"dynamic": True})
    first = [echo("easy1"), echo("fox"), echo("easy2")]
    second = [echo("easy3"), echo("owl"), echo("elk")]
    collected = play.collect(give(first, second), 3, 8, seed=1, step=0)
    assert [group.task.id for group in collected.groups] == ["echo-fox", "echo-owl", "echo-elk"]
    assert collected.dropped == {"all_correct": 3}
    assert collected.metrics() == {"groups_dropped": 3.0, "groups_dropped/all_correct": 3.0, "refills": 1.0}
    assert collected.rollouts == 6 * 8
    batches = [len(batch) for batch in play.sampler.batches]
    assert batches == [24, 16, 8]  # 2 replacements (easy3, owl), then one more (elk)


def test_refills_are_bounded_and_the_message_names_the_remedy() -> None:
    play = collector([EchoDomain()], half_right, {"dynamic": True, "max_refills": 2})
    easy = [echo("easy1"), echo("easy2")]
    with pytest.raises(UserError, match=r"after 2 refills only 0 of 2 groups are usable \(dropped: 6 all_correct\)"):
        play.collect(give(easy, easy, easy, easy), 2, 4, 0, 0)


def test_every_reason_is_counted_and_the_surplus_never_reaches_another_step() -> None:
    """Easy words are all right, "never" ones all wrong, "half" ones differ below the bound, the rest is kept."""

    def answer(text: str, seed: int) -> str:
        word = text.split("say ")[1].split("<")[0].strip()
        return "no" if "never" in word else half_right(text, seed)

    class Partial(EchoDomain):
        def score(self, task: Task, transcript: Transcript) -> Outcome:
            outcome = super().score(task, transcript)
            assert isinstance(outcome, Scored)
            return Scored(0.4 * outcome.reward) if "half" in str(task.truth["word"]) else outcome

    play = collector([Partial()], answer, {"dynamic": True, "mask_groups_below_max": 0.5})
    first = [echo("easy"), echo("never"), echo("half"), echo("owl")]
    more = [echo("fox"), echo("elk"), echo("cat"), echo("dog")]
    collected = play.collect(give(first, more), 4, 8, seed=1, step=0)
    assert collected.dropped == {"all_correct": 1, "all_wrong": 1, "below_max": 1}
    assert [group.task.id for group in collected.groups] == ["echo-owl", "echo-fox", "echo-elk", "echo-cat"]
    assert (collected.refills, collected.rollouts) == (1, 7 * 8)  # "dog" was given, not needed and never sampled
    later = play.collect(give([echo("ant"), echo("bee")]), 2, 8, seed=1, step=1)
    assert [group.task.id for group in later.groups] == ["echo-ant", "echo-bee"]


def test_without_dynamic_filtering_a_masked_group_stays_and_is_counted() -> None:
    play = collector([EchoDomain()], lambda text, seed: "no", {"mask_groups_below_max": 0.5})
    collected = play.collect(give([echo("fox")]), 1, 4, 0, 0)
    assert collected.groups[0].in_loss == (False,) * 4
    assert collected.metrics() == {"groups_dropped": 1.0, "groups_dropped/all_wrong": 1.0, "refills": 0.0}


def test_a_sampler_that_gives_no_numbers_makes_its_rollouts_invalid() -> None:
    play = collector([EchoDomain()], half_right, {"max_invalid_share": 0.9})
    sample = play.sampler.sample

    def broken(requests, params):
        for index, completion in sample(requests, params):
            bad = requests[index].seed % 3 == 0
            yield index, replace(completion, logprobs=(math.nan, *completion.logprobs[1:])) if bad else completion

    play.sampler.sample = broken
    group = play.collect(give([echo("fox")]), 1, 12, seed=0, step=0).groups[0]
    bad = [request_seed(0, 0, "echo-fox", sample, 0) % 3 == 0 for sample in range(12)]
    assert 0 < sum(bad) < 12
    reason = "the sampler gave NaN as a log-probability (task echo-fox, turn 1)"
    assert [rollout.outcome == Invalid(reason) for rollout in group.rollouts] == bad
    assert [not kept for kept in group.in_loss] == bad
    assert not any(math.isnan(value) for rollout in group.rollouts for value in rollout.logprobs)


def test_too_long_prompts_are_counted_and_replaced() -> None:
    play = collector([EchoDomain()], half_right, max_prompt_tokens=40)
    long = echo("fox", prompt="word " * 60 + "say")
    collected = play.collect(give([long, echo("owl")], [echo("elk")]), 2, 2, 0, 0)
    assert [group.task.id for group in collected.groups] == ["echo-owl", "echo-elk"]
    assert collected.dropped == {"prompt_too_long": 1}


def test_invalid_verdicts_are_asked_for_again() -> None:
    domain = EchoDomain(invalid_first=2)
    play = collector([domain], lambda text, seed: "fox")
    group = play.collect(give([echo("fox")]), 1, 1, 0, 0).groups[0]
    assert group.rollouts[0].outcome == Scored(1.0)
    assert domain.asked == {("echo-fox", "fox"): 3}


def test_a_share_of_invalid_rollouts_is_borne_and_then_not() -> None:
    def sometimes(text: str, seed: int) -> str:
        return "break" if seed % 4 == 0 else "fox"

    group = (
        collector([EchoDomain()], sometimes, {"max_invalid_share": 0.9})
        .collect(give([echo("fox")]), 1, 16, 0, 0)
        .groups[0]
    )
    invalid = [isinstance(rollout.outcome, Invalid) for rollout in group.rollouts]
    assert 0 < sum(invalid) < 16
    assert [not kept for kept in group.in_loss] == invalid
    with pytest.raises(UserError, match="filters.max_invalid_share: .* most often: judge down"):
        collector([EchoDomain()], sometimes, {"max_invalid_share": 0.01}).collect(give([echo("fox")]), 1, 16, 0, 0)


def test_rewards_that_see_the_group_get_it_whole_and_in_order() -> None:
    play = collector([RankDomain()], lambda text, seed: "a" * (1 + seed % 7))
    task = Task("rank-1", "rank", (Message("user", "go"),))
    rollouts = play.collect(give([task]), 1, 8, 0, 0).groups[0].rollouts
    lengths = [len(rollout.transcript.final.content) for rollout in rollouts]
    assert [rollout.reward for rollout in rollouts] == [float(length == max(lengths)) for length in lengths]


def test_a_verdict_after_the_deadline_is_invalid_and_the_step_goes_on() -> None:
    play = collector([EchoDomain(delay_s=30.0)], lambda text, seed: "fox", {"max_invalid_share": 1.0})
    play.scorer.deadline_s = 0.05
    started = time.monotonic()
    rollout = play.collect(give([echo("fox")]), 1, 1, 0, 0).groups[0].rollouts[0]
    assert isinstance(rollout.outcome, Invalid) and "no verdict from domain echo after" in rollout.outcome.reason
    assert time.monotonic() - started < 15.0  # the thread is left behind
    play.close()


def stuck(at_begin: bool = False, **filters: float) -> tuple[Collector, StuckDomain, Task]:
    """A collector whose environment hangs in the second turn of rollouts with odd seeds there."""
    domain = StuckDomain(at_begin)

    def count(text: str, seed: int) -> str:
        turn = text.count("next") + 1
        return "hang" if turn == 2 and seed % 2 else str(turn)

    play = collector([domain], count, filters)
    play.environment_deadline_s = 1.5  # those that do not hang answer within it on a busy machine, too
    return play, domain, Task("stuck-1", "stuck", (Message("user", "count"),))


def test_an_environment_that_hangs_makes_its_rollout_invalid_and_no_other() -> None:
    play, domain, task = stuck(max_invalid_share=0.9)
    collected = play.collect(give([task]), 1, 12, seed=0, step=0)
    group = collected.groups[0]
    hung = [request_seed(0, 0, "stuck-1", sample, 1) % 2 == 1 for sample in range(12)]
    assert 0 < sum(hung) < 12
    assert [isinstance(rollout.outcome, Invalid) for rollout in group.rollouts] == hung
    assert [not kept for kept in group.in_loss] == hung
    for rollout, lost in zip(group.rollouts, hung, strict=True):
        said = [message.content for message in rollout.transcript.messages]
        if lost:
            assert said == ["1", "next 1", "hang"]
            assert rollout.outcome == Invalid(
                "the environment of domain stuck did not answer turn 2 within 1.5 s (task stuck-1)"
            )
        else:
            assert said == ["1", "next 1", "2", "next 2", "3"]
            assert rollout.outcome == Scored(1.0)
    assert collected.invalid == sum(hung)
    domain.release.set()  # what comes back too late changes nothing, and every environment is closed in the end
    deadline = time.monotonic() + 20
    while len(domain.closed) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert domain.closed == ["stuck-1"] * 12
    assert [message.content for message in group.rollouts[hung.index(True)].transcript.messages][-1] == "hang"
    play.close()


def test_an_environment_that_never_begins_ends_the_step_with_the_reason() -> None:
    play, domain, task = stuck(at_begin=True)
    with pytest.raises(UserError) as caught:
        play.collect(give([task]), 1, 4, seed=0, step=0)
    assert "4 of 4 rollouts are invalid" in str(caught.value)
    assert "the environment of domain stuck did not begin within 1.5 s (task stuck-1)" in str(caught.value)
    domain.release.set()
    play.close()


def test_evaluation_keeps_every_rollout_of_every_task() -> None:
    play = collector([EchoDomain(), RankDomain()], half_right, {"dynamic": True, "overlong": "penalty"})
    rollouts = play.evaluate_tasks([echo("easy1"), echo("fox")], 3, seed=9)
    assert [(rollout.task.id, rollout.sample) for rollout in rollouts] == [
        ("echo-easy1", 0), ("echo-easy1", 1), ("echo-easy1", 2), ("echo-fox", 0), ("echo-fox", 1), ("echo-fox", 2),
    ]  # fmt: skip
    assert [rollout.reward for rollout in rollouts[:3]] == [1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="sampling.max_prompt_tokens: the prompt of task echo-fox"):
        collector([EchoDomain()], half_right, max_prompt_tokens=3).evaluate_tasks([echo("fox")], 1, 0)


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(UserError, match="no domain 'echo' is loaded"):
        collector([RankDomain()], half_right).collect(give([echo("fox")]), 1, 2, 0, 0)


def test_a_step_is_the_same_whatever_the_batch_size_and_the_timing() -> None:
    """With the local sampler and verdicts that come late: the same tokens, log-probabilities and kept groups."""
    config = tiny_config()
    tasks = [echo(word) for word in ("fox", "owl", "elk")]
    found = []
    for max_batch, workers, delay_s in ((32, 1, 0.0), (5, 4, 0.01)):
        sampler = LocalSampler(config, max_batch=max_batch)
        sampler.load_weights(iter(random_weights(config, scale=0.15).items()), 2)
        domains = {"echo": LengthDomain(delay_s)}
        sampling = SamplingConfig(max_new_tokens=9, top_p=0.95, temperature=1.2)
        play = Collector(domains, sampler, CHAT, sampling, FiltersConfig(dynamic=True), workers)
        found.append(play.collect(give(tasks, tasks, tasks), 3, 6, seed=8, step=1))
        play.close()
    for one, other in zip(found[0].groups, found[1].groups, strict=True):
        for mine, theirs in zip(one.rollouts, other.rollouts, strict=True):
            assert (mine.token_ids, mine.logprobs, mine.outcome) == (theirs.token_ids, theirs.logprobs, theirs.outcome)
    assert found[0].dropped == found[1].dropped
