"""The knobs of a stage and of a cascade. Each lives once; an unknown key is an error; numbers carry their source in
YAML.

OmegaConf reads these as structured configs, which is why choices are strings checked in `__post_init__` and not
Literals. A stage YAML holds exactly one of `SftConfig`, `GrpoConfig`, `MopdConfig`, chosen by its key `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from nemo_cascade.types import UserError


def choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside `choices`, naming the key."""
    if value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")


def at_least(key: str, value: float, low: float) -> None:
    """Refuse a number below `low`, naming the key."""
    if value < low:
        raise UserError(f"{key}: {value} is below {low}")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. `lr` and `min_lr` per step; warm-up is linear from `warmup_from`."""

    lr: float = MISSING
    min_lr: Optional[float] = None  # None: lr, a constant schedule
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    schedule: str = "constant"  # constant | cosine | linear
    warmup_steps: int = 0
    warmup_from: float = 0.0
    schedule_steps: Optional[int] = None  # None: num_steps of the stage
    router_frozen: bool = False
    expert_bias_rate: float = 0.0  # update rate of the router's expert bias, 0 leaves it alone

    def __post_init__(self) -> None:
        choose("optimizer.schedule", self.schedule, ("constant", "cosine", "linear"))
        if len(self.betas) != 2:
            raise UserError("optimizer.betas: two numbers are needed")


@dataclass
class SamplingConfig:
    """How rollouts are drawn. `max_new_tokens` bounds one assistant turn, `max_total_tokens` the conversation."""

    max_new_tokens: int = MISSING
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_tokens: int = 4096  # longer prompts are dropped and counted
    max_total_tokens: int = 8192

    def __post_init__(self) -> None:
        at_least("sampling.temperature", self.temperature, 0.0)
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"sampling.top_p: {self.top_p} is outside (0, 1]")


@dataclass
class FiltersConfig:
    """Which groups and rollouts reach the loss."""

    dynamic: bool = False  # replace groups whose rewards are all equal until the batch is full
    max_refills: int = 8
    overlong: str = "neither"  # penalty: reward 0 | filter: out of the loss, in the baseline | neither
    mask_groups_below_max: Optional[float] = None  # drop groups whose best reward is not above this
    max_invalid_share: float = 0.2  # abort the step beyond this share of Invalid rollouts

    def __post_init__(self) -> None:
        choose("filters.overlong", self.overlong, ("penalty", "filter", "neither"))


@dataclass
class AdvantageConfig:
    """Equation 1: A = (r - baseline) / (std + eps)."""

    baseline: str = "mean"  # mean | leave_one_out
    scale: str = "std"  # std (population) | sample_std | none
    eps: float = 1.0e-6

    def __post_init__(self) -> None:
        choose("advantage.baseline", self.baseline, ("mean", "leave_one_out"))
        choose("advantage.scale", self.scale, ("std", "sample_std", "none"))


@dataclass
class LossConfig:
    """The GRPO loss. `normalize` names the denominator of the token sum."""

    normalize: str = "batch_tokens"  # batch_tokens | group_tokens | sequence
    kl: float = 0.0
    kl_type: str = "k3"  # k1 | k2 | k3, against the checkpoint entering the stage
    importance: str = "none"  # none | tis (clamp) | icepop (mask); Learner against Sampler
    importance_low: float = 0.5
    importance_high: float = 2.0
    max_masked_share: float = 0.5  # abort when importance masks more than this share of tokens
    routing_replay: str = "none"  # none | learner: the update uses the experts of a pass just before it

    def __post_init__(self) -> None:
        choose("loss.normalize", self.normalize, ("batch_tokens", "group_tokens", "sequence"))
        choose("loss.kl_type", self.kl_type, ("k1", "k2", "k3"))
        choose("loss.importance", self.importance, ("none", "tis", "icepop"))
        choose("loss.routing_replay", self.routing_replay, ("none", "learner"))


@dataclass
class DistillConfig:
    """Equations 2 to 4. `kind` sampled is the paper's; full_vocab is the exact reverse KL per position."""

    kind: str = "sampled"  # sampled | full_vocab
    importance_low: float = 0.5
    importance_high: float = 2.0
    clip_advantage: Optional[float] = None  # |a_t| bound; the paper has none
    max_masked_share: float = 0.5
    routing_replay: str = "none"  # as in loss

    def __post_init__(self) -> None:
        choose("distill.kind", self.kind, ("sampled", "full_vocab"))
        choose("distill.routing_replay", self.routing_replay, ("none", "learner"))


