"""Continuous batching on one model: requests join and leave between steps, each with its own sampling parameters.

`LocalSampler` drives it to the end for one call; the HTTP server keeps adding requests while it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nemo_cascade.models.decode_native import AnyCache, AnyModel
from nemo_cascade.rollout.draw import draw, uniforms
from nemo_cascade.types import NO_CHOICE, Completion, Finish, Request, SamplingParams

REFILL_BELOW = 0.75  # new requests join when the batch has shrunk to this share: reading prompts in clumps is cheaper


@dataclass
class _Row:
    """One request being answered. `budget` is the smaller of its own token limit and the parameters'."""

    key: int
    request: Request
    params: SamplingParams
    budget: int
    stream: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    experts: bytearray = field(default_factory=bytearray)  # of the tokens read so far, when the parameters ask

    @property
    def stopped(self) -> bool:
        return self.tokens[-1] in self.params.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) == self.budget


class Engine:
    """Decodes at most `max_batch` requests at a time with fixed weights; the others wait their turn."""

    def __init__(self, model: AnyModel, version: int, max_batch: int) -> None:
        self.model, self.version, self.max_batch = model, version, max_batch
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._cache: AnyCache | None = None
        self._logits_BV = torch.empty(0, model.config.vocab_size)

    def add(self, key: int, request: Request, params: SamplingParams) -> None:
        """Queue a request; its completion comes back under `key`."""
        budget = min(request.max_new_tokens, params.max_new_tokens)
        self._waiting.append(_Row(key, request, params, budget, uniforms(request.seed, budget)))

    @property
    def busy(self) -> bool:
        """Whether anything is being decoded or waits."""
        return bool(self._rows or self._waiting)

    def step(self) -> list[tuple[int, Completion]]:
        """Draw one token for every row; returns the requests that this token finished."""
        self._admit()
        assert self._cache is not None, "step without a request"
        tokens_B = _draw(self._rows, self._logits_BV)
        finished = [place for place, row in enumerate(self._rows) if row.done]
        completions = [(self._rows[place].key, self._completion(self._rows[place])) for place in finished]
        if len(finished) == len(self._rows):
            self._rows, self._cache, self._logits_BV = [], None, self._logits_BV[:0]
            return completions
        if finished:
            order = self._cache.drop(finished)
            self._rows = [self._rows[place] for place in order]
            tokens_B = tokens_B[order]
        experts = _asked(self._rows)
        self._logits_BV = self.model.step(tokens_B, self._cache, experts)  # type: ignore[arg-type]
        _note(self._rows, experts)
        return completions

    def _admit(self) -> None:
        free = self.max_batch - len(self._rows)
        if not self._waiting or (len(self._rows) > REFILL_BELOW * self.max_batch and len(self._waiting) > free):
            return
        joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        logits_BV, cache = _read(self.model, joining)
        self._cache = cache if self._cache is None else self._cache.join([self._cache, cache])  # type: ignore[list-item]
        self._logits_BV = torch.cat([self._logits_BV, logits_BV])
        self._rows = self._rows + joining

    def _completion(self, row: _Row) -> Completion:
        finish: Finish = "stop" if row.stopped else "length"
        experts = bytes(row.experts)
        if row.params.routed_experts:  # the last token was drawn, nobody has read it
            config = self.model.config
            experts += bytes([NO_CHOICE]) * (len(config.layers("E")) * config.num_experts_per_tok)
        return Completion(tuple(row.tokens), tuple(row.logprobs), finish, self.version, experts)


def _asked(rows: Sequence[_Row]) -> list[bytes] | None:
    """Where the model writes the experts of these rows; None when no row wants them."""
    return [] if any(row.params.routed_experts for row in rows) else None


def _note(rows: Sequence[_Row], experts: list[bytes] | None) -> None:
    """Add what the model wrote to the rows that asked."""
    if experts is not None:
        for row, own in zip(rows, experts, strict=True):
            if row.params.routed_experts:
                row.experts += own


def _read(model: AnyModel, rows: Sequence[_Row]) -> tuple[torch.Tensor, AnyCache]:
    """Prefill; a prompt that several rows share (the rollouts of one group) is read once and its state copied."""
    prompts = list(dict.fromkeys(row.request.token_ids for row in rows))
    experts = _asked(rows)
    logits_PV, cache = model.prefill(prompts, max(row.budget for row in rows), experts)
    if len(prompts) == len(rows):
        _note(rows, experts)
        return logits_PV, cache
    place = {prompt: index for index, prompt in enumerate(prompts)}
    source = [place[row.request.token_ids] for row in rows]
    _note(rows, None if experts is None else [experts[index] for index in source])
    cache.keep(source)
    return logits_PV[source], cache


@torch.inference_mode()
def _draw(rows: Sequence[_Row], logits_BV: torch.Tensor) -> torch.Tensor:
    """Draw the next token of every row by its own parameters, and note it."""
    groups: dict[SamplingParams, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.params, []).append(place)
    tokens_B = torch.empty(len(rows), dtype=torch.int64)
    for params, places in groups.items():
        mine = [rows[place] for place in places]
        uniforms_B = torch.from_numpy(np.array([row.stream[len(row.tokens)] for row in mine], dtype=np.float32))
        logits = logits_BV if len(groups) == 1 else logits_BV[places]
        drawn_B, logprobs_B = draw(logits, uniforms_B, params)
        tokens_B[places] = drawn_B
        for row, token, logprob in zip(mine, drawn_B.tolist(), logprobs_B.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
    return tokens_B
