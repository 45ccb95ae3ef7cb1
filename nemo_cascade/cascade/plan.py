"""The plan before launch: the graph, every check, and what each stage will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_cascade.cascade import checks
from nemo_cascade.cascade.graph import Graph, build_graph
from nemo_cascade.config.load import Loaded
from nemo_cascade.config.schema import HardwareConfig, RolloutStage, SftConfig, StageBase
from nemo_cascade.config.strict import show
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import UserError

GIB = 1024**3
DEVICE_FLOPS = {"cpu": 3.0e10, "gpu": 9.9e14 * 0.3}
"""Training operations per second that a rank reaches: one core on the nano model (measured), an H100 in bf16 at 30
%.
"""
DECODE_SHARE = {"cpu": 0.3, "gpu": 0.15}
"""Decoding reaches this share of the training rate: it reads every weight for a few tokens."""
SEVERAL_TURNS = ("tool_use", "swe_agentic")
"""Domains whose rollouts hold more than one assistant turn; `max_new_tokens` bounds one turn."""


@dataclass(frozen=True)
class Plan:
    """A cascade that passed every check. `stages` have the steps that others start from added to what they keep.

    `missing` are inputs that this machine does not have: an error here on one node, a note for a cluster seen from a
    laptop.
    """

    loaded: Loaded
    graph: Graph
    stages: Mapping[str, StageBase]
    model: NemotronHConfig
    missing: tuple[str, ...]

    def refuse_missing(self) -> None:
        """Nothing can run without its inputs."""
        if self.missing:
            more = f" (and {len(self.missing) - 1} more)" if len(self.missing) > 1 else ""
            raise UserError(self.missing[0] + more)


@dataclass(frozen=True)
class Cost:
    """What one stage takes. Tokens are upper bounds (every rollout as long as allowed); memory is GiB per rank.

    `training_gib` counts weights, gradients and optimizer state, not activations. `device_hours` assumes DEVICE_FLOPS.
    """

    stage: str
    kind: str
    init: str
    steps: int
    sampled_tokens: int
    trained_tokens: int
    device_hours: float
    weights_gib: float
    training_gib: float
    fits: bool


def make_plan(loaded: Loaded) -> Plan:
    """Every check that needs no training; a single-node cascade must find its files here."""
    model = NemotronHConfig.from_mapping(loaded.model, f"model {loaded.cascade.model}")
    checks.check_hardware(loaded.hardware, model, f"hardware {loaded.cascade.hardware}")
    graph = build_graph(loaded)
    for name in loaded.stages:
        checks.check_stage(name, loaded, model)
    checks.check_evaluation(loaded, graph)
    checks.check_base(loaded, graph, model)
    stages = {
        name: _keep(stage, graph.kept_steps(name), show(loaded.files[name])) for name, stage in loaded.stages.items()
    }
    plan = Plan(loaded, graph, stages, model, tuple(dict.fromkeys(checks.missing_inputs(loaded, graph))))
    if loaded.hardware.nodes == 1:
        plan.refuse_missing()
    return plan


def _keep(stage: StageBase, wanted: list[int], origin: str) -> StageBase:
    """Export and evaluate the steps that others start from; evaluate no step that the stage never reaches."""
    assert stage.evaluation is not None
    evaluated = sorted({*wanted, *(step for step in stage.evaluation.steps if step < stage.num_steps)})
    if any(step < 1 for step in evaluated):
        raise UserError(f"{origin}: key 'evaluation.steps': steps count from 1")
    evaluation = dataclasses.replace(stage.evaluation, steps=evaluated)
    return dataclasses.replace(stage, keep_steps=sorted({*stage.keep_steps, *evaluated}), evaluation=evaluation)


def costs(plan: Plan) -> list[Cost]:
    """One Cost per stage, in the order they run."""
    hardware = plan.loaded.hardware
    weights, training = memory(plan.model, hardware)
    fits = hardware.device_memory_gib == 0 or training <= hardware.device_memory_gib * GIB
    device = "gpu" if hardware.layer_spec == "te" else "cpu"
    active = plan.model.active_parameter_count()
    rows = []
    for name in plan.graph.order:
        stage = plan.stages[name]
        sampled, trained = tokens(stage)
        seconds = (6 * active * trained + 2 * active * sampled / DECODE_SHARE[device]) / DEVICE_FLOPS[device]
        rows.append(
            Cost(
                name,
                stage.kind,
                stage.init,
                stage.num_steps,
                sampled,
                trained,
                seconds / 3600,
                weights / GIB,
                training / GIB,
                fits,
            )
        )
    return rows


def tokens(stage: StageBase) -> tuple[int, int]:
    """(sampled, trained) tokens of a stage at most; refills of dropped groups are not counted."""
    if isinstance(stage, SftConfig):
        return 0, stage.num_steps * stage.tokens_per_step
    assert isinstance(stage, RolloutStage)
    rollouts = stage.num_steps * stage.prompts_per_step * stage.group_size
    several_turns = any(domain in SEVERAL_TURNS or ":" in domain for domain in stage.data.domains)
    sampled = stage.sampling.max_total_tokens if several_turns else stage.sampling.max_new_tokens
    return rollouts * sampled, rollouts * stage.sampling.max_total_tokens


def memory(model: NemotronHConfig, hardware: HardwareConfig) -> tuple[float, float]:
    """Bytes per rank of (weights, weights + gradients + optimizer state).

    Adam keeps two moments and, below fp32, a master copy, with the distributed optimizer cut over the replicas (and
    context-parallel ranks); gradients are fp32.
    """
    per_expert = 2 * model.hidden_size * model.moe_intermediate_size
    experts = len(model.layers("E")) * model.n_routed_experts * per_expert
    dense = model.parameter_count() - experts
    dense_here = dense / (hardware.tensor_parallel * hardware.pipeline_parallel)
    experts_here = experts / (hardware.expert_parallel * hardware.pipeline_parallel)
    replicas, expert_replicas = 1.0, 1.0
    if hardware.distributed_optimizer:
        replicas = hardware.data_parallel * hardware.context_parallel
        expert_replicas = hardware.world_size / (hardware.expert_parallel * hardware.pipeline_parallel)
    width, cut = (4.0, 8.0) if hardware.precision == "fp32" else (2.0, 12.0)
    weights = width * (dense_here + experts_here)
    state = dense_here * (4.0 + cut / replicas) + experts_here * (4.0 + cut / expert_replicas)
    return weights, weights + state


def table(plan: Plan) -> str:
    """The plan as text: one line per stage, totals, and what does not fit."""
    rows = costs(plan)
    lines = [f"{'stage':20} {'kind':5} {'starts from':18} {'steps':>6} {'sampled':>9} {'trained':>9} {'device h':>9}"]
    total = Cost(
        "total",
        "",
        "",
        sum(row.steps for row in rows),
        sum(row.sampled_tokens for row in rows),
        sum(row.trained_tokens for row in rows),
        sum(row.device_hours for row in rows),
        rows[0].weights_gib,
        rows[0].training_gib,
        rows[0].fits,
    )
    for row in (*rows, total):
        lines.append(
            f"{row.stage:20} {row.kind:5} {row.init:18} {row.steps:>6} {human(row.sampled_tokens):>9} "
            f"{human(row.trained_tokens):>9} {row.device_hours:>9.2f}"
        )
    hardware, model = plan.loaded.hardware, plan.model
    lines.append(
        f"model: {human(model.parameter_count())} parameters, {human(model.active_parameter_count())} active per token"
    )
    lines.append(
        f"{hardware.world_size} ranks in {hardware.data_parallel} replicas; per rank {total.weights_gib:.3g} GiB of "
        f"weights, {total.training_gib:.3g} GiB with gradients and optimizer"
    )
    if hardware.device_memory_gib:
        verdict = "fits in" if total.fits else "DOES NOT FIT in"
        lines.append(f"memory: {verdict} {hardware.device_memory_gib:g} GiB per device (activations not counted)")
    lines.append("tokens are upper bounds: every answer as long as allowed")
    return "\n".join(lines)


def human(count: float) -> str:
    """1234567 as 1.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"
