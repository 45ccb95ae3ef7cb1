"""Sampling without training, training without sampling, and the places a stage can start from: through the launch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.models.hf_folder import content_sha256
from nemo_cascade.observe.record import read_metrics
from nemo_cascade.observe.rollouts import experts_file, read_groups, recorded_steps
from nemo_cascade.types import NO_CHOICE, Group, UserError

pytestmark = pytest.mark.slow
DOMAIN = Path(__file__).with_name("vowels.py")
COMMON = (
    f'prompts_per_step: 2\ngroup_size: 4\ndata: {{domains: {{"{DOMAIN}:Vowels": 1}}}}\n'
    "sampling: {max_new_tokens: 8, max_prompt_tokens: 64, max_total_tokens: 96}\noptimizer: {lr: 3.0e-3}\n"
)


def cascade(folder: Path, name: str, stages: dict[str, str], *overrides: str) -> dict[str, StageFolder]:
    """Run the stages, each given by the keys it has beside the common ones, or whole; returns their folders."""
    for stage, keys in stages.items():
        kind = "mopd" if "distill:" in keys else "grpo"
        whole = keys.startswith("kind: ")
        (folder / f"{stage}.yaml").write_text(keys if whole else f"kind: {kind}\n{COMMON}{keys}")
    (folder / f"{name}.yaml").write_text(
        f"name: {name}\nmodel: nano\nbase: random\nhardware: cpu1\nseed: 5\noutput: {folder / 'runs'}\n"
        f"stages: [{', '.join(stages)}]\nevaluation: {{select: 0, report: 0}}\n"
    )
    place = run(load_cascade(str(folder / f"{name}.yaml"), overrides), Options(), lambda line: None)
    return {stage: StageFolder(next(place.glob(f"{stage}-*"))) for stage in stages}


@dataclass(frozen=True)
class Runs:
    """Two steps on-policy, two steps of sampling alone, one stage from the first one's first step."""

    root: Path
    on_policy: StageFolder
    sampled: StageFolder
    from_step: StageFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("modes")
    stages = {
        "on_policy": "init: base\nnum_steps: 2\nrecord_every: 1\n",
        "sampled": "init: base\nnum_steps: 2\nmode: sample_only\n",
        "from_step": "init: on_policy@1\nnum_steps: 1\nmode: sample_only\n",
    }
    return Runs(root, **cascade(root, "first", stages))


def sha256(folder: StageFolder) -> str:
    """What the finished stage says its weights are; the folder holds just that."""
    result = folder.result()
    assert result is not None
    assert result.sha256 == content_sha256(folder.hf)
    return result.sha256


def answers(groups: list[Group]) -> list[tuple[str, tuple[int, ...], float]]:
    """What was sampled and how it was judged."""
    return [(group.task.id, item.token_ids, item.reward) for group in groups for item in group.rollouts]


def test_sample_only_records_what_on_policy_samples_first_and_trains_nothing(runs: Runs) -> None:
    assert recorded_steps(runs.sampled.path) == recorded_steps(runs.on_policy.path) == [0, 1]
    first = answers(read_groups(runs.sampled.path, 0))
    assert first == answers(read_groups(runs.on_policy.path, 0))
    assert answers(read_groups(runs.sampled.path, 1)) != answers(read_groups(runs.on_policy.path, 1))
    assert len(first) == 8 and len({reward for _, _, reward in first}) > 2
    lines = read_metrics(runs.sampled.path)
    assert [("loss" in line, line["rollouts"]) for line in lines] == [(False, 8.0)] * 2
    assert sha256(runs.sampled) != sha256(runs.on_policy)


def test_a_stage_starts_from_the_weights_of_a_step(runs: Runs) -> None:
    """`on_policy@1` is neither where that stage began nor where it ended; sampling alone leaves it as it is."""
    at_one = content_sha256(runs.on_policy.weights(1))
    assert sha256(runs.from_step) == at_one
    assert len({at_one, sha256(runs.on_policy), sha256(runs.sampled)}) == 3


