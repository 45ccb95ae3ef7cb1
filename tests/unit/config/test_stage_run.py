"""A stage folder's config.yaml comes back as it was written, or is refused."""

import pytest

from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.schema import StageRun
from nemo_cascade.config.stage_run import read_stage_run, write_stage_run
from nemo_cascade.types import UserError


@pytest.mark.parametrize("stage", ["sft", "if_rl", "mopd"])
def test_round_trip(tmp_path, stage):
    loaded = load_cascade("nemotron_cascade_2")
    run = StageRun(
        cascade="c", stage=stage, key="ab" * 32, seed=3, kind=loaded.stages[stage].kind, init_folder=None,
        teacher_folders={"math": "/somewhere/hf"}, teacher_stages={"math": "sft"}, model=loaded.model,
        tokenizer="/somewhere", hardware=loaded.hardware, trackers=loaded.cascade.trackers, config=loaded.stages[stage],
    )  # fmt: skip
    path = write_stage_run(run, tmp_path)
    assert path == tmp_path / "config.yaml"
    assert read_stage_run(tmp_path) == run


def test_an_unknown_key_is_refused(tmp_path):
    loaded = load_cascade("nano")
    run = StageRun("c", "sft", "k", 1, "sft", tokenizer="t", config=loaded.stages["sft"])
    text = write_stage_run(run, tmp_path).read_text().replace("weight_decay:", "weight_deca:")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"did you mean 'optimizer\.weight_decay'"):
        read_stage_run(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: no such file"):
        read_stage_run(tmp_path)
