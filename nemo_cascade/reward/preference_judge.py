"""The preference judge as a stage configures it: a generative reward model that compares a group's answers in pairs.

With temperature 0 equal questions are asked once: the answers of a group repeat each other more the better the policy
is, and a judge call is the most expensive reward of the cascade.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from nemo_cascade.config.schema import JudgeConfig
from nemo_cascade.reward.genrm import Answer, GenRMOptions, grade_group
from nemo_cascade.reward.judge import ChatMessage, Judge
from nemo_cascade.types import Invalid, Message, Outcome


class PreferenceJudge:
    """Section 5.4 with the strategy, the length terms and the bonus of a stage's `judge` block."""

    def __init__(self, judge: Judge, config: JudgeConfig) -> None:
        self._judge, self._config = judge, config

    def grade(
        self,
        conversation: Sequence[Message],
        finals_G: Sequence[Message],
        principle: str = "",
        short: bool = False,
    ) -> list[Outcome]:
        """The reward of each final answer to one conversation.

        `short`: the judge answers with the bare JSON, greedily (a nano judge); otherwise it may think, and samples at
        temperature 0.6 and top-p 0.95 as published.
        """
        config = self._config
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 32, "attempts": 1} if short else {}
        options = GenRMOptions(
            strategy=config.strategy,
            swap=config.swap,
            reasoning_bonus=config.conciseness_bonus,
            answer_bonus=config.conciseness_bonus,
            reasoning_length_coefficient=config.length_weight,
            answer_length_coefficient=config.length_weight,
            **sampling,
        )
        turns = [{"role": message.role, "content": message.content} for message in conversation]
        answers = [Answer(final.content, final.reasoning) for final in finals_G]
        judge = _Remembering(self._judge) if short else self._judge
        return grade_group(judge, turns, answers, options, principle)


GRACE_S = 10.0  # over the judge's own deadline, for a busy machine


class _Remembering(Judge):
    """A judge that asks an equal greedy question once. Lives as long as one group."""

    def __init__(self, judge: Judge) -> None:
        self._asked = judge
        self._lock = threading.Lock()
        self._answers: dict[str, Future[str | Invalid]] = {}

    def ask(
        self, messages: Sequence[ChatMessage], max_tokens: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> str | Invalid:
        """The first caller asks; the others wait for its answer."""
        key = repr([sorted(message.items()) for message in messages])
        with self._lock:
            first = key not in self._answers
            future = self._answers.setdefault(key, Future())
        if first:
            answer: str | Invalid = Invalid("the judge was asked by another thread, which failed")
            try:
                answer = self._asked.ask(messages, max_tokens, temperature, top_p)
            finally:
                future.set_result(answer)
        patience_s = self._asked.timeout_s + GRACE_S
        try:
            return future.result(timeout=patience_s)
        except FutureTimeoutError:
            return Invalid(f"waited {patience_s:g} s for the judge's answer to an equal question of the group")