def test_training_on_recorded_rollouts_gives_the_weights_of_the_run_that_sampled_them(runs: Runs) -> None:
    replays = {
        "replayed": f"init: base\nnum_steps: 2\nmode: train_only\nrollouts: {runs.on_policy.path}\n",
        "one_step": f"init: base\nnum_steps: 1\nmode: train_only\nrollouts: {runs.sampled.path}\n",
    }
    # No server answers there: who trains on records needs no sampler.
    nobody = ("hardware.sampler=remote", "hardware.sampler_url=http://127.0.0.1:9", "hardware.refit=files")
    folders = cascade(runs.root, "second", replays, *nobody)
    from_folder = f"init: hf:{runs.on_policy.weights(1)}\nnum_steps: 1\nmode: sample_only\n"
    folders |= cascade(runs.root, "third", {"from_folder": from_folder})
    assert sha256(folders["replayed"]) == sha256(runs.on_policy)
    # The first step's rollouts are the same whoever sampled them, and the optimizer starts anew in every stage.
    at_one = content_sha256(runs.on_policy.weights(1))
    assert sha256(folders["one_step"]) == at_one
    assert sha256(folders["from_folder"]) == at_one
    for ours, theirs in zip(
        read_metrics(folders["replayed"].path), read_metrics(runs.on_policy.path), strict=True
    ):
        for name in ("loss", "grad_norm", "reward"):
            assert ours[name] == theirs[name], name
        assert ours["seconds/sampling"] == 0.0


def test_rollouts_of_an_older_policy_are_clipped_by_their_recorded_log_probabilities(runs: Runs) -> None:
    init = f"init: hf:{runs.on_policy.hf}\nnum_steps: 1\nmode: train_only\nrollouts: {runs.on_policy.path}\n"
    stages = {"free": init, "clipped": init + "loss: {clip_low: 1.0e-4, clip_high: 1.0e-4}\n"}
    folders = cascade(runs.root, "older", stages)
    free, clipped = (read_metrics(folders[name].path)[0] for name in stages)
    for name in ("ratio", "gap_abs", "gap_abs_max"):
        assert clipped[name] == free[name], name
    assert free["gap_abs"] > 1e-3  # two steps lie between the policy that sampled and the one that is trained
    assert "clipped_share" not in free
    assert clipped["clipped_share"] > 0.5  # the step that sampled them has moved them towards their advantages already
    assert clipped["grad_norm"] < 0.5 * free["grad_norm"]


@pytest.mark.parametrize("kind", ["sampled, advantage: power", "topk, top_k: 8"])
def test_distillation_by_domain_weights_and_named_metrics(tmp_path: Path, kind: str) -> None:
    """The domain is one of the user's own, so that its name in the file is not its own name."""
    name = f"{DOMAIN}:Vowels"
    distill = (
        "kind: mopd\n" + COMMON.replace("group_size: 4", "group_size: 2")
        + f'init: base\nnum_steps: 1\nteachers: {{candidates: [taught], pin: {{"{name}": taught}}}}\n'
        + f'distill: {{kind: {kind}, domain_weights: {{"{name}": 2.0}}}}\n'
    )
    folders = cascade(tmp_path, "distilled", {"taught": "init: base\nnum_steps: 3\n", "student": distill})
    line = read_metrics(folders["student"].path)[0]
    own = sorted(key for key in line if key.startswith("reverse_kl/"))
    assert own == ["reverse_kl/teacher_taught", "reverse_kl/vowels"]
    assert line["reverse_kl/vowels"] == pytest.approx(line["reverse_kl"], rel=1e-5)
    assert line["reverse_kl/teacher_taught"] == line["reverse_kl/vowels"]
    assert line["masked_share/vowels"] == line["masked_share"] == 0.0
    assert abs(line["reverse_kl"]) > 1e-5 and line["grad_norm"] > 0.0


