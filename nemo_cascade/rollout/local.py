"""The Sampler in this process: NemotronH on the CPU, batched. It also stands behind the HTTP server.

What a request gets depends on its tokens, its seed, the sampling parameters and the weights: not on the other requests,
their order or the batch size (`models/decode*` keep every row's arithmetic independent of its neighbours, `draw.py` its
random numbers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import named_from
from nemo_cascade.models.decode_native import AnyModel, decode_model
from nemo_cascade.models.hf_copy import stored
from nemo_cascade.models.hf_folder import content_sha256, read_checked_header, read_config
from nemo_cascade.refit.checksum import checksum_of
from nemo_cascade.rollout.draw import check_params
from nemo_cascade.rollout.engine import Engine
from nemo_cascade.types import NO_CHOICE, Completion, Request, SamplingParams, UserError


class LocalSampler:
    """A Sampler over `decode_model`. Give it weights with `load_weights` or `load_folder` before the first `sample`.

    `max_batch` rows are decoded together; more requests wait for a place. `checksum` is that of the loaded weights.
    """

    holds = "local"  # column of models/dtypes.py

    def __init__(self, config: NemotronHConfig, version: int = 0, max_batch: int = 128) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch: {max_batch} is below 1")
        self.config = config
        self.version = version
        self.max_batch = max_batch
        self.checksum = ""
        self._model: AnyModel | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, max_batch: int = 128) -> LocalSampler:
        """A sampler of the checkpoint in a Hugging Face folder, version 0."""
        sampler = cls(read_config(folder), max_batch=max_batch)
        sampler.load_folder(folder, 0)
        return sampler

    def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Take Hugging Face named weights: a complete, well-shaped set replaces the old one, anything else changes
        nothing."""
        tensors = named_from((name, tensor.detach().to("cpu")) for name, tensor in named)
        model = decode_model(self.config, tensors)
        checksum = checksum_of(tensors.items())
        self._model, self.version, self.checksum = model, version, checksum

    def load_folder(self, folder: str | Path, version: int) -> None:
        """Take the weights of a Hugging Face folder; the checksum is then the folder's content sha256.

        UserError names the first tensor that is missing, misshapen or not what the folder's checksums.json records;
        nothing is taken then.
        """
        read_checked_header(folder, self.config)
        checksum = content_sha256(folder, check=True)
        self.load_weights(stored(folder), version)
        self.checksum = checksum

    def close(self) -> None:
        """Free the weights."""
        self._model = None

    def engine(self) -> Engine:
        """A fresh engine on the weights of this moment; it keeps them while the sampler is refitted."""
        if self._model is None:
            raise UserError("sampler: no weights are loaded; refit it or load a checkpoint before sampling")
        return Engine(self._model, self.version, self.max_batch)

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as requests finish; a stop token is part of its completion.

        A request gets the smaller of its own `max_new_tokens` and the parameters'.
        """
        engine = self.engine()
        check_params(params)
        if params.routed_experts:
            check_experts(self.config)
        for index, request in enumerate(requests):
            check_request(request, self.config.vocab_size, f"request {index}")
            engine.add(index, request, params)
        return _drain(engine)


def _drain(engine: Engine) -> Iterator[tuple[int, Completion]]:
    while engine.busy:
        yield from engine.step()


def check_experts(config: NemotronHConfig) -> None:
    """Refuse to record experts where there are none, or more than a byte can name."""
    if not config.layers("E"):
        raise UserError("routing_replay: sampler: the model has no layer of experts; set it to none")
    if config.n_routed_experts > NO_CHOICE:
        raise UserError(f"routing_replay: expert numbers are bytes, the model has {config.n_routed_experts}")


def check_request(request: Request, vocab_size: int, where: str) -> None:
    """Refuse what cannot be sampled from; `where` names the request in the message."""
    if not request.token_ids:
        raise UserError(f"{where}: the prompt is empty")
    if request.max_new_tokens < 1:
        raise UserError(f"{where}: max_new_tokens {request.max_new_tokens} is below 1")
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocab_size:
        raise UserError(f"{where}: token ids must lie in 0..{vocab_size - 1}; was it encoded by another tokenizer?")
