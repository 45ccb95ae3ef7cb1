"""One GRPO step by hand: tasks -> rollouts -> rewards -> advantages -> loss -> update -> refit. About 20 seconds.

python examples/01_one_grpo_step.py
"""

from nemo_cascade.algorithms.advantage import group_relative
from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.paths import NANO_TOKENIZER, hf_folder
from nemo_cascade.config.schema import AdvantageConfig, LossConfig, OptimizerConfig, SamplingConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.domains import load
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.refit.memory import MemoryRefit
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.stages.sequences import as_sequences


def main() -> None:
    """Print what crosses each arrow."""
    base = hf_folder("hf:nano")
    config = NemotronHConfig.preset("nano")
    chat = ChatTokenizer(NANO_TOKENIZER)
    domain = load("instruction_following")

    learner = MegatronLearner(config, LearnerSettings(OptimizerConfig(lr=3e-4), num_steps=1), str(base))
    sampler = LocalSampler(config)
    refit = MemoryRefit()
    print("refit, version 0:", refit.refit(learner, sampler, version=0)[:16])

    tasks_P = domain.tasks("train", count=4, seed=7)
    print("prompt:", tasks_P[0].messages[-1].content)
    print("as the model sees it:", repr(chat.decode(chat.prompt_ids(tasks_P[0]))))

    collector = Collector({domain.name: domain}, sampler, chat, SamplingConfig(max_new_tokens=48))
    collected = collector.collect(lambda count, attempt: tasks_P[:count], prompts=4, group_size=8, seed=1, step=0)
    for rollout in collected.groups[0].rollouts[:3]:
        print(f"  reward {rollout.reward:.0f}  {rollout.transcript.final.content!r}  ({rollout.outcome.reason})")

    advantages_P_G = group_relative(collected.groups, AdvantageConfig())
    print("advantages of the first group:", [round(value, 2) for value in advantages_P_G[0]])

    sequences = as_sequences(collected.groups, advantages_P_G)
    metrics = learner.update(sequences, policy_gradient(LossConfig()))
    for name in ("loss", "grad_norm", "ratio", "gap_abs", "trained_tokens"):
        print(f"{name}: {metrics[name]:.6f}")
    print("refit, version 1:", refit.refit(learner, sampler, version=1)[:16])
    collector.close()


if __name__ == "__main__":
    main()