def test_raw_logprobs_are_the_same_on_both_sides_and_not_those_that_sampled(tmp_path: Path) -> None:
    cut = ("stages.*.sampling.temperature=0.6", "stages.*.sampling.top_p=0.8", "stages.raw.sampling.logprobs=raw")
    stages = dict.fromkeys(("kept", "raw"), "init: base\nnum_steps: 1\nrecord_every: 1\n")
    folders = cascade(tmp_path, "logprobs", stages, *cut)
    kept, raw = (read_metrics(folders[name].path)[0] for name in ("kept", "raw"))
    assert answers(read_groups(folders["kept"].path, 0)) == answers(read_groups(folders["raw"].path, 0))
    assert max(kept["gap_abs_max"], raw["gap_abs_max"]) < 1e-3
    assert raw["entropy"] > kept["entropy"] + 0.1  # mean surprise of the same tokens, without and with the cut
    assert sha256(folders["raw"]) != sha256(folders["kept"])


def test_the_samplers_experts_travel_to_the_update_and_onto_the_disk(runs: Runs) -> None:
    """In fp32 the Learner chooses the same, so that replay changes next to nothing."""
    two_steps = "init: base\nnum_steps: 2\nrecord_every: 1\n"
    stages = {name: f"{two_steps}loss: {{routing_replay: {name}}}\n" for name in ("sampler", "learner")}
    pin = f'teachers: {{pin: {{"{DOMAIN}:Vowels": sampler}}}}\n'
    stages["distilled"] = f"{two_steps}{pin}distill: {{routing_replay: sampler}}\n"
    folders = cascade(runs.root, "replay", stages)
    assert sha256(folders["learner"]) == sha256(runs.on_policy)
    lines = {name: read_metrics(folder.path) for name, folder in folders.items()}
    for step, plain in enumerate(read_metrics(runs.on_policy.path)):
        assert "routing_flips" not in plain and lines["learner"][step]["routing_flips"] == 0.0
        for name in ("sampler", "distilled"):
            assert lines[name][step]["routing_flips"] <= 2e-3 and lines[name][step]["gap_abs_max"] < 1e-3
        assert lines["sampler"][step]["reward"] == plain["reward"]
        assert lines["sampler"][step]["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    for name, recorded in (("sampler", [0, 1]), ("distilled", [0, 1]), ("learner", [])):
        assert recorded_steps(folders[name].path, experts=True) == recorded
    for group in read_groups(folders["sampler"].path, 1, experts=True):
        for rollout in group.rollouts:
            assert len(rollout.routed_experts) == 4 * len(rollout.token_ids)
            assert rollout.routed_experts[-5:].count(NO_CHOICE) == 4


def test_recorded_experts_train_again_and_are_what_trains(runs: Runs, tmp_path: Path) -> None:
    replay = "loss: {routing_replay: sampler}\n"
    recorded = cascade(tmp_path, "recorded", {"sampler": f"init: base\nnum_steps: 1\n{replay}"})["sampler"]
    altered = tmp_path / "altered"
    shutil.copytree(recorded.path, altered)
    with np.load(experts_file(altered, 0)) as arrays:
        moved = {name: np.where(arrays[name] < 8, (arrays[name] + 1) % 8, arrays[name]) for name in arrays.files}
    np.savez(experts_file(altered, 0), **moved)
    stages = {
        name: f"init: base\nnum_steps: 1\nmode: train_only\nrollouts: {place}\n{replay}"
        for name, place in (("again", recorded.path), ("other", altered))
    }
    nobody = ("hardware.sampler=remote", "hardware.sampler_url=http://127.0.0.1:9", "hardware.refit=files")
    folders = cascade(tmp_path, "replayed", stages, *nobody)
    assert sha256(folders["again"]) == sha256(recorded)
    again, other = (read_metrics(folders[name].path)[0] for name in ("again", "other"))
    assert again["routing_flips"] <= 2e-3 and other["routing_flips"] > 0.4
    assert sha256(folders["other"]) != sha256(recorded) and abs(other["gap_abs"]) > 10 * again["gap_abs"]
    without = {"without": f"init: base\nnum_steps: 1\nmode: train_only\nrollouts: {runs.on_policy.path}\n{replay}"}
    with pytest.raises(UserError, match="does not say by which experts step 0 was sampled; set routing_replay to"):
        cascade(tmp_path, "refused", without)
