"""A cascade of five stages in a temporary folder, for tests that run it with `standin_stage`."""

from __future__ import annotations

from pathlib import Path

DOMAINS = "[instruction_following, math, code]"
ROLLOUTS = (
    "prompts_per_step: 2\ngroup_size: 2\nsampling: {max_new_tokens: 8, max_prompt_tokens: 32, max_total_tokens: 64}\n"
)

STAGES = {
    "sft": "kind: sft\ninit: base\nnum_steps: 4\nsave_every: 2\ntokens_per_step: 1024\n"
    "max_sequence_tokens: 64\n"
    "data: {domains: {math: 1, code: 1, instruction_following: 1}}\noptimizer: {lr: 0.02}\n",
    "if_rl": "kind: grpo\ninit: sft\nnum_steps: 6\nsave_every: 2\n"
    + ROLLOUTS
    + "data: {domains: {instruction_following: 1}}\n"
    "optimizer: {lr: 0.05}\n",
    "math_rl": "kind: grpo\ninit: if_rl\nnum_steps: 5\nsave_every: 2\n"
    + ROLLOUTS
    + "data: {domains: {math: 1}}\noptimizer: {lr: 0.08}\n",
    "side": "kind: grpo\ninit: sft\nnum_steps: 3\nsave_every: 2\n"
    + ROLLOUTS
    + "data: {domains: {code: 1}}\noptimizer: {lr: 0.1}\n",
    "mopd": "kind: mopd\ninit: math_rl\nnum_steps: 4\nsave_every: 2\n" + ROLLOUTS + "optimizer: {lr: 0.01}\n"
    "data: {domains: {math: 1, code: 1, instruction_following: 1}}\n"
    "teachers: {candidates: [sft, side, if_rl, math_rl]}\n",
}


def write_cascade(folder: Path, extra: str = "") -> Path:
    """Write the cascade and its stage files; returns the cascade file. `extra` is appended to it."""
    for name, text in STAGES.items():
        (folder / f"{name}.yaml").write_text(text)
    path = folder / "small.yaml"
    path.write_text(
        f"name: small\nmodel: nano\nbase: random\nhardware: cpu\noutput: {folder / 'runs'}\n"
        "stages: [sft, if_rl, math_rl, side, mopd]\n"
        f"evaluation: {{select: 40, report: 80, other_mode: 20, domains: {DOMAINS}}}\n{extra}"
    )
    return path
