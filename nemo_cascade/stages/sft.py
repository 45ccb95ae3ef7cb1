"""Supervised fine-tuning (section 3, Table 7): packed conversations, cross-entropy on the chosen turns.

Pre-training of the nano base is the same loop with `data.full_loss`.
"""

from __future__ import annotations

from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import SftConfig
from nemo_cascade.data.conversations import ConversationStream
from nemo_cascade.observe.record import RunRecord
from nemo_cascade.protocols import Learner
from nemo_cascade.stages.checkpoints import Checkpoints


def train(
    cfg: SftConfig, conversations: ConversationStream, learner: Learner, record: RunRecord, checkpoints: Checkpoints
) -> None:
    """Run the remaining steps. Step k always sees the same conversations, so a resumed run is the uninterrupted one."""
    objective = cross_entropy(cfg.reduction)
    for step in record.remaining(checkpoints.resume(learner)):
        sequences_B = conversations.take(step)
        with record.timer("training"):
            metrics = learner.update(sequences_B, objective)
        record.step(step, metrics)
        checkpoints.after(step + 1, learner)
