"""How a client waits for a model or an environment in another process: the pauses between tries, what `Retry-After`
asks for, and when a server counts as gone.
"""

from __future__ import annotations

import re
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 5.0
MOST_ASKED_SECONDS = 60.0
GONE_AFTER = 8
"""A server that left this many questions in a row without an answer, and answered none for its patience, is gone."""
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def pause_after(failures: int, asked_s: float = 0.0) -> float:
    """Seconds before the next try when `failures` came before this one: doubled each time up to 5, and never less than
    the server asks for.
    """
    return max(asked_s, min(FIRST_PAUSE_SECONDS * 2 ** min(failures, 16), MAX_PAUSE_SECONDS))


def retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` header asks to wait, a number or a date, at most 60; 0 for none and for nonsense."""
    text = (header or "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), MOST_ASKED_SECONDS)
    try:
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:  # RFC 5322's -0000: the date is UTC and says nothing of where it was written
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MOST_ASKED_SECONDS)


def given_up(tries: int, spent_s: float, patience_s: float, asked_s: float = 0.0) -> str:
    """Why a question stays without an answer after some tries: there was no time for the pause of `asked_s` that the
    server wanted, none at all, or (with time left) no further try was allowed.
    """
    many = f"{tries} {'try' if tries == 1 else 'tries'}"
    if asked_s:
        return f"asks for a pause of {asked_s:.3g} s, {spent_s:.2g} s into the {patience_s:g} s of its question"
    if spent_s >= patience_s:
        return f"gave no answer within {patience_s:g} s, in {many}"
    return f"gave no answer in {many} and {spent_s:.2g} s"


class Health:
    """Whether a server still answers, from what all threads saw of it."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.failed = 0
        self._lock = threading.Lock()
        self._silent_since: float | None = None  # when the first question after the last answer was asked
        self._asked_again_at = 0.0

    def gone(self) -> float:
        """For how many seconds a server that is gone has been silent; 0 when it may be asked. Called at every
        question.
        """
        now = time.monotonic()
        with self._lock:
            if self._silent_since is None:
                self._silent_since = now
            return now - self._silent_since if now < self._asked_again_at else 0.0

    def answered(self) -> None:
        """It said something, be it a refusal or for how long to leave it alone."""
        with self._lock:
            self.failed, self._silent_since, self._asked_again_at = 0, None, 0.0

    def left_unanswered(self) -> None:
        """A question with all its retries got no answer."""
        now = time.monotonic()
        with self._lock:
            self.failed += 1
            silent = self._silent_since is not None and now - self._silent_since >= self.patience_s
            if self.failed >= GONE_AFTER and silent and now >= self._asked_again_at:
                self._asked_again_at = now + self.patience_s
