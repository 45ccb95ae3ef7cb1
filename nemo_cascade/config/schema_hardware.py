"""The knobs of a machine: ranks, parallel layout, precision and backends, and who tracks the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nemo_cascade.config.bounds import at_least, choose, no_secret

PRECISIONS = ("fp32", "bf16", "hopper_fp8", "blackwell_mxfp8", "hopper_fp8_emulated", "blackwell_mxfp8_emulated")


@dataclass
class HardwareConfig:
    """Where and how: ranks, layout, precision and the backends. One file per machine in conf/hardware."""

    name: str = "cpu"
    nodes: int = 1
    ranks_per_node: int = 1
    threads_per_rank: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    distributed_optimizer: bool = False  # cut optimizer state and gradient sums over the data-parallel ranks
    layer_spec: str = "local"  # local | te
    precision: str = "fp32"  # fp32 | bf16 | hopper_fp8 | blackwell_mxfp8, or one of these two with _emulated
    fp8_bf16_layers: int = 2  # layers at each end of the model that FP8 leaves in bf16
    # How tokens reach the experts: local (all are on each rank) | allgather | alltoall, or auto: on a GPU local without
    # expert parallelism and alltoall with it, on the CPU allgather.
    moe_dispatcher: str = "auto"
    sampler: str = "local"  # local | remote | trtllm
    sampler_url: Optional[str] = None
    refit: str = "memory"  # memory | files
    reward_workers: int = 4  # threads that score rollouts
    async_save: bool = False  # train on while a checkpoint is written; costs host memory, the size of a rank's part
    device_memory_gib: float = 0.0  # per rank; 0: not bounded (CPU)
    host_memory_gib: float = 0.0

    def __post_init__(self) -> None:
        choose("hardware.layer_spec", self.layer_spec, ("local", "te"))
        choose("hardware.precision", self.precision, PRECISIONS)
        at_least("hardware.fp8_bf16_layers", self.fp8_bf16_layers, 0)
        choose("hardware.moe_dispatcher", self.moe_dispatcher, ("auto", "local", "allgather", "alltoall"))
        choose("hardware.sampler", self.sampler, ("local", "remote", "trtllm"))
        no_secret("hardware.sampler_url", self.sampler_url or "")
        choose("hardware.refit", self.refit, ("memory", "files"))
        at_least("hardware.reward_workers", self.reward_workers, 1)
        at_least("hardware.device_memory_gib", self.device_memory_gib, 0.0)
        at_least("hardware.host_memory_gib", self.host_memory_gib, 0.0)

    @property
    def world_size(self) -> int:
        """Learner ranks over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def data_parallel(self) -> int:
        """Replicas of the policy."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)


@dataclass
class TrackersConfig:
    """TensorBoard is always written; the others when named."""

    wandb_project: Optional[str] = None
    mlflow_uri: Optional[str] = None
