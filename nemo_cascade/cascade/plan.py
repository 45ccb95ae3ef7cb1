"""The plan before launch: the graph, every check, and what each stage will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_cascade.cascade import checks
from nemo_cascade.cascade.graph import Graph, build_graph
from nemo_cascade.config.load import Loaded
from nemo_cascade.config.schema import GrpoConfig, HardwareConfig, MopdConfig, RolloutStage, SftConfig, StageBase
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
    """What one stage takes. Tokens are upper bounds (every rollout as long as allowed); memory is GiB.

    Per rank: `weights_gib` of the policy, `training_gib` with gradients and optimizer state; activations are not
    counted. Per node: `host_gib`, see `host_memory`. `device_hours` assumes DEVICE_FLOPS.
    """

    stage: str
    kind: str
    init: str
    steps: int
    parameters: int
    sampled_tokens: int
    trained_tokens: int
    device_hours: float
    weights_gib: float
    training_gib: float
    host_gib: float


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
    weights, training = memory(plan.model, plan.loaded.hardware)
    device = "gpu" if plan.loaded.hardware.layer_spec == "te" else "cpu"
    active = plan.model.active_parameter_count()
    rows = []
    for name in plan.graph.order:
        stage = plan.stages[name]
        sampled, trained = tokens(stage)
        seconds = (6 * active * trained + 2 * active * sampled / DECODE_SHARE[device]) / DEVICE_FLOPS[device]
        rows.append(
            Cost(
                stage=name,
                kind=stage.kind,
                init=stage.init,
                steps=stage.num_steps,
                parameters=plan.model.parameter_count(),
                sampled_tokens=sampled,
                trained_tokens=trained,
                device_hours=seconds / 3600,
                weights_gib=weights / GIB,
                training_gib=training / GIB,
                host_gib=host_memory(plan, name) / GIB,
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


def host_memory(plan: Plan, name: str) -> float:
    """Bytes of host memory per node that a stage's weights take.

    Every rank keeps one copy of its shard for each folder it borrows weights from (teachers, the KL reference, other
    checkpoints it measures) and one of the policy meanwhile. A local sampler holds the whole model in every rank's
    process. Without a GPU the policy with its optimizer lies there, too.
    """
    hardware, model, stage = plan.loaded.hardware, plan.model, plan.stages[name]
    weights, training = memory(model, hardware)
    folders = len(borrowed(plan, name))
    rank = weights * (folders + 1) if folders else 0.0
    if hardware.sampler == "local" and checks.samples(stage):
        rank += model.parameter_count() * (4.0 if hardware.precision == "fp32" else 2.0)
    if hardware.layer_spec != "te":
        rank += training
    return rank * hardware.ranks_per_node


def borrowed(plan: Plan, name: str) -> set[str]:
    """The checkpoints besides the policy whose weights a stage puts into it for a while; teachers at most."""
    stage, source = plan.stages[name], plan.graph.sources[name]
    found = {f"{name}@{step}" for step in stage.evaluation.steps} if stage.evaluation is not None else set()
    if stage.evaluation is not None and stage.evaluation.select + stage.evaluation.report == 0:
        found = set()
    elif source.folder is not None:
        found.add(str(source.folder))  # weights that no stage made are measured by those that start from them
    if isinstance(stage, GrpoConfig) and stage.loss.kl > 0.0:
        found.add(str(source.folder) if source.folder is not None else source.checkpoint)
    if isinstance(stage, MopdConfig):
        teachers = [teacher.checkpoint for teacher in plan.graph.teaching[name].all]
        found |= set(teachers[: len(stage.data.domains)])
    return found


def table(plan: Plan) -> str:
    """The plan as text: one line per stage, totals, and what does not fit."""
    rows = costs(plan)
    lines = [
        f"{'stage':20} {'kind':5} {'starts from':18} {'steps':>6} {'sampled':>9} {'trained':>9} {'device h':>9} "
        f"{'params':>7} {'weights':>8} {'training':>8} {'host':>8}"
    ]
    for row in rows:
        lines.append(
            _work(row.stage, row.kind, row.init, row.steps, row.sampled_tokens, row.trained_tokens, row.device_hours)
            + f" {human(row.parameters):>7} {row.weights_gib:>8.3g} {row.training_gib:>8.3g} {row.host_gib:>8.3g}"
        )
    sums = [
        sum(getattr(row, key) for row in rows) for key in ("steps", "sampled_tokens", "trained_tokens", "device_hours")
    ]
    lines.append(_work("total", "", "", *sums))
    hardware, model = plan.loaded.hardware, plan.model
    active = human(model.active_parameter_count())
    lines.append(
        f"model: {human(model.parameter_count())} parameters, {active} active per token; "
        f"{hardware.world_size} ranks in {hardware.data_parallel} replicas"
    )
    lines.append(
        "memory in GiB: weights of the policy and training (with gradients and optimizer) per rank; host per node "
        "(teachers, reference, sampler here); activations not counted"
    )
    lines += _verdicts(rows, hardware)
    lines.append("tokens are upper bounds: every answer as long as allowed")
    return "\n".join(lines)


def _work(stage: str, kind: str, init: str, steps: int, sampled: float, trained: float, hours: float) -> str:
    return f"{stage:20} {kind:5} {init:18} {steps:>6} {human(sampled):>9} {human(trained):>9} {hours:>9.2f}"


def _verdicts(rows: Sequence[Cost], hardware: HardwareConfig) -> Iterator[str]:
    """Whether the largest stage fits where the hardware file says how much memory there is."""
    for what, limit, key in (
        ("device", hardware.device_memory_gib, "training_gib"),
        ("host, per node", hardware.host_memory_gib, "host_gib"),
    ):
        if limit:
            largest = max(rows, key=lambda row: getattr(row, key))
            needed = getattr(largest, key)
            verdict = "fits in" if needed <= limit else "DOES NOT FIT in"
            yield f"{what}: {verdict} {limit:g} GiB ({largest.stage} takes {needed:.3g})"


def human(count: float) -> str:
    """1234567 as 1.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"
