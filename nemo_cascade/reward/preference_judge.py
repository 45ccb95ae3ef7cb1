"""The preference judge as a stage configures it: a generative reward model that compares a group's answers in pairs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

from nemo_cascade.config.schema import JudgeConfig
from nemo_cascade.reward.genrm import Answer, GenRMOptions, Matches, play, rewards_of
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.verdicts import question_key
from nemo_cascade.types import Message, Outcome

PUBLISHED = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16384}
SHORT = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 32}


class PreferenceJudge:
    """Section 5.4 with the strategy, the length terms and the bonus of a stage's `judge` block."""

    def __init__(self, judge: Judge, config: JudgeConfig) -> None:
        self._judge, self._config = judge, config
        self._lock = threading.Lock()
        self._graded: dict[str, Matches] = {}

    def grade(
        self,
        conversation: Sequence[Message],
        finals_G: Sequence[Message],
        principle: str = "",
        short: bool = False,
    ) -> list[Outcome]:
        """The reward of each final answer to one conversation.

        `short`: the judge answers with the bare JSON, greedily (a nano judge); otherwise it may think, and samples at
        temperature 0.6 and top-p 0.95 as published. `judge.temperature` and `judge.max_tokens` say otherwise.
        """
        options = self._options(short)
        turns = [{"role": message.role, "content": message.content} for message in conversation]
        answers = [Answer(final.content, final.reasoning) for final in finals_G]
        matches = play(self._judge, turns, answers, options, principle)
        with self._lock:  # a group that is graded again, because something was Invalid, counts once
            self._graded[question_key(turns, [answer.content for answer in answers])] = matches
        return rewards_of(matches, answers, options)

    def _options(self, short: bool) -> GenRMOptions:
        config = self._config
        sampling: dict[str, Any] = dict(SHORT if short else PUBLISHED)
        given = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        sampling.update({name: value for name, value in given.items() if value is not None})
        return GenRMOptions(
            strategy=cast(Any, config.strategy),
            swap=config.swap,
            native_roles=config.native_roles,
            attempts=1 + (config.parse_retries if sampling["temperature"] > 0.0 else 0),
            on_unreadable=cast(Any, config.on_unreadable),
            min_match_share=config.min_match_share,
            reasoning_bonus=config.conciseness_bonus,
            answer_bonus=config.conciseness_bonus,
            reasoning_length_coefficient=config.length_weight,
            answer_length_coefficient=config.length_weight,
            **sampling,
        )

    def take_counts(self) -> dict[str, float]:
        """Metrics of the groups graded since the last call: all their matches, the dropped and the unreadable ones."""
        with self._lock:
            graded, self._graded = list(self._graded.values()), {}
        if not graded:
            return {}
        return {
            "judge_matches": float(sum(len(matches.verdicts) for matches in graded)),
            "judge_matches_dropped": float(sum(matches.dropped for matches in graded)),
            "judge_matches_unreadable": float(sum(matches.unreadable for matches in graded)),
        }
