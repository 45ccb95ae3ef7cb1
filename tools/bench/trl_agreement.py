"""Do our losses and their gradients agree with TRL's, on the same log-probabilities and through the model?

TRL's side is the real trainer's `_compute_loss`. On the same log-probabilities its model is a module whose only
parameter is the log-probabilities themselves, so that the gradient by them can be read.

TRL prints the surrogate (ratio times advantage), whose value on-policy is the mean advantage whatever the policy says;
ours, equation 1, is advantage times log-probability. Their gradients are equal, their values are not. TRL's `cispo`
is written like equation 1, so with it the values are compared too. By default TRL multiplies k3 by the ratio
(`use_bias_correction_kl`): on-policy its gradient is then the true one of the KL, as our k1's is, not k3's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.schema import LossConfig, OptimizerConfig
from nemo_cascade.data.packing import to_batch
from nemo_cascade.models import convert
from nemo_cascade.models.hf_folder import read_config
from tools.bench.layouts import read
from tools.bench.trl_peer import FOLDER, Prompts, as_sequences, nano_model, peer_trainer

HIGH = 1.3  # bound of the importance weight in the off-policy case
KL = 0.05
CLIP = 0.2


@dataclass(frozen=True)
class Formula:
    """One formula in both worlds. `values`: whether TRL prints the number that we print, or only its gradient."""

    name: str
    trl: Mapping[str, Any]
    ours: LossConfig
    off_policy: bool = False
    values: bool = False


@dataclass(frozen=True)
class Rollouts:
    """Made-up rollouts in TRL's layout: prompts padded left, completions right, all lengths different."""

    rows: int = 8
    group_size: int = 4
    vocabulary: int = 512
    seed: int = 5
    longest: tuple[int, int] = (7, 11)  # tokens of a prompt, of a completion
    inputs: dict[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        prompt, answer = self.longest
        prompts = [prompt - row % 4 for row in range(self.rows)]
        answers = [answer - row for row in range(self.rows)]
        prompt_mask = torch.stack([(torch.arange(prompt) >= prompt - size).long() for size in prompts])
        mask = torch.stack([(torch.arange(answer) < size).long() for size in answers])
        shape = (self.rows, answer)
        logprobs = -torch.rand(shape, generator=generator) * 4.0
        self.inputs.update(
            prompt_ids=torch.randint(16, self.vocabulary, (self.rows, prompt), generator=generator) * prompt_mask,
            prompt_mask=prompt_mask,
            completion_ids=torch.randint(16, self.vocabulary, shape, generator=generator) * mask,
            completion_mask=mask,
            advantages=torch.randn(self.rows, generator=generator),
            num_items_in_batch=mask.sum(),
            logprobs=logprobs,
            old_per_token_logps=logprobs + torch.randn(shape, generator=generator) * 0.4,
            ref_per_token_logps=logprobs + torch.randn(shape, generator=generator) * 0.4,
        )

    def for_formula(self, formula: Formula) -> dict[str, torch.Tensor]:
        """What TRL gets: old log-probabilities off-policy only, the reference's with a KL term only."""
        given = dict(self.inputs)
        given.pop("logprobs")
        if not formula.off_policy:
            given.pop("old_per_token_logps")
        if formula.ours.kl == 0.0:
            given.pop("ref_per_token_logps")
        return given


TOKENS, SEQUENCES = LossConfig(normalize="batch_tokens"), LossConfig(normalize="sequence")
CLIPPED = LossConfig(clip_low=CLIP, clip_high=CLIP)
CONSTANT = float(Rollouts.rows * Prompts.max_new_tokens)  # TRL: rows times the longest answer
K3 = {"beta": KL, "use_bias_correction_kl": False}  # TRL's default multiplies k3 by the ratio; K1 is that
K1 = {"beta": KL, "use_bias_correction_kl": True}
CISPO = {"loss_type": "cispo", "epsilon_high": 5.0}
FORMULAS = (
    Formula("cispo, tokens of the batch", CISPO, TOKENS, values=True),
    Formula("dapo, tokens of the batch", {"loss_type": "dapo"}, TOKENS),
    Formula("bnpo, tokens of the batch", {"loss_type": "bnpo"}, TOKENS),
    Formula("grpo, mean over sequences", {"loss_type": "grpo"}, SEQUENCES),
    Formula("cispo with k3", CISPO | K3, LossConfig(kl=KL, kl_type="k3"), values=True),
    Formula("grpo with k3", {"loss_type": "grpo"} | K3, LossConfig(normalize="sequence", kl=KL, kl_type="k3")),
    Formula("dapo with k3 times ratio, ours k1", {"loss_type": "dapo"} | K1, LossConfig(kl=KL, kl_type="k1")),
    Formula("cispo off-policy, ours tis", {"loss_type": "cispo", "epsilon_high": HIGH},
            LossConfig(importance="tis", importance_low=1e-6, importance_high=HIGH), off_policy=True, values=True),
    Formula("dapo off-policy, clipped", {"loss_type": "dapo", "epsilon": CLIP}, CLIPPED, True, True),
    Formula("grpo off-policy, clipped", {"loss_type": "grpo", "epsilon": CLIP},
            replace(CLIPPED, normalize="sequence"), True, True),
    Formula("dr_grpo, a constant", {"loss_type": "dr_grpo"}, LossConfig(normalize="constant", constant=CONSTANT)),
)  # fmt: skip


class LeafPolicy(torch.nn.Module):
    """A policy whose log-probabilities of the completions [B, C] are its parameter, called as TRL calls a model."""

    def __init__(self, logprobs_B_C: torch.Tensor) -> None:
        super().__init__()
        self.logprobs = torch.nn.Parameter(logprobs_B_C.clone())

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The log-probability of every token given those before it; those of the prompt are never read."""
        before = self.logprobs.new_zeros(input_ids.shape[0], input_ids.shape[1] - self.logprobs.shape[1])
        logprobs = torch.cat([before, self.logprobs], dim=1)
        return SimpleNamespace(log_probs=logprobs, entropy=torch.zeros_like(logprobs))


@dataclass(frozen=True)
class Difference:
    """Relative differences of one formula: of the loss (None where the values are not the same number) and of the
    gradient, the latter as the largest difference over the largest entry.
    """

    formula: str
    loss: float | None
    gradient: float


def our_loss(formula: Formula, rollouts: Rollouts) -> tuple[float, torch.Tensor]:
    """Our loss and its gradient [B, C] by the log-probabilities; 0 where TRL has padding."""
    sequences = as_sequences(rollouts.for_formula(formula), rollouts.group_size)
    batch = to_batch(sequences)
    leaf = rollouts.inputs["logprobs"].clone().requires_grad_()
    trained_N = batch.loss_mask_T.nonzero()[:, 0]
    logprobs_T = torch.zeros_like(batch.loss_mask_T).index_copy(
        0, trained_N, leaf[rollouts.inputs["completion_mask"].bool()]
    )
    objective = policy_gradient(formula.ours)
    loss, _ = objective.loss(logprobs_T, batch, objective.denominators(sequences))
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


def their_loss(formula: Formula, rollouts: Rollouts, output: str) -> tuple[float, torch.Tensor]:
    """TRL's loss and its gradient [B, C] by the same log-probabilities."""
    trainer = peer_trainer(Prompts(), output, max_steps=1, **formula.trl)
    leaf = LeafPolicy(rollouts.inputs["logprobs"])
    trainer.model.train()
    loss = trainer._compute_loss(leaf, rollouts.for_formula(formula))
    loss.backward()
    assert leaf.logprobs.grad is not None
    return float(loss.detach()), leaf.logprobs.grad


def relative(ours: float, theirs: float) -> float:
    """Of two numbers that are not 0."""
    return abs(ours - theirs) / abs(theirs)


def on_same_logprobs(formula: Formula) -> Difference:
    """One formula on made-up log-probabilities."""
    rollouts = Rollouts()
    with tempfile.TemporaryDirectory() as output:
        theirs, their_gradient = their_loss(formula, rollouts, output)
    ours, our_gradient = our_loss(formula, rollouts)
    gap = (our_gradient - their_gradient).abs().max() / their_gradient.abs().max()
    return Difference(formula.name, relative(ours, theirs) if formula.values else None, float(gap))


def through_the_model() -> Difference:
    """The first formula on the nano base: loss, and the gradient of every weight relative to its tensor's largest."""
    formula = FORMULAS[0]
    rollouts = Rollouts(longest=(23, 41))
    inputs = rollouts.for_formula(formula)
    learner = MegatronLearner(
        read_config(FOLDER), LearnerSettings(OptimizerConfig(lr=0.0, clip_grad=0.0), 1), init_folder=str(FOLDER)
    )
    ours = learner.update(as_sequences(inputs, rollouts.group_size), policy_gradient(formula.ours))["loss"]
    zeros = {name: torch.zeros_like(weight) for name, weight in learner.weights() if name.endswith("correction_bias")}
    with tempfile.TemporaryDirectory() as output:
        trainer = peer_trainer(Prompts(), output, max_steps=1, **formula.trl)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        # Our gradients as if they were weights: transformers gives them the names and shapes of its parameters.
        folder = Path(output) / "gradients"
        named = iter((read(learner) | zeros).items())
        convert.save_folder(named, learner.config, str(folder), "fp32", None)
        gradients = dict(nano_model((), folder).named_parameters())
    gaps = [
        float((gradients[name].detach() - weight.grad).abs().max() / weight.grad.abs().max())
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    ]
    return Difference("through the model: cispo", relative(ours, float(loss.detach())), max(gaps))
