"""Where TensorRT-LLM will stand: the Sampler of GPU clusters. Nothing here pretends to run without it.

TensorRT-LLM pins its own torch and numpy and needs 1.3.0rc21 or newer for NemotronH refit, so it runs in its own
container and process; Hugging Face named tensors, token ids and plain records cross the boundary. A server there that
speaks the HTTP of `rollout/server.py` is used through `hardware.sampler: remote` and its address.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from nemo_cascade.types import Json, UserError


def refusal() -> str:
    """Why a stage cannot sample with TensorRT-LLM in its own process, and what to do instead."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        problem = "TensorRT-LLM >= 1.3.0rc21 is not installed here (it lives in NVIDIA's container)"
    else:
        problem = "TensorRT-LLM does not run inside the trainer's process"
    return (
        f"{problem}; start a server in that container and set `sampler: remote` with `sampler_url`, or use "
        "`sampler: local`"
    )


class TrtLlmSampler:
    """Refuses to start, in one line that says what is needed instead."""

    def __init__(self, model: Mapping[str, Json]) -> None:
        raise UserError(f"hardware.sampler: trtllm: {refusal()}")
