"""The knobs of what a stage reads, how it is measured, and who judges. `schema.py` holds the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from nemo_cascade.config.bounds import above, at_least, choose, nucleus, share
from nemo_cascade.types import UserError


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

    def __post_init__(self) -> None:
        for key in ("flaw_rate", "thinking_share", "corpus_share", "judge_share"):
            share(f"data.{key}", getattr(self, key))
        for domain, rate in self.flaw_rates.items():
            share(f"data.flaw_rates.{domain}", rate)
        if self.corpus_share + self.judge_share > 1.0:
            raise UserError("data.corpus_share: together with data.judge_share it is above 1")


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

    def __post_init__(self) -> None:
        for key in ("select", "report", "other_mode"):
            at_least(f"evaluation.{key}", getattr(self, key), 0)
        at_least("evaluation.temperature", self.temperature, 0.0)
        nucleus("evaluation.top_p", self.top_p)
        at_least("evaluation.max_new_tokens", self.max_new_tokens, 1)


@dataclass
class JudgeAddress:
    """Where a judge is: `serve` a checkpoint on loopback, or call an OpenAI-compatible `url`."""

    serve: Optional[str] = None  # hf:PATH
    url: Optional[str] = None
    model: str = "judge"
    timeout_s: float = 60.0  # for one question with all its retries
    retries: int = 3

    @property
    def named(self) -> bool:
        """Whether there is a judge at all."""
        return bool(self.serve or self.url)

    def check_address(self, key: str) -> None:
        """Bounds; `key` is where the block stands in a stage or cascade file."""
        above(f"{key}.timeout_s", self.timeout_s, 0.0)
        at_least(f"{key}.retries", self.retries, 0)
        if self.serve and self.url:
            raise UserError(f"{key}.url: {key}.serve is set too, and one judge answers; set one of them to null")


@dataclass
class EquivalenceJudgeConfig(JudgeAddress):
    """The judge that says whether an answer gives the expected one (long context, section 4.6)."""

    def __post_init__(self) -> None:
        self.check_address("equivalence_judge")


@dataclass
class RepairJudgeConfig(JudgeAddress):
    """The judge that says whether a patch resolves its issue (agentless repair, section 4.8.1)."""

    def __post_init__(self) -> None:
        self.check_address("repair_judge")


@dataclass
class JudgeConfig(JudgeAddress):
    """The preference judge of a group's answers, with the terms that section 5.4 adds to its scores."""

    strategy: str = "all_pairs"  # all_pairs | circular
    swap: bool = False  # also judge each pair in the other order
    length_weight: float = 0.5  # w of the group-relative length terms, section 5.4
    conciseness_bonus: float = 0.5

    def __post_init__(self) -> None:
        self.check_address("judge")
        choose("judge.strategy", self.strategy, ("all_pairs", "circular"))
        at_least("judge.length_weight", self.length_weight, 0.0)
        at_least("judge.conciseness_bonus", self.conciseness_bonus, 0.0)
