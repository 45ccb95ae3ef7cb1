"""Is the final answer mathematically equal to the expected one? Exact strings first, math-verify in killable
processes after.

The verdict depends on CPU time, never on the wall clock: an answer too expensive to compare is wrong, a machine too
busy to answer is Invalid.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time

from nemo_cascade.reward import math_worker
from nemo_cascade.reward.math_reader import Reader
from nemo_cascade.types import Invalid, Scored, UserError

MAX_ANSWER_CHARS = 200
FAR_TOO_LONG = 8  # times what is allowed: not even spaces and delimiters are taken off
START_SECONDS = 60.0
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")  # not \d: other scripts have digits too
_SAME_SIGN = (("**", "^"), (r"\cdot", "*"), (r"\times", "*"), ("\u00d7", "*"), ("\u00b7", "*"), ("\u2212", "-"))
_BOXED = re.compile(r"\\boxed\s{0,100}\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"))


def extract_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}` with balanced braces, or None. Linear in its length."""
    closes = _closes(text) if _BOXED.search(text) else {}
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        match = _BOXED.match(text, start)
        if match is not None and match.end() - 1 in closes:
            return text[match.end() : closes[match.end() - 1]].strip()
        end = start
    return None


def _closes(text: str) -> dict[int, int]:
    """Place of each opening brace that has a partner -> the partner's place; escaped braces are letters."""
    closes: dict[int, int] = {}
    opened: list[int] = []
    for token in _BRACES.finditer(text):
        if token.group() == "{":
            opened.append(token.start())
        elif token.group() == "}" and opened:
            closes[opened.pop()] = token.start()
    return closes


def normalized(answer: str) -> str:
    """An answer without the decoration that never changes its meaning: math delimiters, a final full stop, spaces,
    thousands commas.
    """
    answer = answer.strip()
    for left, right in _DELIMITERS:
        if answer.startswith(left) and answer.endswith(right) and len(answer) >= len(left) + len(right):
            answer = answer[len(left) : -len(right)].strip()
    answer = (
        answer.rstrip(".")
        .replace("{,}", ",")
        .replace(r"\!", "")
        .replace(r"\,", "")
        .replace(r"\left", "")
        .replace(r"\right", "")
    )
    answer = (
        re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", answer)
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac")
    )
    return re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", "".join(answer.split()))


def is_runaway(answer: str) -> bool:
    """True for answers that no comparison should touch: overlong, too large to be worked out or too dear to be
    simplified (`math_reader`), or not worked out: limits, integrals, sums, products, for the grader to do.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return True
    reader = Reader(answer)
    return bool(reader.too_large or reader.dear) or reader.unworked


def spelled(answer: str) -> str:
    """A normalized answer with one spelling of products and of powers: all that two towers are compared by."""
    for written, sign in _SAME_SIGN:
        answer = answer.replace(written, sign)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", answer)


class _Worker:
    """A running `math_worker` and its pipe; one question at a time."""

    def __init__(self, cpu_seconds: float) -> None:
        argv = [sys.executable, "-P", math_worker.__file__, repr(cpu_seconds)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=nothing, bufsize=0)
        self._buffer = b""
        try:
            self._line(START_SECONDS)  # says ready
        except (TimeoutError, EOFError):
            self.kill()
            raise

    def ask(self, gold: str, prediction: str, seconds: float) -> bool:
        """TimeoutError after `seconds` of wall time, EOFError when the worker has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([gold, prediction]).encode() + b"\n")
        except BrokenPipeError as error:
            raise EOFError from error
        return bool(json.loads(self._line(seconds)))

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(descriptor, 4096)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def ended_by_cpu(self) -> bool:
        """Whether the kernel ended the worker for its CPU time (after end of file)."""
        return self._process.wait(START_SECONDS) in (-signal.SIGXCPU, -signal.SIGKILL)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


