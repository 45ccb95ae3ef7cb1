"""What bf16 and FP8 do at nano size, measured on a CPU before GPU hours are bought.

    python -m tools.bench.fp8_effect [--sft-steps 100] [--grpo-steps 20] [--json FILE] [--write] [--out FOLDER]

One table: log-probability drift and routing flips of the shipped base on answers that it sampled itself, the loss of a
short SFT run (same data, same seed, same start) and the reward of a short GRPO run from one SFT checkpoint, each
profile next to fp32. FP8 is the emulation of models/fp8_emulation.py, once with the two layers at each end in bf16 as
the profiles say and once with every layer in FP8, because nano has only six. `--write` puts the table into
docs/precision.md. Runs that are done in `--out` are not run again; 0 steps leave a run out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.learner import parallel
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip
from megatron.core.transformer.moe.router import TopKRouter

from nemo_cascade import domains
from nemo_cascade.cascade.artifacts import StageFolder, read_lines
from nemo_cascade.cascade.manifest import read_manifest
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.paths import hf_folder
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.types import Request, SamplingParams
from nemo_cascade.types import Sequence as TokenSequence
from tools.precision_table import PAGE, replace_part

BASE = "hf:nano"
PROMPT_DOMAINS = ("instruction_following", "mcqa", "tool_use", "structured_output", "math", "long_context", "code")
TAIL = 5  # steps whose mean stands for the end of a run
MEASURED = "measured"  # the part of docs/precision.md that --write replaces


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    precision: str
    bf16_layers: int = 2
    seed: int = 1


CASES = (
    Case("fp32", "fp32"),
    Case("bf16", "bf16"),
    Case("hopper_fp8_emulated", "hopper_fp8_emulated"),
    Case("hopper_fp8_emulated, all layers", "hopper_fp8_emulated", 0),
    Case("blackwell_mxfp8_emulated", "blackwell_mxfp8_emulated"),
    Case("blackwell_mxfp8_emulated, all layers", "blackwell_mxfp8_emulated", 0),
    Case("fp32, another seed", "fp32", seed=2),
)


@dataclass(frozen=True)
class Drift:
    """Log-probabilities (nats, of the sampled tokens) and expert choices against fp32."""

    mean: float
    p99: float
    max: float
    flips: float  # share of the (token, expert) choices of fp32 that are others here


def sampled_sequences(per_domain: int, seed: int) -> list[TokenSequence]:
    """Prompts of the nano tasks with one answer each, drawn from the base by the fp32 sampler."""
    folder = hf_folder(BASE)
    chat = ChatTokenizer(folder)
    prompts = [
        tuple(chat.prompt_ids(task))
        for name in PROMPT_DOMAINS
        for task in domains.load(name, domains.Services(), None).tasks("select", per_domain, seed)
    ]
    sampler = LocalSampler.from_folder(folder)
    requests = [Request(prompt, seed * 1000 + index, 48) for index, prompt in enumerate(prompts)]
    answers = dict(sampler.sample(requests, SamplingParams(48, stop_ids=chat.stop_ids)))
    return [
        TokenSequence(prompt + answers[index].token_ids, (0,) * len(prompt) + (1,) * len(answers[index].token_ids))
        for index, prompt in enumerate(prompts)
    ]


@contextmanager
def choices_of(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the context: the experts chosen, one boolean [tokens, experts] per call of a router."""
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, args, output: seen.append(output[1].clone()))
        for module in model.modules()
        if isinstance(module, TopKRouter)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scored(case: Case, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities of the sampled tokens [N], choices [calls, tokens, experts]) of the base in a precision."""
    hardware = HardwareConfig(precision=case.precision, fp8_bf16_layers=case.bf16_layers)
    settings = LearnerSettings(OptimizerConfig(lr=1e-6), 1, micro_batch_tokens=1 << 20, hardware=hardware)
    folder = str(hf_folder(BASE))
    learner = MegatronLearner(read_config(folder), settings, init_folder=folder)
    with choices_of(learner.model) as choices:
        rows = learner.logprobs(sequences)
    kept = [
        value
        for row, sequence in zip(rows, sequences, strict=True)
        for value, trained in zip(row, sequence.loss_mask, strict=True)
        if trained
    ]
    tokens = sum(len(sequence.token_ids) for sequence in sequences)  # FP8 fills the row up after them
    return torch.tensor(kept), torch.stack([choice.reshape(-1, choice.shape[-1])[:tokens] for choice in choices])


def drifts(per_domain: int, file: Path) -> dict[str, Drift]:
    """Every profile against fp32 on the same tokens; kept in a file, so that it is measured once."""
    if file.is_file():
        return {name: Drift(**values) for name, values in json.loads(file.read_text()).items()}
    parallel.start(seed=1)
    sequences = sampled_sequences(per_domain, seed=7)
    exact, chosen = scored(CASES[0], sequences)
    found = {}
    for case in CASES:
        if case.seed != 1:
            continue
        values, choices = scored(case, sequences)
        gap = (values - exact).abs()
        flips = float((chosen & ~choices).sum() / chosen.sum())
        found[case.name] = Drift(float(gap.mean()), float(gap.quantile(0.99)), float(gap.max()), flips)
        sys.stderr.write(f"{len(exact)} tokens, {case.name}: {found[case.name]}\n")
    parallel.stop()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({name: asdict(drift) for name, drift in found.items()}, indent=1) + "\n")
    return found


CASCADE = """name: {name}
model: nano
base: {base}
hardware: cpu1
output: {output}
stages: [{stage}]
evaluation: {{select: 8, report: 8, domains: [mcqa], max_new_tokens: 8}}
"""


def train(case: Case, stage: str, base: str, changes: Sequence[str], output: Path) -> StageFolder:
    """Run one nano stage by the ordinary runner in a precision; what is done is not run again."""
    name = f"{case.precision}-{case.bf16_layers}-{case.seed}-{Path(stage).name}"
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.yaml"
    file.write_text(CASCADE.format(name=name, base=base, output=output.resolve(), stage=stage))
    short = f"stages.{Path(stage).name}"
    overrides = [
        f"seed={case.seed}", f"hardware.precision={case.precision}", f"hardware.fp8_bf16_layers={case.bf16_layers}",
        f"{short}.init=base", *(f"{short}.{change}" for change in changes),
    ]  # fmt: skip
    folder = run(load_cascade(str(file), overrides), Options(), lambda line: sys.stderr.write(f"{name}: {line}\n"))
    return read_manifest(folder).folders[Path(stage).name]


def curve(folder: StageFolder, key: str) -> list[float]:
    """One metric of every step."""
    return [float(line[key]) for line in read_lines(folder.metrics)]


def measure(given: argparse.Namespace) -> list[dict[str, object]]:
    """All lines of the table. GRPO starts from the fp32 SFT run in every precision."""
    found = drifts(given.per_domain, given.out / f"drift-{given.per_domain}.json")
    sft = (f"num_steps={given.sft_steps}", f"tokens_per_step={given.sft_tokens}")
    grpo = (f"num_steps={given.grpo_steps}", "gates=[]")
    start = BASE
    if given.sft_steps:
        start = f"hf:{train(CASES[0], 'nano/sft', BASE, sft, given.out).hf.resolve()}"
    lines: list[dict[str, object]] = []
    for case in CASES:
        drift = found.get(case.name)
        line: dict[str, object] = {"case": case.name, "drift": asdict(drift) if drift is not None else None}
        if given.sft_steps:
            line["sft_loss"] = curve(train(case, "nano/sft", BASE, sft, given.out), "loss")
        if given.grpo_steps:
            rl = train(case, "nano/if_rl", start, grpo, given.out)
            line |= {"reward": curve(rl, "reward"), "sampler_gap": statistics.fmean(curve(rl, "gap_abs"))}
        if len(line) > 2 or drift is not None:
            lines.append(line)
    return lines


HEAD = (
    "profile", "drift mean", "p99", "max", "routing flips", "SFT loss, step 1", "middle", f"last {TAIL}",
    "max distance to fp32", f"GRPO reward, first {TAIL}", f"last {TAIL}", "sampler gap",
)  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as Markdown; `-` where nothing was run."""
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for line in lines:
        cells = [line["case"], *["-"] * (len(HEAD) - 1)]
        if drift := line["drift"]:
            cells[1:5] = [*(f"{drift[key]:.4f}" for key in ("mean", "p99", "max")), f"{drift['flips']:.2%}"]
        if losses := line.get("sft_loss"):
            apart = max(abs(a - b) for a, b in zip(losses, lines[0]["sft_loss"], strict=True))
            ends = (losses[0], losses[len(losses) // 2], statistics.fmean(losses[-TAIL:]), apart)
            cells[5:9] = [f"{value:.4f}" for value in ends]
        if rewards := line.get("reward"):
            ends = (statistics.fmean(rewards[:TAIL]), statistics.fmean(rewards[-TAIL:]))
            cells[9:] = [*(f"{value:.3f}" for value in ends), f"{line['sampler_gap']:.4f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--sft-tokens", type=int, default=2048, help="tokens per SFT step")
    parser.add_argument("--grpo-steps", type=int, default=20)
    parser.add_argument("--per-domain", type=int, default=12, help="prompts per domain for drift and flips")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_effect"))
    parser.add_argument("--json", type=Path, help="every number, the curves included")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = measure(given)
    text = table(lines)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=1) + "\n")
    if given.write:
        sizes = f"--sft-steps {given.sft_steps} --sft-tokens {given.sft_tokens} --grpo-steps {given.grpo_steps}"
        command = f"python -m tools.bench.fp8_effect {sizes} --per-domain {given.per_domain} --write"
        replace_part(MEASURED, f"Printed by `{command}`:\n\n{text}")


if __name__ == "__main__":
    main()
