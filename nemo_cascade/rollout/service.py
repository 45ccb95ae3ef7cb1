"""The decoding thread of the HTTP server: requests of all connections meet in one batch.

One thread owns the engine. Connections hand it requests and wait on their own futures; a weight update waits until
everything that was asked of the old weights is answered, so a completion never mixes two versions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nemo_cascade.rollout.draw import check_params
from nemo_cascade.rollout.engine import Engine
from nemo_cascade.rollout.local import LocalSampler, check_experts, check_request
from nemo_cascade.types import Completion, Request, SamplingParams, UserError


@dataclass(frozen=True)
class _Ask:
    request: Request
    params: SamplingParams
    answer: Future[Completion]


@dataclass(frozen=True)
class _Refit:
    load: Callable[[], None]
    answer: Future[None]


class DecodingThread:
    """Runs a LocalSampler's engine for as long as the server lives."""

    def __init__(self, sampler: LocalSampler) -> None:
        self.sampler = sampler
        self._inbox: queue.Queue[_Ask | _Refit | None] = queue.Queue()
        self._asked: dict[int, Future[Completion]] = {}
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def complete(self, asked: Sequence[tuple[Request, SamplingParams]], timeout_s: float) -> list[Completion]:
        """The completions of these requests in their order. Refuses bad requests before any is decoded."""
        for index, (request, params) in enumerate(asked):
            check_params(params)
            if params.routed_experts:
                check_experts(self.sampler.config)
            check_request(request, self.sampler.config.vocab_size, f"prompt {index}")
        if not self._thread.is_alive():
            raise UserError("server: the decoding thread has ended; see the server's log and start it again")
        answers: list[Future[Completion]] = []
        for request, params in asked:
            answers.append(Future())
            self._inbox.put(_Ask(request, params, answers[-1]))
        return [answer.result(timeout=timeout_s) for answer in answers]

    def refit(self, load: Callable[[], None], timeout_s: float) -> None:
        """Run `load` (which loads weights into the sampler) when nothing is being decoded."""
        answer: Future[None] = Future()
        self._inbox.put(_Refit(load, answer))
        answer.result(timeout=timeout_s)

    def close(self) -> None:
        """Stop after the current step."""
        self._inbox.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            self._decode()
        finally:  # nobody waits for a thread that has ended
            for answer in self._asked.values():
                answer.cancel()

    def _decode(self) -> None:
        engine = self.sampler.engine()
        while True:
            job = self._next(wait=not engine.busy)
            while job is not None:
                if isinstance(job, _Ask):
                    self._add(engine, job)
                elif isinstance(job, _Refit):
                    while engine.busy:
                        self._step(engine)
                    self._load(job)
                    engine = self.sampler.engine()
                else:
                    return
                job = self._next(wait=False)
            if engine.busy:
                self._step(engine)

    def _next(self, wait: bool) -> _Ask | _Refit | bool | None:
        """The next job, False to stop, None when there is none yet."""
        try:
            job = self._inbox.get(block=wait)
        except queue.Empty:
            return None
        return False if job is None else job

    def _add(self, engine: Engine, job: _Ask) -> None:
        self._count += 1
        self._asked[self._count] = job.answer
        engine.add(self._count, job.request, job.params)

    def _step(self, engine: Engine) -> None:
        for key, completion in engine.step():
            self._asked.pop(key).set_result(completion)

    def _load(self, job: _Refit) -> None:
        try:
            job.load()
        except (UserError, OSError) as error:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(None)
