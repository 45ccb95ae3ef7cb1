"""The knobs of a stage and of a cascade. Each lives once; an unknown key is an error; numbers carry their source in
YAML.

OmegaConf reads these as structured configs, which is why choices are strings checked in `__post_init__` and not
Literals. A stage YAML holds exactly one of `SftConfig`, `GrpoConfig`, `MopdConfig`, chosen by its key `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from nemo_cascade.config.bounds import above, at_least, choose, interval, nucleus, share
from nemo_cascade.config.schema_data import (
    DataConfig,
    EquivalenceJudgeConfig,
    EvaluationConfig,
    GateConfig,
    JudgeConfig,
)
from nemo_cascade.config.schema_hardware import HardwareConfig, TrackersConfig
from nemo_cascade.types import UserError


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. `lr` and `min_lr` per step; warm-up is linear from `warmup_from`."""

    lr: float = MISSING
    min_lr: Optional[float] = None  # None: lr, a constant schedule
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    max_skipped_steps: int = 0  # steps in a row that a loss or gradient that is no number may cost; one more aborts
    schedule: str = "constant"  # constant | cosine | linear
    warmup_steps: int = 0
    warmup_from: float = 0.0
    schedule_steps: Optional[int] = None  # None: num_steps of the stage
    router_frozen: bool = False
    expert_bias_rate: float = 0.0  # update rate of the router's expert bias, 0 leaves it alone

    def __post_init__(self) -> None:
        choose("optimizer.schedule", self.schedule, ("constant", "cosine", "linear"))
        for key in ("lr", "min_lr", "weight_decay", "clip_grad", "warmup_steps", "warmup_from", "expert_bias_rate"):
            at_least(f"optimizer.{key}", getattr(self, key), 0)
        if len(self.betas) != 2:
            raise UserError("optimizer.betas: two numbers are needed")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas: {self.betas} are not both in [0, 1)")
        above("optimizer.eps", self.eps, 0.0)
        at_least("optimizer.max_skipped_steps", self.max_skipped_steps, 0)
        at_least("optimizer.schedule_steps", self.schedule_steps, 1)
        if self.schedule == "constant" and self.min_lr not in (None, self.lr):
            raise UserError(
                f"optimizer.min_lr: {self.min_lr} has no effect with schedule constant; remove it or choose cosine or "
                "linear"
            )


ROUTING_REPLAY = ("none", "learner", "sampler")
"""Choices of `loss.routing_replay` and `distill.routing_replay`."""

NORMALIZE = ("batch_tokens", "group_tokens", "sequence", "constant")
KL_TYPES = ("k1", "k2", "k3")
IMPORTANCE = ("none", "tis", "icepop", "sequence_mask")
"""Choices of `loss.normalize`, `loss.kl_type` and `loss.importance`; docs/algorithms.md has their formulas."""

LOGPROBS = ("kept", "raw")
"""Choices of `sampling.logprobs`."""


@dataclass
class SamplingConfig:
    """How rollouts are drawn. `max_new_tokens` bounds one assistant turn, `max_total_tokens` the conversation."""

    max_new_tokens: int = MISSING
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_tokens: int = 4096  # longer prompts are dropped and counted
    max_total_tokens: int = 8192
    logprobs: str = "kept"  # kept: of the distribution that sampled | raw: the model's own (temperature 1, every token)

    def __post_init__(self) -> None:
        at_least("sampling.temperature", self.temperature, 0.0)
        nucleus("sampling.top_p", self.top_p)
        choose("sampling.logprobs", self.logprobs, LOGPROBS)
        at_least("sampling.top_k", self.top_k, 0)
        for key in ("max_new_tokens", "max_prompt_tokens", "max_total_tokens"):
            at_least(f"sampling.{key}", getattr(self, key), 1)

    @property
    def cuts(self) -> bool:
        """Whether log-probabilities leave tokens out at all."""
        return self.logprobs == "kept" and (self.top_k > 0 or self.top_p < 1.0)


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
        at_least("filters.max_refills", self.max_refills, 0)
        share("filters.max_invalid_share", self.max_invalid_share)


