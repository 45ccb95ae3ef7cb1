"""What a judge has decided: an equal question is asked once, whatever the endpoint.

A judge call is the most expensive reward of the cascade, and the answers of a group repeat each other more the better
the policy is. The key is everything that a verdict depends on: the endpoint's model, every message word by word, and
the sampling parameters. With temperature above 0 the first verdict is kept, so equal answers get equal rewards and the
judge's dice are thrown once for each question. What is no verdict (an Invalid) is asked again.

In memory, for one judge of one stage, the newest `most` verdicts; a stage that is resumed asks again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar, cast

from nemo_cascade.types import Invalid, Json

Verdict = TypeVar("Verdict", bound=Hashable)
MOST_VERDICTS = 1 << 16  # four steps of 128 prompts with 120 pairs each, some 20 MB
GRACE_S = 10.0  # over the judge's own deadline, for a busy machine


def question_key(*question: Json) -> str:
    """sha256 of a question and all that decides its answer."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Verdicts:
    """Key -> verdict. Safe to share between threads: who asks a question that is being asked waits for its answer."""

    def __init__(self, most: int = MOST_VERDICTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def once(self, key: str, ask: Callable[[], Verdict | Invalid], patience_s: float) -> Verdict | Invalid:
        """The verdict kept under `key`, else what `ask` says. Invalid when another thread's answer takes longer than
        `patience_s` and a grace.
        """
        with self._lock:
            first = key not in self._kept
            future = self._kept.setdefault(key, Future())
        if first:
            verdict: Verdict | Invalid = Invalid("the judge was asked by another thread, which failed")
            try:
                verdict = ask()
            finally:
                future.set_result(verdict)
                self._settle(key, future, isinstance(verdict, Invalid))
        try:
            return cast("Verdict | Invalid", future.result(timeout=patience_s + GRACE_S))
        except FutureTimeoutError:
            return Invalid(f"waited {patience_s + GRACE_S:g} s for the judge's answer to an equal question")

    def _settle(self, key: str, future: Future[Any], forget: bool) -> None:
        """Forget what is no verdict, and the oldest beyond the bound."""
        with self._lock:
            if forget and self._kept.get(key) is future:
                del self._kept[key]
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
