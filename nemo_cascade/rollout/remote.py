"""A Sampler over HTTP: token ids out, token ids and log-probabilities back, from `rollout/server.py` or what speaks
like it.

Every answer names the version of the weights it was sampled from; one that is not this Sampler's is an error, because
training would take it for on-policy. A failed call is repeated: with its seed it gives the same answer.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import torch
from safetensors.torch import save as save_safetensors

from nemo_cascade.models.decode import named_from
from nemo_cascade.rollout.draw import check_params
from nemo_cascade.rollout.local import check_request
from nemo_cascade.types import Completion, Json, Request, SamplingParams, UserError

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.2


class RemoteSampler:
    """The Sampler protocol on a server at `url`.

    Requests travel `per_call` at a time over `connections` connections, each call with `deadline_s` for all its tries.
    With `per_call` 1 the bodies hold nothing but standard fields and token-id prompts.
    """

    def __init__(
        self, url: str, deadline_s: float = 600.0, retries: int = 3, per_call: int = 16, connections: int = 16
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.deadline_s, self.retries, self.per_call = deadline_s, retries, per_call
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.Client(limits=limits, trust_env=False)
        self._pool = concurrent.futures.ThreadPoolExecutor(connections, "remote-sampler")
        health = self._call("GET", "/health")
        self.version = int(health["version"])  # type: ignore[arg-type]
        self.checksum = str(health["checksum"])
        self.holds = str(health.get("holds", "trtllm"))  # who does not say is taken to hold what TensorRT-LLM holds
        self._vocab_size = int(health["vocab_size"])  # type: ignore[arg-type]
        self._reports_experts = health.get("routed_experts") is True

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as calls return."""
        check_params(params)
        if params.routed_experts and not self._reports_experts:
            raise self._no_experts("its /health does not say that it can")
        for index, request in enumerate(requests):
            check_request(request, self._vocab_size, f"request {index}")
        return self._gather(requests, params)

    def _gather(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        starts = range(0, len(requests), self.per_call)
        calls = {
            self._pool.submit(self._complete, requests[start : start + self.per_call], params): start
            for start in starts
        }
        try:
            for call in concurrent.futures.as_completed(calls):
                for offset, completion in enumerate(call.result()):
                    yield calls[call] + offset, completion
        finally:
            for call in calls:
                call.cancel()

    def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Send the tensors themselves (small models; large ones go through `load_folder`)."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named_from(named).items()}
        content = save_safetensors(tensors)
        self._took(self._call("POST", f"/weights?version={version}", content=content), version)

    def load_folder(self, folder: str | Path, version: int) -> None:
        """Have the server read a folder that it sees under the same path."""
        body: dict[str, Json] = {"folder": str(Path(folder).resolve()), "version": version}
        self._took(self._call("POST", "/weights", body=body), version)

    def close(self) -> None:
        """Close the connections; the server lives on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _took(self, health: dict[str, Json], version: int) -> None:
        if health["version"] != version:
            raise UserError(f"sampler at {self.url}: took version {health['version']} when it was sent {version}")
        self.version, self.checksum = version, str(health["checksum"])

    def _complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        limits: list[Json] = [min(request.max_new_tokens, params.max_new_tokens) for request in requests]
        seeds: list[Json] = [request.seed for request in requests]
        body: dict[str, Json] = {
            "prompt": [list(request.token_ids) for request in requests],
            "max_tokens": limits if len(requests) > 1 else limits[0],
            "seed": seeds if len(requests) > 1 else seeds[0],
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "stop_token_ids": list(params.stop_ids),
            "logprobs": 1,
            "return_token_ids": True,
        }
        if params.logprobs == "raw":
            body["logprobs_mode"] = "raw_logprobs"
        if params.routed_experts:
            body["return_routed_experts"] = True
        choices = self._call("POST", "/v1/completions", body=body)["choices"]
        assert isinstance(choices, list) and len(choices) == len(requests), "the server lost prompts"
        ordered = sorted(choices, key=lambda choice: choice["index"])  # type: ignore[arg-type, index, return-value]
        found = [self._completion(choice) for choice in ordered]
        if params.routed_experts:
            for request, completion in zip(requests, found, strict=True):
                tokens = len(request.token_ids) + len(completion.token_ids)
                if not completion.routed_experts or len(completion.routed_experts) % tokens:
                    raise self._no_experts(f"{len(completion.routed_experts)} bytes for {tokens} tokens")
        return found

    def _no_experts(self, problem: str) -> UserError:
        return UserError(
            f"sampler at {self.url}: does not report the experts it used ({problem}), which routing_replay: sampler "
            "needs; set it to learner"
        )

    def _completion(self, choice: Json) -> Completion:
        assert isinstance(choice, dict)
        try:
            experts = base64.b64decode(str(choice.get("routed_experts") or ""), validate=True)
        except binascii.Error as error:
            raise self._no_experts(f"`routed_experts` is no base64: {error}") from error
        found = Completion(
            token_ids=tuple(choice["token_ids"]),  # type: ignore[arg-type]
            logprobs=tuple(choice["logprobs"]["token_logprobs"]),  # type: ignore[call-overload, index, arg-type]
            finish=choice["finish_reason"],  # type: ignore[arg-type]
            version=int(choice["version"]),  # type: ignore[arg-type]
            routed_experts=experts,
        )
        if found.version != self.version:
            raise UserError(
                f"sampler at {self.url}: answered with weights of version {found.version}, {self.version} were loaded; "
                "another run refits this server, or it was restarted"
            )
        return found

    def _call(
        self, method: str, path: str, body: dict[str, Json] | None = None, content: bytes | None = None
    ) -> dict[str, Json]:
        """One answer within the deadline; connection errors and 5xx are tried again, the asker's mistakes are not."""
        until = time.monotonic() + self.deadline_s
        problem = ""
        for attempt in range(1 + self.retries):
            left = max(until - time.monotonic(), 0.001)
            timeout = httpx.Timeout(left, connect=min(left, CONNECT_TIMEOUT_S))
            try:
                response = self._client.request(method, self.url + path, json=body, content=content, timeout=timeout)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code < 400:
                    return response.json()
                problem = _message(response)
                if response.status_code < 500:
                    raise UserError(f"sampler at {self.url}: {problem}")
            pause = FIRST_PAUSE_S * 2**attempt
            if attempt == self.retries or until - time.monotonic() <= pause:
                break
            time.sleep(pause)
        raise UserError(
            f"sampler at {self.url}: {method} {path.split('?')[0]} gave no answer within {self.deadline_s:.0f} s "
            f"({problem}); check that the server runs and that hardware.sampler_url is its address"
        )


def _message(response: httpx.Response) -> str:
    """The server's own line, or the beginning of what it said."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
