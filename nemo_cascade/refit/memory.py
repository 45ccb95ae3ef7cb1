"""Refit inside one process: the Learner's tensors go to the Sampler one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nemo_cascade.protocols import Learner, Sampler
from nemo_cascade.refit.checksum import Checksum, ChecksummedSampler, expect_equal
from nemo_cascade.refit.rounding import Rounding


class MemoryRefit:
    """Streams `learner.weights()` into `sampler.load_weights`; each side hashes what it saw.

    Every rank calls it, because a Learner gathers its shards; each rank refits its own sampler.
    """

    def refit(self, learner: Learner, sampler: Sampler, version: int) -> str:
        """Copy, compare; returns the checksum of the weights that both sides hold."""
        # our samplers all say what they hold
        receiver: ChecksummedSampler = sampler  # type: ignore[assignment]
        sent, rounding = Checksum(), Rounding(receiver.holds)

        def hashed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in learner.weights():
                sent.add(name, tensor)
                rounding.add(name, tensor)
                yield name, tensor

        sampler.load_weights(hashed(), version)
        rounding.report(version)
        checksum = sent.hexdigest()
        expect_equal(checksum, receiver.checksum, version)
        return checksum
