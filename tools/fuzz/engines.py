"""Runs a parser on many inputs and tallies what escaped and what took too long."""

from __future__ import annotations

import gc
import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType

from nemo_cascade.types import Json
from tools.fuzz.parsers import Parser

KEPT = 5  # inputs of each kind that a tally keeps to show
PATIENCE = 3.0
"""A call is broken off after this many times its limit, if Python code or a regular expression runs in it."""


class Late(BaseException):
    """Raised by the timer inside a call that goes on and on; no parser's `except` catches it."""


def _late(number: int, frame: FrameType | None) -> None:
    raise Late


@dataclass
class Tally:
    """What became of a parser's inputs. `escaped` and `late` hold the first few inputs, with what happened."""

    parser: str
    engine: str
    seed: int
    limit_s: float
    inputs: int = 0
    refused: int = 0
    longest: int = 0  # characters
    num_escaped: int = 0
    num_late: int = 0
    slowest_s: float = 0.0
    slowest_chars: int = 0
    cpu_s: float = 0.0
    escaped: list[tuple[str, str]] = field(default_factory=list)
    late: list[tuple[float, str]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Nothing escaped and nothing was late."""
        return not (self.num_escaped or self.num_late)

    def as_json(self) -> dict[str, Json]:
        """All fields."""
        return asdict(self)


class Trial:
    """One input given to one parser, timed. A context manager: what is raised inside is noted and stays there."""

    def __init__(self, parser: Parser, tally: Tally) -> None:
        self.parser, self.tally = parser, tally

    def __call__(self, text: str) -> None:
        """Try one text."""
        self.text = text
        tally = self.tally
        tally.inputs += 1
        tally.longest = max(tally.longest, len(text))
        started = time.thread_time()
        with self:
            self.parser.read(text)
        spent = time.thread_time() - started
        if spent > tally.slowest_s:
            tally.slowest_s, tally.slowest_chars = spent, len(text)
        if spent > self.parser.seconds:
            tally.num_late += 1
            if len(tally.late) < KEPT:
                tally.late.append((round(spent, 3), text))

    def __enter__(self) -> Trial:
        signal.setitimer(signal.ITIMER_PROF, self.parser.seconds * PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> bool:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if kind is None or kind is Late:
            return True
        if issubclass(kind, KeyboardInterrupt):
            return False
        if issubclass(kind, self.parser.refuses):
            self.tally.refused += 1
            return True
        self.tally.num_escaped += 1
        seen = {words.partition(":")[0] for words, _ in self.tally.escaped}
        if len(seen) < KEPT and kind.__name__ not in seen:
            self.tally.escaped.append((f"{kind.__name__}: {problem}"[:200], self.text))
        return True


def keep_time() -> None:
    """Let the timer break off calls, from now on in this process. In its main thread: the timer is a signal."""
    signal.signal(signal.SIGPROF, _late)


@contextmanager
def timed(tally: Tally) -> Iterator[None]:
    """`keep_time` for a while, whose CPU time the tally gets."""
    before, started = signal.signal(signal.SIGPROF, _late), time.process_time()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        signal.signal(signal.SIGPROF, before)
        tally.cpu_s = time.process_time() - started


def run(parser: Parser, texts: Iterable[str], count: int, seed: int, engine: str) -> Tally:
    """The first `count` of the texts."""
    tally = Tally(parser.name, engine, seed, parser.seconds)
    trial = Trial(parser, tally)
    with timed(tally):
        for text in itertools.islice(texts, count):
            trial(text)
    return tally
