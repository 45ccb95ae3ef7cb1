"""Megatron's gradient buffers and AdamW around the policy, and the one step that moves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_cascade.config.schema import OptimizerConfig
from nemo_cascade.models.cpu import cuda_as_cpu
from nemo_cascade.models.moe import freeze_routers, routers, update_expert_bias
from nemo_cascade.models.nemotron_h import NemotronH


@dataclass
class Trainer:
    """The wrapped policy (`ddp`) and its optimizer. Gradients are sums: the loss carries its denominators already."""

    cfg: OptimizerConfig
    model: NemotronH
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer

    @classmethod
    def wrap(cls, model: NemotronH, cfg: OptimizerConfig, bf16: bool, distributed: bool = False) -> Trainer:
        """Allocate gradient buffers and optimizer state; after it all data-parallel ranks hold the same weights.

        `calculate_per_token_loss` tells Megatron to add gradients over ranks instead of averaging them. `distributed`:
        each data-parallel rank keeps and applies its part of the optimizer state only (Megatron's distributed
        optimizer, ZeRO stage 1).
        """
        if cfg.router_frozen:
            freeze_routers(model)
        model.config.calculate_per_token_loss = True
        with cuda_as_cpu():
            ddp = DistributedDataParallel(
                config=model.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed
                ),
                module=model,
            )
            ddp.broadcast_params()
            optimizer = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=cfg.lr,
                    min_lr=0.0,
                    weight_decay=cfg.weight_decay,
                    adam_beta1=cfg.betas[0],
                    adam_beta2=cfg.betas[1],
                    adam_eps=cfg.eps,
                    clip_grad=cfg.clip_grad,
                    bf16=bf16,
                    params_dtype=torch.bfloat16 if bf16 else torch.float32,
                    use_distributed_optimizer=distributed,
                ),
                [ddp],
            )
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if isinstance(part, DistributedOptimizer):
                _number_as_listed(part.model_param_group_index_map)
        return cls(cfg, model, ddp, optimizer)

    def zero_grad(self) -> None:
        """Empty the gradient buffers and the routers' counts before the first micro-batch."""
        update_expert_bias(self.model, 0.0)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_gradients(self) -> float:
        """Add gradients over ranks; returns the norm before clipping (nan when broken). The policy stays as it is."""
        counts = [router.local_tokens_per_expert.clone() for router in routers(self.model)]
        with cuda_as_cpu():
            finalize_model_grads([self.ddp])
            # Megatron moved the expert biases by rate 0 (the model's config) and forgot what the routers counted.
            for router, count in zip(routers(self.model), counts, strict=True):
                router.local_tokens_per_expert.copy_(count)
            if self.optimizer.prepare_grads():
                return math.nan
            return float(self.optimizer.get_grad_norm())

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip to `clip_grad` (0: never), apply AdamW, move the expert biases. Vectors (norms) have no weight decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self.cfg.weight_decay * group["wd_mult"]
        with cuda_as_cpu():
            if self.cfg.clip_grad > 0.0 and gradient_norm > self.cfg.clip_grad:
                parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
                clip_grad_by_total_norm_fp32(parameters, self.cfg.clip_grad, gradient_norm)
            if not self.optimizer.step_with_ready_grads():
                raise RuntimeError("Megatron's optimizer refused a step whose gradients were finite")
        update_expert_bias(self.model, self.cfg.expert_bias_rate)


def _number_as_listed(places: dict[torch.nn.Parameter, tuple[int, int]]) -> None:
    """Correct where megatron-core 0.16.1 looks for a parameter's moments: (group, place in the group) of each.

    It counts the places in the order of its gradient buffers (distrib_optimizer.py:297), but the optimizer's group
    lists the fp32 parameters before the masters of the bf16 ones (:434). With both in one group checkpoints would hold
    the moments of one parameter under the name of another.
    """
    groups: dict[int, list[torch.nn.Parameter]] = {}
    for parameter, (group, _) in places.items():
        groups.setdefault(group, []).append(parameter)
    for group, members in groups.items():
        for place, parameter in enumerate(sorted(members, key=lambda member: member.dtype != torch.float32)):
            places[parameter] = (group, place)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that makes the policy: parameters and persistent buffers (the expert biases), detached, not copied."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def copy_into(targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> None:
    """Overwrite the targets' values in place."""
    for name, target in targets.items():
        target.copy_(sources[name])
