"""The knobs of what a stage reads, how it is measured, and who judges. `schema.py` holds the rest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from omegaconf import MISSING

from nemo_cascade.config.bounds import above, at_least, choose, nucleus, share, web_address
from nemo_cascade.types import UserError

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Names of environment variables; capitals only, so that a key in the place of its name is told from one."""


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
    """Where a judge is: `serve` a checkpoint on loopback, or call an OpenAI-compatible `url` (with or without `/v1`).

    `api_key_env` is the NAME of an environment variable that holds the key. The key itself is in no config: these are
    written into stage folders, hashed into keys and read aloud in errors.
    """

    KEY: ClassVar[str] = "judge"

    serve: Optional[str] = None  # hf:PATH
    url: Optional[str] = None
    model: str = "judge"
    timeout_s: float = 60.0  # for one question with all its retries
    retries: int = 3
    api_key_env: Optional[str] = None

    @property
    def named(self) -> bool:
        """Whether there is a judge at all."""
        return bool(self.serve or self.url)

    def __post_init__(self) -> None:
        above(f"{self.KEY}.timeout_s", self.timeout_s, 0.0)
        at_least(f"{self.KEY}.retries", self.retries, 0)
        if self.serve and self.url:
            raise UserError(
                f"{self.KEY}.url: {self.KEY}.serve is set too, and one judge answers; set one of them to null"
            )
        if self.url:
            instead = f" and name an environment variable in {self.KEY}.api_key_env"
            web_address(f"{self.KEY}.url", self.url, instead)
        if self.api_key_env is not None and not VARIABLE.fullmatch(self.api_key_env):
            raise UserError(  # the value is not repeated: it may be a key
                f"{self.KEY}.api_key_env: is no name of an environment variable in capitals, such as JUDGE_API_KEY; "
                "write the variable's name here and the key into the variable"
            )

    def api_key(self) -> str:
        """The key, from the environment; "" where the judge asks for none."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(f"{self.KEY}.api_key_env: environment variable {self.api_key_env} is not set; export it")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(
                f"{self.KEY}.api_key_env: environment variable {self.api_key_env} holds a space or a letter that no "
                "HTTP header can carry; is it the key alone?"
            )
        return key


@dataclass
class EquivalenceJudgeConfig(JudgeAddress):
    """The judge that says whether an answer gives the expected one (long context, section 4.6; math on request)."""

    KEY: ClassVar[str] = "equivalence_judge"


@dataclass
class RepairJudgeConfig(JudgeAddress):
    """The judge that says whether a patch resolves its issue (agentless repair, section 4.8.1)."""

    KEY: ClassVar[str] = "repair_judge"


@dataclass
class JudgeConfig(JudgeAddress):
    """The preference judge of a group's answers, with the terms that section 5.4 adds to its scores."""

    native_roles: bool = True  # roles response_1 and response_2, as GenRM was trained; false: one plain user message
    strategy: str = "all_pairs"  # all_pairs | circular
    swap: bool = False  # also judge each pair in the other order
    temperature: Optional[float] = None  # null: 0.6 as published, and 0 for generated tasks
    max_tokens: Optional[int] = None  # of a verdict; null: 16384 as published, and 32 for generated tasks
    parse_retries: int = 3  # of an answer without scores; none at temperature 0, where it would be the same
    on_unreadable: str = "drop"  # drop the match | neutral: scores 3 and 3, ranking 3.5
    min_match_share: float = 0.5  # of an answer's matches that must be decided, rounded up; below it is Invalid
    length_weight: float = 0.5  # w of the group-relative length terms, section 5.4
    conciseness_bonus: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("judge.strategy", self.strategy, ("all_pairs", "circular"))
        choose("judge.on_unreadable", self.on_unreadable, ("drop", "neutral"))
        if self.temperature is not None:
            at_least("judge.temperature", self.temperature, 0.0)
        if self.max_tokens is not None:
            at_least("judge.max_tokens", self.max_tokens, 1)
        at_least("judge.parse_retries", self.parse_retries, 0)
        share("judge.min_match_share", self.min_match_share)
        at_least("judge.length_weight", self.length_weight, 0.0)
        at_least("judge.conciseness_bonus", self.conciseness_bonus, 0.0)
