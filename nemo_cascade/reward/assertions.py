"""The two ends of a test program whose candidate runs in another process. Sent into the sandbox as text.

The test's `check` gets a function that sends its arguments to the candidate and returns the answer as plain values
(numbers, texts, lists, tuples, sets, dictionaries), whatever class the candidate gave them: nothing of it is in the
test's process, and nothing of the test in its own. An exception of the candidate comes back as the built-in one of its
name. Arguments must be plain, too, and a change the candidate makes to them stays on its side.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
from collections.abc import Callable

MAX_BYTES = 64 << 20


def tagged(value: object) -> object:
    """A value as JSON, containers other than lists under their kind; TypeError for what is not plain."""
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, int):
        return {"int": int.__format__(value, "x")}
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[tagged(key), tagged(inner)] for key, inner in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [tagged(inner) for inner in value]}
    raise TypeError("the function returned a " + type(value).__name__)


def plain(given: object) -> object:
    """The value that `tagged` wrote; ValueError, TypeError or KeyError for anything else."""
    if not isinstance(given, dict):
        return given
    ((kind, inner),) = given.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "complex":
        return complex(*inner)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {plain(key): plain(value) for key, value in inner}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](plain(value) for value in inner)


def send(fd: int, value: object) -> None:
    """One JSON value with its length before it."""
    body = json.dumps(value).encode()
    view = memoryview(struct.pack("!I", len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def exactly(fd: int, size: int) -> bytes:
    """So many bytes; EOFError when the other side has ended."""
    data = b""
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the candidate ended")
        data += chunk
    return data


def receive(fd: int) -> object:
    """The other side's next value."""
    (size,) = struct.unpack("!I", exactly(fd, 4))
    if size > MAX_BYTES:
        raise ValueError("an answer of " + str(size) + " bytes")
    return json.loads(exactly(fd, size))


class Raised:
    """Sends the exception that a call raised in the place of its value."""

    def __enter__(self) -> Raised:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        name = next((base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base), "")
        send(3, {"raised": [name, str(problem)[:300]]})
        return True


def serve(function: Callable[..., object]) -> None:
    """The candidate's end: answer calls until the tests are over."""
    while True:
        given, named = (plain(part) for part in receive(0))
        with Raised():
            send(3, {"value": tagged(function(*given, **named))})


def ask(*given: object, **named: object) -> object:
    """The test's end: one call of the candidate."""
    send(4, [tagged(list(given)), tagged(named)])
    answer = receive(0)
    if "raised" in answer:
        name, message = answer["raised"]
        kind = getattr(builtins, str(name), None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        raise kind(str(message)) if known else RuntimeError(str(message))
    return plain(answer["value"])

