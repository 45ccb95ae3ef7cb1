"""The reward benchmark measures what it says: rewards are checked while they are timed."""

from __future__ import annotations

import pytest

from nemo_cascade.reward.sandbox import Sandbox
from tools.bench import rewards


def test_a_batch_gets_the_rewards_it_must_in_any_order() -> None:
    wanted = {index: rewards.submission(index)[2] for index in (0, 1, 2, 3, 4, 255)}
    assert wanted == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 0.0, 255: 0.0}
    first, seconds = rewards.score_all(list(wanted))
    again, _ = rewards.score_all(list(reversed(wanted)))
    assert first == again == wanted
    assert seconds > 0


def test_each_way_of_running_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "SUBMISSIONS_A_ROUND", 1)
    monkeypatch.setattr(rewards, "OTHERS_A_ROUND", 2)
    with Sandbox(spare=0) as sandbox:
        assert rewards.ours(sandbox) > 0
        assert rewards.a_process_each(()) > 0
        assert rewards.a_process_each(rewards.bubblewrap_prefix()) > 0
        monkeypatch.setattr(rewards, "SOURCE", "print(0)")
        with pytest.raises(SystemExit, match="other answers"):
            rewards.ours(sandbox)
        with pytest.raises(SystemExit, match="another answer"):
            rewards.a_process_each(())