@dataclass
class DataConfig:
    """Where tasks or conversations come from. `files` maps a domain to JSONL rows in the released schema; without it
    the domain's own generator is used."""

    domains: dict[str, float] = field(default_factory=dict)  # mixture weights
    files: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # per-domain options
    flaw_rate: float = 0.0  # SFT: share of faulty demonstrations
    flaw_rates: dict[str, float] = field(default_factory=dict)  # SFT: domains with a share of their own
    thinking_share: float = 0.5  # SFT: share of conversations with reasoning on
    conversations: list[str] = field(default_factory=list)  # SFT: JSONL files with `messages`
    corpus_share: float = 0.0  # pre-training: share of plain documents
    judge_share: float = 0.0  # SFT of the judge: share of generated preference pairs with the judge's JSON
    full_loss: bool = False  # pre-training: every token is trained


@dataclass
class GateConfig:
    """Checked on `select` tasks when the stage is done: fails when gain < `min_gain` with the interval's upper end
    below it.
    """

    domain: str = MISSING
    min_gain: float = 0.0  # against the checkpoint the stage started from
    on_fail: str = "warn"  # warn | stop | rollback (children start from the stage's own init instead)

    def __post_init__(self) -> None:
        choose("gates.on_fail", self.on_fail, ("warn", "stop", "rollback"))


@dataclass
class EvaluationConfig:
    """Tasks per domain after each stage. 0 switches a set off."""

    select: int = 96
    report: int = 256
    other_mode: int = 0  # report tasks in the mode (thinking or instruct) that the domain does not train
    domains: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)  # benchmark rows instead of generated tasks
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # per-domain options, the same for every stage
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    steps: list[int] = field(default_factory=list)  # also evaluate the checkpoints at these steps


@dataclass
class JudgeConfig:
    """The preference judge: `serve` a checkpoint on loopback, or call an OpenAI-compatible `url`."""

    serve: Optional[str] = None  # hf:PATH
    url: Optional[str] = None
    model: str = "judge"
    timeout_s: float = 60.0
    retries: int = 3
    strategy: str = "all_pairs"  # all_pairs | circular
    swap: bool = False  # also judge each pair in the other order
    length_weight: float = 0.5  # w of the group-relative length terms, section 5.4
    conciseness_bonus: float = 0.5


@dataclass
class StageBase:
    """What every stage has. `init`: a stage, `stage@step`, `hf:PATH`, `base` or `random`."""

    kind: str = MISSING
    init: str = MISSING
    num_steps: int = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_tokens: int = 4096  # packed tokens per forward pass
    save_every: int = 50  # steps between resumable checkpoints
    keep_steps: list[int] = field(default_factory=list)  # steps whose weights are exported for `stage@step`
    evaluation: Optional[EvaluationConfig] = None  # None: the cascade's
    gates: list[GateConfig] = field(default_factory=list)
    judge: Optional[JudgeConfig] = None  # None: the cascade's

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 1)
        at_least("save_every", self.save_every, 1)


@dataclass
class SftConfig(StageBase):
    """Supervised fine-tuning (and pre-training, with `data.full_loss`) on packed conversations."""

    tokens_per_step: int = MISSING  # over all ranks
    max_sequence_tokens: int = 512
    reduction: str = "token"  # token | sequence
    precision_export: str = "fp32"  # fp32 | bf16

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("reduction", self.reduction, ("token", "sequence"))


