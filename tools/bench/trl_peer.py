"""TRL's own GRPOTrainer on the nano model, with everything off that is not the algorithm, and its inputs as ours.

Needs `trl` (requirements/bench.txt; `make bench` installs it). Nothing of TRL is written again here: whoever compares
calls the trainer's `train` or its `_compute_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, NemotronHForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from nemo_cascade import domains
from nemo_cascade.config.paths import hf_folder
from nemo_cascade.config.schema import OptimizerConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.types import Sequence as TokenSequence
from nemo_cascade.types import Task, Transcript

FOLDER = hf_folder("hf:nano")
OPTIMIZER = OptimizerConfig(lr=1e-6)  # moves the weights, and so little that every round does the same work


@dataclass(frozen=True)
class Prompts:
    """The same prompts for both sides, and the reward of their domain.

    `to_the_limit`: no token ends an answer, so that all have exactly `max_new_tokens` on both sides.
    """

    count: int = 8
    group_size: int = 8
    max_new_tokens: int = 48
    to_the_limit: bool = False
    domain_name: str = "instruction_following"
    chat: ChatTokenizer = field(default_factory=lambda: ChatTokenizer(FOLDER))

    def __post_init__(self) -> None:
        if self.to_the_limit:
            self.chat.stop_ids = ()

    @property
    def domain(self) -> Any:
        """The nano domain, without services."""
        return domains.load(self.domain_name, domains.Services(), None)

    @property
    def tasks(self) -> list[Task]:
        """The tasks of every step."""
        return self.domain.tasks("train", self.count, seed=1)

    def rows(self) -> Dataset:
        """TRL's dataset: the rendered prompts, which its tokenizer turns into the very ids that ours has."""
        ids = [self.chat.prompt_ids(task) for task in self.tasks]
        texts = [self.chat.decode(prompt) for prompt in ids]
        assert AutoTokenizer.from_pretrained(FOLDER)(text=texts)["input_ids"] == ids, "the tokenizers disagree"
        return Dataset.from_dict({"prompt": texts, "index": list(range(self.count))})

    def reward(self) -> Callable[..., list[float]]:
        """The domain's own reward as TRL calls it."""
        domain, tasks, stops = self.domain, self.tasks, self.chat.stop_ids

        def reward(completion_ids: Sequence[list[int]], index: Sequence[int], **_: Any) -> list[float]:
            found = []
            for ids, number in zip(completion_ids, index, strict=True):
                task = tasks[number]
                message = self.chat.parse_assistant(ids, task.thinking, task.tools)
                found.append(domain.score(task, Transcript((message,), ids[-1] not in stops)).reward)
            return found

        return reward


def nano_model(stops: Sequence[int], folder: Path = FOLDER) -> NemotronHForCausalLM:
    """The shipped base (or other weights of its shape) in transformers, fp32, stopping where ours stops."""
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = list(stops)
    return model


def peer_trainer(
    prompts: Prompts,
    output: str,
    callbacks: Sequence[TrainerCallback] = (),
    model: NemotronHForCausalLM | None = None,
    **changes: Any,
) -> GRPOTrainer:
    """A GRPOTrainer whose step does what ours does: one update on every rollout of the batch, clipping, AdamW.

    Gradient checkpointing, on by default in TRL, is off: it would make the peer slower.
    """
    rollouts = prompts.count * prompts.group_size
    given: dict[str, Any] = {
        "output_dir": output, "per_device_train_batch_size": rollouts, "gradient_accumulation_steps": 1,
        "num_generations": prompts.group_size, "max_completion_length": prompts.max_new_tokens, "temperature": 1.0,
        "beta": 0.0, "loss_type": "dapo", "shuffle_dataset": False, "gradient_checkpointing": False, "bf16": False,
        "use_cpu": True, "learning_rate": OPTIMIZER.lr, "lr_scheduler_type": "constant",
        "adam_beta1": OPTIMIZER.betas[0], "adam_beta2": OPTIMIZER.betas[1], "weight_decay": OPTIMIZER.weight_decay,
        "max_grad_norm": OPTIMIZER.clip_grad, "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "seed": 1, **changes,
    }  # fmt: skip
    if prompts.to_the_limit:
        given["generation_kwargs"] = {"min_new_tokens": prompts.max_new_tokens}
    trainer = GRPOTrainer(
        model=model if model is not None else nano_model(prompts.chat.stop_ids),
        reward_funcs=prompts.reward(),
        args=GRPOConfig(**given),
        train_dataset=prompts.rows(),
        processing_class=AutoTokenizer.from_pretrained(FOLDER),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it; `_compute_loss` alone reads it too
    return trainer


def as_sequences(inputs: Mapping[str, torch.Tensor], group_size: int) -> list[TokenSequence]:
    """What TRL hands to `_compute_loss`, padding taken off, as the sequences that our Learner takes.

    TRL's `old_per_token_logps` are our Sampler's, its `ref_per_token_logps` our reference's.
    """
    sequences = []
    for row in range(inputs["prompt_ids"].shape[0]):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        kept = inputs["completion_mask"][row].bool()
        answer = inputs["completion_ids"][row][kept].tolist()
        before = (0.0,) * len(prompt)
        fields = {
            ours: (*before, *inputs[theirs][row][kept].tolist())
            for ours, theirs in (
                ("sampler_logprobs", "old_per_token_logps"),
                ("reference_logprobs", "ref_per_token_logps"),
            )
            if inputs.get(theirs) is not None
        }
        sequences.append(
            TokenSequence(
                token_ids=(*prompt, *answer),
                loss_mask=(0,) * len(prompt) + (1,) * len(answer),
                advantages=before + (float(inputs["advantages"][row]),) * len(answer),
                group=row // group_size,
                **fields,
            )
        )
    return sequences
