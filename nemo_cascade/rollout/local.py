"""The Sampler in this process: NemotronH in plain PyTorch, batched, on the CPU. It also stands behind the HTTP server.

Rows join and leave the batch as requests start and finish. What a request gets depends on its tokens, its seed, the
sampling parameters and the weights: not on the other requests, their order or the batch size (`models/decode_layers.py`
keeps every row's arithmetic independent of its neighbours, `draw.py` its random numbers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import Cache, DecodeModel, named_from
from nemo_cascade.refit.checksum import checksum_of
from nemo_cascade.rollout.draw import check_params, draw, uniforms
from nemo_cascade.types import Completion, Request, SamplingParams, UserError

REFILL_BELOW = 0.75  # new requests join when the batch has shrunk to this share: reading prompts in clumps is cheaper


@dataclass
class _Row:
    """One request being answered."""

    index: int
    request: Request
    budget: int
    stream: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalSampler:
    """A Sampler over `DecodeModel`. Give it weights with `load_weights` before the first `sample`.

    `max_batch` rows are decoded together; more requests wait for a place. `checksum` is that of the loaded weights.
    """

    def __init__(self, config: NemotronHConfig, version: int = 0, max_batch: int = 128) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch: {max_batch} is below 1")
        self.config = config
        self.version = version
        self.max_batch = max_batch
        self.checksum = ""
        self._model: DecodeModel | None = None

    def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Take Hugging Face named weights: a complete, well-shaped set replaces the old one, anything else changes
        nothing.
        """
        tensors: Mapping[str, torch.Tensor] = named_from(named)
        model = DecodeModel(self.config, tensors)
        self.checksum = checksum_of(tensors.items())
        self._model, self.version = model, version

    def close(self) -> None:
        """Free the weights."""
        self._model = None

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as requests finish; a stop token is part of its completion.

        A request gets the smaller of its own `max_new_tokens` and the parameters'.
        """
        if self._model is None:
            raise UserError("sampler: no weights are loaded; refit it or load a checkpoint before sampling")
        check_params(params)
        for index, request in enumerate(requests):
            self._check(index, request)
        return self._run(self._model, self.version, requests, params)

    def _check(self, index: int, request: Request) -> None:
        if not request.token_ids:
            raise UserError(f"request {index}: the prompt is empty")
        if request.max_new_tokens < 1:
            raise UserError(f"request {index}: max_new_tokens {request.max_new_tokens} is below 1")
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self.config.vocab_size:
            last = self.config.vocab_size - 1
            raise UserError(f"request {index}: token ids must lie in 0..{last}; was it encoded by another tokenizer?")

    def _run(
        self, model: DecodeModel, version: int, requests: Sequence[Request], params: SamplingParams
    ) -> Iterator[tuple[int, Completion]]:
        waiting = deque(_row(index, request, params) for index, request in enumerate(requests))
        rows: list[_Row] = []
        cache: Cache | None = None
        logits_BV = torch.empty(0, model.config.vocab_size)
        while waiting or rows:
            free = self.max_batch - len(rows)
            if waiting and (len(rows) <= REFILL_BELOW * self.max_batch or len(waiting) <= free):
                joining = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                new_logits, new_cache = _read(model, joining)
                cache = new_cache if cache is None else Cache.join([cache, new_cache])
                logits_BV = torch.cat([logits_BV, new_logits])
                rows = rows + joining
            assert cache is not None
            tokens_B = _draw(rows, logits_BV, params)
            finished = [place for place, row in enumerate(rows) if _done(row, params)]
            for place in finished:
                yield rows[place].index, _completion(rows[place], params, version)
            if len(finished) == len(rows):
                rows, cache, logits_BV = [], None, logits_BV[:0]
                continue
            if finished:
                order = cache.drop(finished)
                rows = [rows[place] for place in order]
                tokens_B = tokens_B[order]
            logits_BV = model.step(tokens_B, cache)


def _row(index: int, request: Request, params: SamplingParams) -> _Row:
    budget = min(request.max_new_tokens, params.max_new_tokens)
    return _Row(index, request, budget, uniforms(request.seed, budget))


def _read(model: DecodeModel, rows: Sequence[_Row]) -> tuple[torch.Tensor, Cache]:
    """Prefill; a prompt that several rows share (the rollouts of one group) is read once and its state copied."""
    prompts = list(dict.fromkeys(row.request.token_ids for row in rows))
    room = max(row.budget for row in rows)
    logits_PV, cache = model.prefill(prompts, room)
    if len(prompts) == len(rows):
        return logits_PV, cache
    place = {prompt: index for index, prompt in enumerate(prompts)}
    source = [place[row.request.token_ids] for row in rows]
    cache.keep(source)
    return logits_PV[source], cache


@torch.inference_mode()
def _draw(rows: Sequence[_Row], logits_BV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Draw the next token of every row and note it."""
    uniforms_B = torch.from_numpy(np.array([row.stream[len(row.tokens)] for row in rows], dtype=np.float32))
    tokens_B, logprobs_B = draw(logits_BV, uniforms_B, params)
    for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
    return tokens_B


def _done(row: _Row, params: SamplingParams) -> bool:
    return row.tokens[-1] in params.stop_ids or len(row.tokens) == row.budget


def _completion(row: _Row, params: SamplingParams, version: int) -> Completion:
    finish = "stop" if row.tokens[-1] in params.stop_ids else "length"
    return Completion(tuple(row.tokens), tuple(row.logprobs), finish, version)
