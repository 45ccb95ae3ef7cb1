"""Fields of released software rows, wherever they stand and however they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_cascade.reward.swe.instance import image_of, instance_of, sif_of
from nemo_cascade.reward.swe.patch import touched
from nemo_cascade.types import UserError

FULL: dict[str, Any] = {
    "instance_id": "getmoto__moto-7365",
    "repo": "getmoto/moto",
    "base_commit": "7f6c9cb1deafb280fe7fcc7551c38e397f11a706",
    "dataset_name": "SWE-Gym/SWE-Gym",
    "problem_statement": "It fails.",
    "FAIL_TO_PASS": json.dumps(["tests/test_a.py::test_b"]),
    "PASS_TO_PASS": ["tests/test_a.py::test_c[x y]"],
    "docker_image": "mirror/moto:1",
    "test_patch": "diff --git a/tests/test_a.py b/tests/test_a.py\n",
    "patch": "--- a/moto/x.py\n+++ b/moto/x.py\n@@ -1 +1 @@\n-a\n+b\n--- a/conftest.py\n+++ b/conftest.py\n",
    "expected_output_json": json.dumps({"test_b": "PASSED"}),
    "execution_result_content": json.dumps({"test_file_names": ["../test_1.py"], "test_file_codes": ["x = 1"]}),
    "repo_path": "clones/moto",
}
TRUTH = {
    **{key: FULL[key] for key in ("instance_id", "repo", "base_commit", "dataset_name", "problem_statement")},
    **{key: FULL[key] for key in ("docker_image", "test_patch", "repo_path")},
    "FAIL_TO_PASS": ["tests/test_a.py::test_b"],
    "PASS_TO_PASS": ["tests/test_a.py::test_c[x y]"],
    "source_files": ["moto/x.py"],  # what the gold patch changes, but for what pytest loads by itself
    "expected": {"test_b": "PASSED"},
    "hidden_tests": {"r2e_tests/__init__.py": "", "r2e_tests/test_1.py": "x = 1"},
}


@pytest.mark.parametrize(
    "row",
    [
        FULL,
        {"responses_create_params": {"metadata": FULL}},
        {"responses_create_params": {"metadata": {"instance_dict": json.dumps(FULL)}}},
        {**FULL, "responses_create_params": {"metadata": {"repo": "another/one", "base_commit": None}}},
    ],
    ids=["at the top", "in the metadata", "as text in the metadata", "the outermost counts, null does not"],
)
def test_fields_wherever_they_stand(row: dict[str, Any]) -> None:
    assert instance_of(row, "rows:1") == TRUTH


def test_names_of_r2e_gym() -> None:
    row = {
        "repo_name": "sympy",
        "commit_hash": "0ab1",
        "problem_statement": "It fails.",
        "docker_image": "n/sympy:0ab1",
    }
    assert instance_of(row, "rows:1") == {
        "instance_id": "sympy__0ab1", "repo": "sympy", "base_commit": "0ab1", "problem_statement": "It fails.",
        "docker_image": "n/sympy:0ab1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", [7, 1.5, True, "", "text", "{", [], [None], [7], {}, {"x": None}, "\ud800", "9" * 5000]
)
@pytest.mark.parametrize("key", FULL)
def test_a_broken_field_is_a_truth_or_one_line(key: str, value: Any) -> None:
    for row in ({**FULL, key: value}, {"responses_create_params": {"metadata": {"instance_dict": value, **FULL}}}):
        try:
            truth = instance_of(row, "rows:1")
        except UserError as error:
            assert str(error).startswith("rows:1") and "\n" not in str(error)
        else:
            assert all(isinstance(test, str) for name in ("FAIL_TO_PASS", "PASS_TO_PASS") for test in truth[name])
            assert isinstance(image_of(truth), str)


@pytest.mark.parametrize(
    ("fields", "template", "image"),
    [
        ({}, "", "xingyaoww/sweb.eval.x86_64.getmoto_s_moto-7365"),
        ({"dataset_name": "princeton-nlp/SWE-bench_Verified"}, "", "swebench/sweb.eval.x86_64.getmoto_1776_moto-7365"),
        ({"dataset_name": "R2E-Gym/R2E-Gym-Subset"}, "", ""),
        ({"docker_image": "n/moto_final:1"}, "", "n/moto_final:1"),
        ({"docker_image": "n/moto_final:1"}, "mirror.here/{docker_image}", "mirror.here/n/moto_final:1"),
        ({}, "here/{instance_id}:2", "here/getmoto__moto-7365:2"),
    ],
)
def test_the_image_of_a_row(fields: dict[str, Any], template: str, image: str) -> None:
    assert image_of({"instance_id": FULL["instance_id"], **fields}, template) == image


@pytest.mark.parametrize(
    "name",
    [
        "swegym_sweb.eval.x86_64.getmoto__moto-7365.sif",
        "swegym_sweb.eval.x86_64.getmoto_s_moto-7365.sif",
        "r2egym_getmoto__moto-7365.sif",
        "getmoto__moto-7365.sif",
    ],
)
def test_the_sif_file_of_a_row(tmp_path: Path, name: str) -> None:
    assert sif_of(FULL, str(tmp_path)) == sif_of(FULL, "") == ""
    (tmp_path / name).touch()
    assert sif_of(FULL, str(tmp_path)) == str(tmp_path / name)
    assert sif_of({"instance_id": "../getmoto__moto-7365"}, str(tmp_path / "x")) == ""


def test_paths_of_a_patch() -> None:
    patch = b"--- a/one.py\n+++ b/one.py\n--- /dev/null\n+++ b/two/new.py\nrename from old.py\nrename to new.py\n"
    assert touched(patch) == ["new.py", "old.py", "one.py", "two/new.py"]
