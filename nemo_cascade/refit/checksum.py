"""A checksum of named weights that sender and receiver compute apart, whatever order the tensors travel in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch

from nemo_cascade.protocols import Sampler
from nemo_cascade.types import UserError


class ChecksummedSampler(Sampler, Protocol):
    """A Sampler that says what it holds. `holds` is a column of models/dtypes.py: the dtypes it holds weights in."""

    checksum: str
    holds: str


class Checksum:
    """sha256 over the sorted sha256 of each tensor (name, dtype, shape, bytes): fed one tensor at a time."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count one tensor."""
        flat = tensor.detach().to("cpu").contiguous()
        digest = hashlib.sha256(f"{name}|{flat.dtype}|{tuple(flat.shape)}|".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy())
        self._digests[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        """The checksum of everything added."""
        lines = "\n".join(f"{name} {digest}" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def checksum_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The checksum of a whole set."""
    checksum = Checksum()
    for name, tensor in named:
        checksum.add(name, tensor)
    return checksum.hexdigest()


def expect_equal(sent: str, held: str, version: int) -> None:
    """Stop when the Sampler holds other weights than the Learner sent: every later log-probability would be wrong."""
    if sent != held:
        raise UserError(
            f"refit of version {version}: the sampler holds {held[:12] or 'nothing'}, the learner sent {sent[:12]}; "
            "check that no other run writes to this sampler or folder"
        )
