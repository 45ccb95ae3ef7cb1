"""The stage folder's layout, its done marker, and files that a kill cut short."""

import pytest

from nemo_cascade.cascade.artifacts import StageFolder, read_json, read_lines, stage_folder, write_json
from nemo_cascade.types import StageResult, UserError

RESULT = StageResult("if_rl", "grpo", "ab" * 32, "hf", "cd" * 32, 7, 1.5)


def test_layout(tmp_path):
    folder = stage_folder(tmp_path / "nano", "if_rl", "0123456789abcdef")
    assert folder.path == tmp_path / "nano" / "if_rl-01234567"
    inside = {
        "config.yaml": folder.config,
        "metrics.jsonl": folder.metrics,
        "record.json": folder.record,
        "rollouts/step_000012.jsonl": folder.rollouts(12),
        "checkpoints/step_000040": folder.checkpoint(40),
        "weights/step_000040": folder.weights(40),
        "hf": folder.weights(),
        "evaluation/final.jsonl": folder.evaluation("final"),
        "gates.json": folder.gates,
        "teachers.json": folder.teachers,
    }
    assert {name: path.relative_to(folder.path).as_posix() for name, path in inside.items()} == {
        name: name for name in inside
    }


def test_done_means_a_record_under_the_same_key(tmp_path):
    folder = StageFolder(tmp_path)
    assert not folder.is_done(RESULT.key)
    assert folder.result() is None
    folder.finish(RESULT)
    assert folder.is_done(RESULT.key)
    assert not folder.is_done("ab" * 31 + "ff")
    assert folder.result() == RESULT


def test_a_record_of_another_shape_is_refused(tmp_path):
    folder = StageFolder(tmp_path)
    write_json(folder.record, {"stage": "if_rl"})
    with pytest.raises(UserError, match="delete the file and the stage is run again"):
        folder.result()
    folder.record.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        folder.result()


def test_the_newest_checkpoint_counts_only_whole_folders(tmp_path):
    folder = StageFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    for name in ("step_000040", "step_000120", "step_000160.partial", ".step_000200"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.newest_checkpoint() == 120


def test_a_last_line_cut_short_is_left_out_and_one_inside_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert [row["a"] for row in read_lines(path)] == [1, 2]
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON"):
        list(read_lines(path))
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
