"""Writes the folder of a cascade that ran, with the package's own writers, for tests of what reads such folders."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

from nemo_cascade.cascade.artifacts import StageFolder, stage_folder, write_json
from nemo_cascade.cascade.gates import GateResult, to_json
from nemo_cascade.cascade.manifest import Entry, Manifest, write_manifest
from nemo_cascade.cascade.teachers import Choice
from nemo_cascade.cascade.teachers import to_json as teachers_json
from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.config.schema import DataConfig, GrpoConfig, HardwareConfig, OptimizerConfig, SamplingConfig, StageRun
from nemo_cascade.config.stage_run import write_stage_run
from nemo_cascade.observe.record import RunRecord, add_timing
from nemo_cascade.types import Group, Interval, Invalid, Message, Rollout, Scored, StageResult, Task, Transcript

STAGES = (  # name, kind, start, domains
    ("sft", "sft", "", ("math", "preference", "instruction_following")),
    ("rlhf_teacher", "grpo", "sft", ("preference",)),
    ("if_rl", "grpo", "sft", ("instruction_following",)),
    ("multi_domain_rl", "grpo", "if_rl", ("math", "mcqa")),
    ("mopd", "mopd", "multi_domain_rl", ("math", "preference", "instruction_following")),
    ("code_rl", "grpo", "mopd", ("code",)),
)
DOMAINS = (
    "instruction_following",
    "mcqa",
    "math",
    "preference",
    "long_context",
    "code",
    "swe_agentless",
    "swe_agentic",
)
SKILL = {  # stage -> domain -> probability of a right answer, where it differs from the stage before
    "sft:init": dict.fromkeys(DOMAINS, 0.05),
    "sft": dict.fromkeys(DOMAINS, 0.55),
    "rlhf_teacher": {"preference": 0.92},
    "if_rl": {"instruction_following": 0.9, "preference": 0.5},
    "multi_domain_rl": {"instruction_following": 0.7, "math": 0.85, "mcqa": 0.9},
    "mopd": {"instruction_following": 0.87, "preference": 0.85},
    "code_rl": {"code": 0.8},
}
HOSTILE = "<b>not markup</b> </script>"


def write_cascade(folder: Path, unfinished: bool = True) -> Path:
    """A cascade of six stages; the last one is running when `unfinished`. Returns its folder."""
    skills: dict[str, dict[str, float]] = {}
    entries = []
    for index, (name, kind, start, domains) in enumerate(STAGES):
        key = f"{index:064x}"[::-1]
        steps = 60
        source = "stage" if start else "hf"
        entries.append(
            Entry(name, kind, start or "base", key, f"{name}-{key[:8]}", domains, steps, source, start, None)
        )
        skills[name] = {**skills.get(start, {}), **SKILL[name]}
        running = unfinished and index == len(STAGES) - 1
        write_stage(folder, entries[-1], skills[name], running)
    write_manifest(Manifest("nano", 1, "conf/cascade/nano.yaml", (), tuple(entries), folder))
    return folder


def write_stage(cascade: Path, entry: Entry, skill: dict[str, float], running: bool) -> None:
    """One stage with everything a real one leaves."""
    folder = stage_folder(cascade, entry.name, entry.key)
    optimizer, data = OptimizerConfig(lr=3.0e-4), DataConfig(domains=dict.fromkeys(entry.domains, 1.0))
    sampling = SamplingConfig(max_new_tokens=48)
    config = GrpoConfig("grpo", entry.init, 60, data, optimizer, prompts_per_step=4, group_size=4, sampling=sampling)
    run = StageRun("nano", entry.name, entry.key, 1, "grpo", None, hardware=HardwareConfig(ranks_per_node=2))
    run.tokenizer, run.config = str(NANO_TOKENIZER), config
    write_stage_run(run, folder.path)
    record = RunRecord(folder.path, entry.name, 60)
    stream = random.Random(entry.name)
    for step in record.remaining(0):
        if running and step == 35:
            break
        progress = 1 - math.exp(-step / 18)
        if entry.kind == "sft":
            metrics = {
                "loss": 3.2 - 2.1 * progress + stream.gauss(0, 0.05),
                "accuracy": 0.3 + 0.5 * progress,
                "lr": 1e-3,
            }
        else:
            record.rollouts(
                step,
                [group(entry, index, stream, 0.4 + 0.5 * progress) for index in range(4)],
                [[0.5, -0.5, 0.0, None]] * 4,
            )
            metrics = {
                "reward": 0.45 + 0.4 * progress + stream.gauss(0, 0.05),
                "entropy": 0.9 - 0.5 * progress + stream.gauss(0, 0.02),
                "length": 14 + 4 * progress,
                "kl": 0.05 * progress + abs(stream.gauss(0, 0.002)),
                "gap_abs": 2e-6 + 1e-7 * stream.random(),
                "seconds/sampling": 1.4,
                "seconds/reward": 0.1 + 0.3 * stream.random(),
            }
        metrics |= {"grad_norm": 0.5 + stream.random(), "seconds/training": 0.8, "seconds/refit": 0.03}
        metrics |= {"seconds/training/forward": 0.3, "seconds/training/update": 0.8}  # inside training
        record.step(step, metrics)
    scores(folder.evaluation("final"), entry.name, skill)
    if entry.name == "sft":
        scores(folder.evaluation("init"), "init", SKILL["sft:init"])
    add_timing(folder.path, {"evaluation": 21.0})
    decisions(folder, entry)
    if not running:
        folder.finish(
            StageResult(
                entry.name, entry.kind, entry.key, "hf", hashlib.sha256(entry.name.encode()).hexdigest(), 60, 178.0
            )
        )


def decisions(folder: StageFolder, entry: Entry) -> None:
    """Teachers of the distillation, gates of one stage."""
    if entry.kind == "mopd":
        candidates = {"rlhf_teacher": Interval(0.92, 0.86, 0.97, 96), "sft": Interval(0.55, 0.45, 0.64, 96)}
        why = "best of 4 candidates on select tasks"
        choices = {
            "preference": Choice("rlhf_teacher", None, why, candidates),
            "instruction_following": Choice("if_rl", None, why, {"if_rl": Interval(0.9, 0.83, 0.96, 96)}),
            "math": Choice("multi_domain_rl", None, "pinned in teachers.pin", {}),
        }
        write_json(folder.teachers, teachers_json(choices))
    if entry.name == "multi_domain_rl":
        failed = GateResult(
            entry.name, "instruction_following", 0.0, "warn", False, "warn", -0.2, -0.29, -0.11, 96, "if_rl"
        )
        passed = GateResult(entry.name, "math", 0.05, "stop", True, "none", 0.3, 0.21, 0.39, 96, "if_rl")
        write_json(folder.gates, to_json([failed, passed]))


def scores(path: Path, checkpoint: str, skill: dict[str, float]) -> None:
    """An evaluation file: 160 report tasks in the domain's mode, 48 in the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for domain, chance in skill.items():
            own = "instruct" if domain == "swe_agentic" else "thinking"
            other = "thinking" if own == "instruct" else "instruct"
            for split, mode, count in (("select", own, 60), ("report", own, 160), ("report", other, 48)):
                for task in range(count):
                    difficulty = random.Random(f"{domain}{split}{mode}{task}").random()
                    right = difficulty < chance - (0.1 if mode == other else 0.0)
                    row = {
                        "domain": domain,
                        "split": split,
                        "mode": mode,
                        "task_id": f"{domain}-{task}",
                        "score": float(right),
                    }
                    file.write(json.dumps({**row, "valid": True, "checkpoint": checkpoint}) + "\n")