@dataclass
class AdvantageConfig:
    """Equation 1: A = (r - baseline) / (std + eps)."""

    baseline: str = "mean"  # mean | leave_one_out
    scale: str = "std"  # std (population) | sample_std | none
    eps: float = 1.0e-6

    def __post_init__(self) -> None:
        choose("advantage.baseline", self.baseline, ("mean", "leave_one_out"))
        choose("advantage.scale", self.scale, ("std", "sample_std", "none"))
        at_least("advantage.eps", self.eps, 0.0)


@dataclass
class LossConfig:
    """The GRPO loss. `normalize` names the denominator of the token sum; docs/algorithms.md has every formula."""

    normalize: str = "batch_tokens"  # batch_tokens | group_tokens | sequence | constant
    constant: Optional[float] = None  # normalize constant: what the token sum is divided by
    kl: float = 0.0
    kl_type: str = "k3"  # k1 | k2 | k3, against the checkpoint entering the stage
    kl_in: str = "loss"  # loss: a term with a gradient | reward: subtracted from the advantage, without
    clip_low: Optional[float] = None  # PPO: the ratio to the recorded Sampler is clipped at 1 - clip_low
    clip_high: Optional[float] = None  # and at 1 + clip_high; None: no clipping, strictly on-policy
    dual_clip: Optional[float] = None  # with clip_low: where A < 0 the surrogate is at least this x A; None: no bound
    importance: str = "none"  # none | tis (clamp) | icepop (mask) | sequence_mask; Learner against Sampler
    importance_low: float = 0.5
    importance_high: float = 2.0
    max_masked_share: float = 0.5  # abort when importance masks more than this share of tokens or of sequences
    # Experts that the update uses: none: its own | learner: those of a pass of the Learner just before it
    # | sampler: those by which each token was sampled, which travel and are recorded with the rollout
    routing_replay: str = "none"

    def __post_init__(self) -> None:
        choose("loss.normalize", self.normalize, NORMALIZE)
        choose("loss.kl_type", self.kl_type, KL_TYPES)
        choose("loss.kl_in", self.kl_in, ("loss", "reward"))
        choose("loss.importance", self.importance, IMPORTANCE)
        at_least("loss.kl", self.kl, 0.0)
        above("loss.constant", self.constant, 0.0)
        if (self.normalize == "constant") != (self.constant is not None):
            raise UserError(
                "loss.constant: it goes with normalize constant, and only with it; Dr. GRPO divides by "
                "sampling.max_new_tokens x prompts_per_step x group_size"
            )
        if (self.clip_low is None) != (self.clip_high is None):
            raise UserError("loss.clip_low: it goes with loss.clip_high; set both (PPO: 0.2 and 0.2) or none")
        share("loss.clip_low", 0.0 if self.clip_low is None else self.clip_low)
        at_least("loss.clip_high", self.clip_high, 0.0)
        above("loss.dual_clip", self.dual_clip, 1.0)
        if self.dual_clip is not None and self.clip_low is None:
            raise UserError("loss.dual_clip: it bounds what loss.clip_low and clip_high leave free; set these too")
        if self.clip_low is not None and self.importance != "none":
            raise UserError(
                f"loss.clip_low: clipping already weighs by the ratio to the Sampler, and importance {self.importance} "
                "would weigh by it again; set one of them to none (null)"
            )
        interval("loss.importance_low", self.importance_low, "loss.importance_high", self.importance_high)
        share("loss.max_masked_share", self.max_masked_share)
        choose("loss.routing_replay", self.routing_replay, ROUTING_REPLAY)


