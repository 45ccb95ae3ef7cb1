"""The fields of a released software row: SWE-Gym, R2E-Gym and SWE-bench forms, at the top or in the metadata.

Lists may be JSON texts, and NeMo-Gym's rows carry the original one as text in `metadata.instance_dict`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nemo_cascade.data import rows
from nemo_cascade.reward.swe.patch import sources_of
from nemo_cascade.types import Json, UserError

NAMES = {"repo": ("repo_name",), "base_commit": ("commit_hash",)}
"""A required field -> its names in R2E-Gym's rows."""

OPTIONAL = ("dataset_name", "docker_image", "test_patch", "repo_path")
R2E_TESTS = "r2e_tests"  # the folder of R2E-Gym's hidden tests, at the root of the image


def row_fields(row: Mapping[str, Json], row_id: str) -> dict[str, Json]:
    """All fields of the instance, the outermost of each name; null counts as absent."""
    params = row.get("responses_create_params")
    metadata = params.get("metadata") if isinstance(params, Mapping) else None
    metadata = metadata if isinstance(metadata, Mapping) else {}
    original = rows.loose_json(metadata.get("instance_dict") or {}, "instance_dict", row_id)
    if not isinstance(original, Mapping):
        raise UserError(f"{row_id}: field 'instance_dict' must be an object, this is {type(original).__name__}")
    found: dict[str, Json] = {}
    for level in (original, metadata, row):
        found |= {str(key): value for key, value in level.items() if value is not None}
    return found


def instance_of(row: Mapping[str, Json], row_id: str) -> dict[str, Json]:
    """The truth of a row's task; UserError names the field that is missing or of another kind."""
    fields = row_fields(row, row_id)
    for key, others in NAMES.items():
        other = next((name for name in others if name in fields), None)
        if key not in fields and other is not None:
            fields[key] = fields[other]
    if "instance_id" not in fields and "commit_hash" in fields and "repo" in fields:
        fields["instance_id"] = f"{fields['repo']}__{fields['commit_hash']}"
    truth: dict[str, Json] = {
        key: rows.field(fields, key, str, row_id) for key in ("instance_id", "repo", "base_commit", "problem_statement")
    }
    for key in OPTIONAL:
        if key in fields:
            truth[key] = rows.field(fields, key, str, row_id)
    gold = fields.get("patch", fields.get("golden_patch", ""))
    if isinstance(gold, str) and gold:
        truth["source_files"] = [*sources_of(gold.encode("utf-8", "replace"))]
    for key in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        if key in fields:
            truth[key] = _test_ids(rows.loose_json(fields[key], key, row_id), key, row_id)
    if fields.get("expected_output_json"):
        truth["expected"] = _texts_by_name(fields["expected_output_json"], "expected_output_json", row_id)
        truth["hidden_tests"] = _hidden_tests(fields.get("execution_result_content"), row_id)
    return truth


def _test_ids(value: Json, key: str, row_id: str) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(test, str) for test in value):
        raise UserError(f"{row_id}: field {key!r} must be a list of test ids")
    return value


def _texts_by_name(value: Json, key: str, row_id: str) -> dict[str, Json]:
    given = rows.loose_json(value, key, row_id)
    if not isinstance(given, dict) or not all(isinstance(status, str) for status in given.values()):
        raise UserError(f"{row_id}: field {key!r} must map test names to statuses")
    return given


def _hidden_tests(value: Json, row_id: str) -> dict[str, Json]:
    """R2E-Gym's test files by path, {} where the row leaves them to its image."""
    content = rows.loose_json(value or {}, "execution_result_content", row_id)
    if not isinstance(content, dict):
        return {}
    names, codes = content.get("test_file_names"), content.get("test_file_codes")
    if names is None or codes is None:
        return {}
    lists = isinstance(names, list) and isinstance(codes, list) and len(names) == len(codes)
    if not lists or not all(isinstance(text, str) for text in [*names, *codes]):
        raise UserError(f"{row_id}: field 'execution_result_content' must hold test_file_names and test_file_codes")
    files: dict[str, Json] = {f"{R2E_TESTS}/{Path(name).name}": code for name, code in zip(names, codes, strict=True)}
    return {f"{R2E_TESTS}/__init__.py": "", **files}


def image_of(truth: Mapping[str, Json], template: str = "") -> str:
    """The image of a row: the option `image` with the row's fields filled in, `docker_image`, or its data set's rule.

    "" where none is known: R2E-Gym's rows get theirs by a join with R2E-Gym-Subset on the commit.
    """
    instance, given = str(truth["instance_id"]), str(truth.get("docker_image", ""))
    if template:
        return template.replace("{instance_id}", instance).replace("{docker_image}", given)
    if given:
        return given
    dataset = str(truth.get("dataset_name", "")).lower()
    if "r2e" in dataset or "expected" in truth:
        return ""
    if "swe-bench" in dataset:
        return f"swebench/sweb.eval.x86_64.{instance.replace('__', '_1776_')}".lower()
    return f"xingyaoww/sweb.eval.x86_64.{instance.replace('__', '_s_')}".lower()


def sif_of(truth: Mapping[str, Json], folder: str) -> str:
    """The instance's SIF file in a folder of images under one of NeMo-Gym's names, "" where there is none."""
    instance = str(truth["instance_id"])
    forms = [instance, instance.replace("__", "_s_"), instance.replace("__", "_1776_")]
    names = [f"{start}{form}.sif" for form in forms for start in ("", "r2egym_", "swegym_sweb.eval.x86_64.")]
    found = (Path(folder, name) for name in dict.fromkeys(name for each in names for name in (each, each.lower())))
    inside = (path for path in found if folder and path.parent == Path(folder))
    return next((str(path) for path in inside if os.path.isfile(path)), "")  # False for a name no file system holds