class MathGrader:
    """Grades boxed answers. Workers start with the first answer that needs algebra; safe to share between threads."""

    def __init__(self, workers: int = 2, cpu_seconds: float = 5.0, wall_seconds: float = 60.0) -> None:
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._lock = threading.Lock()
        self._slots: queue.Queue[_Worker | None] = queue.Queue()
        for _ in range(workers):
            self._slots.put(None)
        self._count = workers

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade(self, expected: str, text: str) -> Scored | Invalid:
        """Reward 1 when the last `\\boxed{}` of `text` equals `expected`, else 0. `text` is the answer without its
        reasoning.
        """
        answer = extract_boxed(text)
        if answer is None:
            return Scored(0.0, reason="no boxed answer")
        return self.equal(expected, answer)

    def equal(self, expected: str, answer: str) -> Scored | Invalid:
        """Compare two answers that are already extracted."""
        if len(answer) > FAR_TOO_LONG * max(MAX_ANSWER_CHARS, len(expected)):
            return Scored(0.0, reason="answer too long to compare")
        gold, prediction = normalized(expected), normalized(answer)
        if gold == prediction:
            return Scored(1.0, reason="same text")
        if not prediction:
            return Scored(0.0, reason="empty answer")
        if len(prediction) > max(MAX_ANSWER_CHARS, 2 * len(gold)):
            return Scored(0.0, reason="answer too long to compare")
        integers = _integer(gold), _integer(prediction)
        if None not in integers:
            return Scored(float(integers[0] == integers[1]), reason="integers compared")
        wanted = Reader(expected)
        if wanted.too_large:
            same = spelled(gold) == spelled(prediction)
            return Scored(float(same), reason=f"compared as texts: what is expected is {wanted.too_large}")
        given = Reader(answer)
        beyond = given.too_large or (given.dear if not wanted.dear else "")
        if beyond:
            return Scored(0.0, reason=f"answer too large to compare: {beyond}")
        if given.unworked and not wanted.unworked:
            return Scored(0.0, reason="a limit, integral, sum or product that is not worked out")
        return self._ask(expected.strip(), answer.strip())

    def _ask(self, gold: str, prediction: str) -> Scored | Invalid:
        try:
            worker = self._slots.get(timeout=self._wall_seconds + START_SECONDS)
        except queue.Empty:
            return Invalid(f"math: no comparison worker became free within {self._wall_seconds + START_SECONDS:.0f} s")
        usable: _Worker | None = None
        try:
            usable = worker or self._start()
            verdict = usable.ask(_bare(gold), _bare(prediction), self._wall_seconds)
            return Scored(float(verdict), reason="equal by algebra" if verdict else "not equal")
        except TimeoutError:
            usable = _end(usable)
            return Invalid(f"math: comparison got no answer within {self._wall_seconds:.0f} s of wall time")
        except EOFError:
            if usable is None:
                return Invalid(
                    "math: the comparison worker did not start; `python -m nemo_cascade.reward.math_worker 1` says why"
                )
            by_cpu = usable.ended_by_cpu()
            usable = _end(usable)
            if by_cpu:
                return Scored(0.0, reason=f"comparison needs more than {self._cpu_seconds:g} s of CPU")
            return Invalid("math: the comparison worker died")
        finally:
            self._slots.put(usable)

    def _start(self) -> _Worker:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "math answers need math-verify, which is not installed; run `pip install math-verify==0.9.0`"
            )
        with self._lock:  # one at a time: each start costs a second of CPU
            return _Worker(self._cpu_seconds)

    def close(self) -> None:
        """End the workers; the next answer starts new ones."""
        for _ in range(self._count):
            worker = self._slots.get()
            self._slots.put(_end(worker))


def _end(worker: _Worker | None) -> None:
    if worker is not None:
        worker.kill()


def _integer(answer: str) -> tuple[bool, str] | None:
    """Sign and digits of an integer of any length, which Python would convert in quadratic time; None for others."""
    found = _INTEGER.fullmatch(answer)
    return (found[1] == "-" and found[2] != "0", found[2]) if found else None


def _bare(answer: str) -> str:
    for left, right in _DELIMITERS:
        if answer.startswith(left) and answer.endswith(right) and len(answer) >= len(left) + len(right):
            return answer[len(left) : -len(right)].strip()
    return answer