@dataclass
class DistillConfig:
    """Equations 2 to 4. `kind` sampled is the paper's; docs/algorithms.md has every formula."""

    kind: str = "sampled"  # sampled | full_vocab (exact reverse KL per position) | topk (over the student's top k)
    top_k: int = 32  # kind topk: the student's most probable tokens; all others share one bucket
    advantage: str = "log_ratio"  # kind sampled: log_ratio (equation 2) | power (bounded by 1 / power_alpha)
    power_alpha: float = 1.0  # a_t = (p_teacher^alpha - p_student^alpha) / alpha; towards 0 it is the log-ratio
    domain_weights: dict[str, float] = field(default_factory=dict)  # share of each domain in the loss; none: equation 4
    importance_low: float = 0.5
    importance_high: float = 2.0
    clip_advantage: Optional[float] = None  # kind sampled: |a_t| bound; the paper has none
    max_masked_share: float = 0.5
    routing_replay: str = "none"  # as in loss

    def __post_init__(self) -> None:
        choose("distill.kind", self.kind, ("sampled", "full_vocab", "topk"))
        choose("distill.advantage", self.advantage, ("log_ratio", "power"))
        at_least("distill.top_k", self.top_k, 1)
        above("distill.power_alpha", self.power_alpha, 0.0)
        for domain, weight in self.domain_weights.items():
            above(f"distill.domain_weights.{domain}", weight, 0.0)
        interval("distill.importance_low", self.importance_low, "distill.importance_high", self.importance_high)
        above("distill.clip_advantage", self.clip_advantage, 0.0)
        share("distill.max_masked_share", self.max_masked_share)
        choose("distill.routing_replay", self.routing_replay, ROUTING_REPLAY)


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
    judge: Optional[JudgeConfig] = None  # of preference groups; None: the cascade's
    equivalence_judge: Optional[EquivalenceJudgeConfig] = None  # of long-context rows; None: the cascade's

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 1)
        at_least("save_every", self.save_every, 1)
        at_least("micro_batch_tokens", self.micro_batch_tokens, 1)


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
        choose("precision_export", self.precision_export, ("fp32", "bf16"))
        at_least("max_sequence_tokens", self.max_sequence_tokens, 2)


@dataclass
class RolloutStage(StageBase):
    """What grpo and mopd share. `record`: where rollouts come from or whether they are trained on."""

    prompts_per_step: int = MISSING  # over all ranks
    group_size: int = MISSING  # rollouts per prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    mode: str = "on_policy"  # on_policy | sample_only | train_only (from `rollouts`)
    rollouts: Optional[str] = None  # train_only: the stage folder whose recorded steps are trained on
    max_gap: Optional[float] = None  # nats, Learner against Sampler in the first step; None: see observe.first_step
    record_every: int = 10  # steps between recorded rollouts, 1 to train on them later; sample_only records every step

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mode", self.mode, ("on_policy", "sample_only", "train_only"))
        at_least("record_every", self.record_every, 1)
        at_least("group_size", self.group_size, 1)
        if self.sampling.temperature == 0.0:
            raise UserError(
                "sampling.temperature: 0 (greedy) has no log-probabilities to train on; use a value above 0"
            )
        if self.mode == "train_only" and not self.rollouts:
            raise UserError("rollouts: mode train_only needs the folder of a run's recorded rollouts")

    @property
    def routing_replay(self) -> str:
        """Whose experts the update uses; each kind of stage has the key beside its loss."""
        return "none"


@dataclass
class GrpoConfig(RolloutStage):
    """Group-relative policy optimisation, strictly on-policy (equation 1)."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("group_size", self.group_size, 2)

    @property
    def routing_replay(self) -> str:
        """Whose experts the update uses."""
        return self.loss.routing_replay


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

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, weights = self.distill.kind, self.distill.domain_weights
        if kind != "sampled" and self.sampling.cuts:
            raise UserError(
                f"distill.kind: {kind} compares whole vocabularies, and sampling.top_p or top_k cuts them; set "
                "top_p to 1 and top_k to 0, choose kind sampled, or sampling.logprobs: raw"
            )
        if kind != "sampled" and self.distill.advantage != "log_ratio":
            raise UserError(f"distill.advantage: power has no effect with kind {kind}; choose kind sampled")
        if self.filters.dynamic:
            raise UserError("filters.dynamic: distillation has no rewards that could differ; set it to false")
        if weights and set(weights) != set(self.data.domains):
            raise UserError(
                f"distill.domain_weights: {', '.join(sorted(weights))} are not the stage's domains "
                f"{', '.join(sorted(self.data.domains))}; give each domain a weight, or none"
            )

    @property
    def routing_replay(self) -> str:
        """Whose experts the update uses."""
        return self.distill.routing_replay


STAGE_KINDS: dict[str, type[StageBase]] = {"sft": SftConfig, "grpo": GrpoConfig, "mopd": MopdConfig}


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
    equivalence_judge: Optional[EquivalenceJudgeConfig] = None
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
