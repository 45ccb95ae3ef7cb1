"""Start and stop the ranks that hold the policy: torch.distributed, Megatron's parallel groups, seeds and threads.

One process works without any environment variable; several find each other through RANK, WORLD_SIZE and either
MASTER_ADDR and MASTER_PORT or a rendezvous file that they share (no port is opened then).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_cascade.config.schema import HardwareConfig
from nemo_cascade.models import cpu
from nemo_cascade.types import UserError


@dataclass(frozen=True)
class ParallelLayout:
    """How the policy is cut over ranks. Data parallelism is what is left of the world size.

    `expert_tensor` must be what both parallel_state and the model config hold: where they differ, Megatron does not
    complain and expert gradients are silently wrong. It is 1 here, experts are cut over `expert` ranks only.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    expert_tensor: int = 1
    dispatcher: str = "auto"  # how tokens reach the experts: local | allgather | alltoall | auto

    def __post_init__(self) -> None:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "expert": self.expert, "context": self.context}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"hardware.{name}_parallel: {size} is below 1")
        if self.expert_tensor != 1:
            raise UserError("expert tensor parallelism is not supported: cut experts with hardware.expert_parallel")

    @classmethod
    def from_hardware(cls, hardware: HardwareConfig) -> ParallelLayout:
        """The layout of a hardware file."""
        return cls(
            tensor=hardware.tensor_parallel,
            pipeline=hardware.pipeline_parallel,
            expert=hardware.expert_parallel,
            context=hardware.context_parallel,
            dispatcher=hardware.moe_dispatcher,
        )

    def dispatcher_here(self) -> str:
        """The dispatcher on this machine; all give the same sums.

        `local` where every expert is on each rank, on a GPU by itself; allgather moves every token to every rank.
        """
        if self.dispatcher != "auto":
            return self.dispatcher
        if not torch.cuda.is_available():
            return "allgather"
        return "local" if self.expert == 1 else "alltoall"

    def megatron_dispatcher(self) -> str:
        """What Megatron's config is told: it has no word for `local`, which takes another one's place in each layer."""
        return "alltoall" if self.dispatcher_here() == "local" else self.dispatcher_here()

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the policy."""
        return self.tensor * self.pipeline * self.context


def start(
    layout: ParallelLayout | None = None,
    seed: int = 1,
    rendezvous: Path | None = None,
    threads: int = 1,
    timeout_s: float = 600.0,
) -> ParallelLayout:
    """Join the ranks and build Megatron's groups; returns the layout.

    `seed` is the same on all ranks: ranks of one tensor-parallel group draw different streams where Megatron asks for
    them. `threads` are torch's: 1 is ten times faster than 2 where other processes share the cores.
    """
    from megatron.core import parallel_state

    layout = layout or ParallelLayout()
    cpu.install()
    torch.set_num_threads(threads)
    if not dist.is_initialized():
        _join(rendezvous, timedelta(seconds=timeout_s))
    world = dist.get_world_size()
    if world % layout.model_ranks or (world // layout.pipeline) % layout.expert:
        raise UserError(
            f"hardware: {world} ranks cannot hold tensor {layout.tensor} x pipeline {layout.pipeline} x context "
            f"{layout.context}, expert {layout.expert}; the number of ranks must be a multiple of each"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
    set_seed(seed)
    return layout


def _join(rendezvous: Path | None, timeout: timedelta) -> None:
    """Find the other ranks; a lone process needs neither port nor file."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1 and rendezvous is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif rendezvous is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a shared file means one machine
        method = f"file://{rendezvous.resolve()}"
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=world, timeout=timeout)
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=timeout)
    else:
        raise UserError(f"WORLD_SIZE is {world} but neither MASTER_ADDR and MASTER_PORT nor a rendezvous file is given")


def set_seed(seed: int) -> None:
    """Seed torch and Megatron's named random streams; the same seed gives the same random weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def is_started() -> bool:
    """Whether `start` has run in this process."""
    from megatron.core import parallel_state

    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def stop() -> None:
    """Leave the ranks; afterwards `start` may be called again with another layout."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