def group(entry: Entry, index: int, stream: random.Random, chance: float) -> Group:
    """Four rollouts of one task; one in twelve is invalid."""
    domain = entry.domains[index % len(entry.domains)]
    text = "<|im_start|>user\nWhat is 17 + 25? Think first.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    task = Task(f"{domain}-{index:012x}", domain, (Message("user", "What is 17 + 25?"),), thinking=True)
    rollouts = []
    for sample in range(4):
        right = stream.random() < chance
        words = HOSTILE if sample == 0 else "The answer is"
        answer = f"7 + 5 = 12, carry 1\n</think>\n{words} \\boxed{{{42 if right else 32}}}<|im_end|>"
        given, sampled = encode(text), encode(answer)
        logprobs = [-abs(stream.gauss(0, 0.7)) for _ in sampled]
        outcome = Scored(float(right), {"exact": float(right)}, "equal" if right else "32 is not 42")
        rollouts.append(
            Rollout(
                task=task,
                sample=sample,
                token_ids=(*given, *sampled),
                loss_mask=(0,) * len(given) + (1,) * len(sampled),
                logprobs=(0.0,) * len(given) + tuple(logprobs),
                versions=(-1,) * len(given) + (3,) * len(sampled),
                transcript=Transcript((Message("assistant", answer),)),
                outcome=Invalid("wall clock expired") if stream.random() < 0.08 else outcome,
            )
        )
    return Group(task, tuple(rollouts), (True,) * 4)


def encode(text: str) -> list[int]:
    """Token ids of the nano tokenizer."""
    from nemo_cascade.cascade.report_rollouts import open_tokenizer

    return list(open_tokenizer(NANO_TOKENIZER).encode(text, add_special_tokens=False).ids)
