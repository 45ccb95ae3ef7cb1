"""A CPU stand-in for the torch.cuda calls of megatron-core 0.16.1, so that one Learner serves laptop and cluster.

Nothing here is active where CUDA exists. Every patch names the megatron line that needs it; when megatron-core moves,
this file is the list to check. Configuration avoids the rest: `use_cpu_initialization`, no fused kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def _current_device() -> torch.device:
    """What `torch.cuda.current_device()` answers here."""
    return _CPU


def _get_rng_state(device: Any = -1, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """The CPU generator's state under the signature of megatron's `_get_cuda_rng_state`."""
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the CPU generator under the signature of megatron's `_set_cuda_rng_state`."""
    torch.set_rng_state(new_state)


def _rng_tracker_class() -> type:
    """A tracker of named random streams on the CPU generator."""
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Named random streams of tensor- and expert-parallel regions, kept on the CPU generator.

        megatron/core/tensor_parallel/random.py `add` and `fork` read the CUDA generator; `fork` also warns when the CPU
        generator moves, which here is its purpose.
        """

        def add(self, name: str, seed: int) -> None:
            """Start the stream `name` at `seed`."""
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} or seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            before = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            """Draw from the stream `name` inside the context."""
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return CpuRNGStatesTracker


def name_missing_gemm() -> None:
    """moe/moe_utils.py RouterGatingLinearFunction tests `te_general_gemm is not None`, but the name exists only when
    Transformer Engine does: NameError with router dtype fp32, with CUDA too.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def install() -> None:
    """Put the stand-in in place; a second call, or a machine with CUDA, changes nothing."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    # megatron/core/jit.py: jit_fuser is torch.compile, about 13 s of g++ at run time for nothing on a small model.
    # Calls ask this switch, so it works whatever was imported before; TORCHDYNAMO_DISABLE=0 keeps compiling.
    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE", "1") != "0"
    # moe/router.py:90,169,178 place weights and buffers on torch.cuda.current_device(); so do
    # tensor_parallel/mappings.py:91 (gathers), distributed/param_and_grad_buffer.py:783 (gradient buffers) and
    # p2p_communication.py:190 (pipeline).
    torch.cuda.current_device = _current_device  # type: ignore[assignment]

    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    # tensor_parallel/random.py:40-110 read and set the CUDA generator (activation recompute calls both).
    mcore_random._get_cuda_rng_state = _get_rng_state
    mcore_random._set_cuda_rng_state = _set_rng_state
    # tensor_parallel/random.py initialize_rng_tracker builds the CUDA tracker.
    mcore_random.CudaRNGStatesTracker = _rng_tracker_class()
    moe_utils.te_general_gemm = None  # type: ignore[attr-defined]  # Transformer Engine's needs a card
    _optimizer_in_pytorch()
    # pipeline_parallel/p2p_communication.py:242,398 synchronise the device after a send.
    torch.cuda.synchronize = _no_op  # type: ignore[assignment]
    # moe/token_dispatcher.py:464 opens a side stream for copies to the host, and :839-885 makes and awaits them there.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _CPU
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_numbers
    _installed = True


def _optimizer_in_pytorch() -> None:
    """Where Transformer Engine is installed and no card is there, AdamW and the norm of gradients are PyTorch's, as
    where it is not: optimizer/__init__.py:13, clip_grads.py:11, optimizer.py:17 and distrib_optimizer.py:25 take its
    kernels when they are imported.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed

    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = False
    for module in (clip_grads, mixed):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


def _splits_as_numbers(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """What the alltoall dispatcher copies to the host is there already; collectives want the counts as a list."""
    for name in ("input_splits", "output_splits"):
        counts = getattr(dispatcher, name)
        if isinstance(counts, torch.Tensor):
            setattr(dispatcher, name, counts.tolist())
    return tokens_per_expert


def _no_op(device: Any = None) -> None:
    """A device-wide wait has nothing to wait for."""


class _CudaAsCpu(TorchFunctionMode):
    """Rewrites `device='cuda'` to CPU and lets CPU tensors answer for their CUDA type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and kwargs["device"] is not None and "cuda" in str(kwargs["device"]):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        answer = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer


@contextlib.contextmanager
def cuda_as_cpu() -> Iterator[None]:
    """Inside the context megatron's optimizer and schedules run on CPU tensors; nothing happens where CUDA exists.

    Needed by optimizer/optimizer.py:473,481,485,671-699,907 and grad_scaler.py:15 (device='cuda', `.type()` names),
    clip_grads.py:90-174, distrib_optimizer.py:361-433 and pipeline_parallel/schedules.py:596,983,2138. Scope it to
    those calls: every torch call inside pays for the interception.
    """
    if torch.cuda.is_available():
        yield
        return
    with _CudaAsCpu():
        yield
