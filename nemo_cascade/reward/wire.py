"""What crosses the sandbox's border: frames of byte fields, and values as JSON.

Bound into the sandbox beside the fork server, so it imports only what starts in a millisecond (no json).
"""

from __future__ import annotations

import os
import struct


def read_exact(fd: int, size: int) -> bytes:
    """So many bytes of a descriptor; EOFError when it ends before."""
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def write_all(fd: int, data: bytes) -> None:
    """All bytes to a descriptor, in as many writes as it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def encode(fields: list[bytes]) -> bytes:
    """A frame: total length, then each field with its own length, all big-endian 32-bit."""
    body = b"".join(struct.pack("!I", len(field)) + field for field in fields)
    return struct.pack("!I", len(body)) + body


def decode(body: bytes) -> list[bytes]:
    """The fields of a frame without its total length; ValueError when the lengths do not add up."""
    fields, at = [], 0
    while at < len(body):
        if at + 4 > len(body):
            raise ValueError("frame ends inside a length")
        (size,) = struct.unpack_from("!I", body, at)
        if at + 4 + size > len(body):
            raise ValueError("frame ends inside a field")
        fields.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return fields


def to_json(value: object) -> str:
    """JSON without the json module, whose import would cost more than most calls.

    Sets come sorted, other iterables as lists, subclasses as what they derive from; TypeError for anything else.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, str.__str__(value))) + '"'
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, dict):
        pairs = [f"{_key(key)}: {to_json(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(pairs) + "}"
    items = sorted(value) if isinstance(value, (set, frozenset)) else list(value)  # type: ignore[call-overload]
    return "[" + ", ".join(map(to_json, items)) + "]"


def _key(key: object) -> str:
    if isinstance(key, str):
        return to_json(key)
    if key is None or isinstance(key, (bool, int, float)):
        return f'"{to_json(key)}"'
    raise TypeError(f"a dictionary key of type {type(key).__name__} cannot be returned as JSON")


def _escaped(char: str) -> str:
    if " " <= char <= "~" and char not in '"\\':
        return char
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