@dataclass
class RolloutStage(StageBase):
    """What grpo and mopd share. `record`: where rollouts come from or whether they are trained on."""

    prompts_per_step: int = MISSING  # over all ranks
    group_size: int = MISSING  # rollouts per prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    mode: str = "on_policy"  # on_policy | sample_only | train_only (from `rollouts`)
    rollouts: Optional[str] = None  # train_only: the stage folder whose recorded steps are trained on
    record_every: int = 10  # steps between recorded rollouts, 1 to train on them later; sample_only records every step

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mode", self.mode, ("on_policy", "sample_only", "train_only"))
        at_least("record_every", self.record_every, 1)
        if self.mode == "train_only" and not self.rollouts:
            raise UserError("rollouts: mode train_only needs the folder of a run's recorded rollouts")


@dataclass
class GrpoConfig(RolloutStage):
    """Group-relative policy optimisation, strictly on-policy (equation 1)."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("group_size", self.group_size, 2)


@dataclass
class TeachersConfig:
    """Who may teach. Each domain gets the candidate with the best `select` score unless `pin` names one."""

    candidates: list[str] = field(default_factory=list)
    pin: dict[str, str] = field(default_factory=dict)


@dataclass
class MopdConfig(RolloutStage):
    """Multi-domain on-policy distillation (equations 2 to 4)."""

    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


STAGE_KINDS: dict[str, type[StageBase]] = {"sft": SftConfig, "grpo": GrpoConfig, "mopd": MopdConfig}


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
    layer_spec: str = "local"  # local | te
    precision: str = "fp32"  # fp32 | bf16 | hopper_fp8 | blackwell_mxfp8
    moe_dispatcher: str = "auto"  # how tokens reach the experts: allgather | alltoall | auto (alltoall on a GPU)
    sampler: str = "local"  # local | remote | trtllm
    sampler_url: Optional[str] = None
    refit: str = "memory"  # memory | files
    reward_workers: int = 4  # threads that score rollouts
    device_memory_gib: float = 0.0  # per rank; 0: not bounded (CPU)
    host_memory_gib: float = 0.0

    def __post_init__(self) -> None:
        choose("hardware.layer_spec", self.layer_spec, ("local", "te"))
        choose("hardware.precision", self.precision, ("fp32", "bf16", "hopper_fp8", "blackwell_mxfp8"))
        choose("hardware.moe_dispatcher", self.moe_dispatcher, ("auto", "allgather", "alltoall"))
        choose("hardware.sampler", self.sampler, ("local", "remote", "trtllm"))
        choose("hardware.refit", self.refit, ("memory", "files"))

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


@dataclass
class CascadeConfig:
    """The cascade in one object. `stages` are names of files below conf/stage (or paths); order is topological after
    `init`.
    """

    name: str = MISSING
    model: str = MISSING  # conf/model/NAME.yaml or a path
    base: str = MISSING  # hf:PATH or hf:nano (the shipped base) or random
    hardware: str = "cpu"  # conf/hardware/NAME.yaml or a path
    seed: int = 1
    output: str = "runs"
    stages: list[str] = field(default_factory=list)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judge: Optional[JudgeConfig] = None
    trackers: TrackersConfig = field(default_factory=TrackersConfig)


@dataclass
class StageRun:
    """`config.yaml` of a stage folder: everything `launch` needs to run one stage, all references resolved to
    folders.
    """

    cascade: str = MISSING
    stage: str = MISSING
    key: str = MISSING  # content hash, also the end of the folder's name
    seed: int = MISSING
    kind: str = MISSING
    init_folder: Optional[str] = None  # Hugging Face folder; None: random weights
    teacher_folders: dict[str, str] = field(default_factory=dict)  # domain -> Hugging Face folder
    teacher_stages: dict[str, str] = field(default_factory=dict)  # domain -> stage name
    model: dict[str, Any] = field(default_factory=dict)  # NemotronHConfig fields
    tokenizer: str = MISSING  # folder
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
    config: Any = MISSING  # SftConfig | GrpoConfig | MopdConfig by `kind`, evaluation and judge filled in
