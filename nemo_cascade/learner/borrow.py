"""Other weights in the policy's parameters for a while: teachers and references need no second model on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_cascade.learner.optimizer import copy_into, tensors


class HostCache:
    """Weights of Hugging Face folders in host memory, one copy per folder, in the layout of this rank's parameters.

    Costs the size of the policy per folder, plus one more while one is borrowed. A folder is read once: it must not
    change during the run.
    """

    def __init__(self, model: torch.nn.Module, read: Callable[[str], None]) -> None:
        self.model = model
        self.read = read  # puts a folder's weights into the model's parameters
        self.folders: dict[str, dict[str, torch.Tensor]] = {}
        self.borrowed = ""  # the folder whose weights are in the parameters, empty for the policy's own

    @contextmanager
    def using(self, folder: str) -> Iterator[None]:
        """Inside the context parameters and expert biases are the folder's; after it they are the policy's, bit-exact.

        Also after an error inside, or in reading the folder.
        """
        if self.borrowed:
            raise ValueError(f"the parameters are already those of {self.borrowed}; leave that context first")
        own = to_host(self.model)
        self.borrowed = folder
        try:
            self.load(str(Path(folder).resolve()))
            yield
        finally:
            copy_into(tensors(self.model), own)
            self.borrowed = ""

    def load(self, folder: str) -> None:
        """Fill the parameters from the cache, or from the folder at the first visit."""
        if folder in self.folders:
            copy_into(tensors(self.model), self.folders[folder])
            return
        self.read(folder)
        self.folders[folder] = to_host(self.model)


def to_host(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model in host memory."""
    return {name: value.to("cpu", copy=True) for name, value in tensors(model).items()}
