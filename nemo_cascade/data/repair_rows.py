"""Rows of agentless repair: released `swerl_gen` rows, and rows that carry a repository to make prompts from.

The instance's fields stand below `instance`, or at the top of the row; the files that the prompt shows are
`relevant_file_contents`, the whole repository `repository_files`, both path -> text, at the top or below `metadata`, as
an object or as JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_cascade.data import rows
from nemo_cascade.types import Json, UserError

SCRIPTS = ("test_patch", "setup_script", "test_script", "regression_script")
MODES = ("eval", "repro-gen")
"""What a row asks for: a patch, or a script that shows the fault."""


def instance_fields(row: Mapping[str, Json], row_id: str, required: Sequence[str]) -> dict[str, Json]:
    """The verifier's fields of a row; those in `required` must be there.

    `golden_patch` is another name of `patch`. FAIL_TO_PASS and PASS_TO_PASS are lists of test names, empty where a row
    has none.
    """
    nested = "instance" in row or "instance_id" not in row
    instance = rows.field(row, "instance", dict, row_id) if nested else row
    where = f"{row_id} instance" if nested else row_id
    if instance.get("patch") is None and instance.get("golden_patch") is not None:
        instance = {**instance, "patch": instance["golden_patch"]}
    found: dict[str, Json] = {}
    for key in ("instance_id", "patch", "repo", "base_commit", "problem_statement", *SCRIPTS):
        if key in required or instance.get(key) is not None:
            found[key] = rows.field(instance, key, str, where)
    for key in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        needed = key in required or instance.get(key) is not None
        found[key] = rows.loose_json(rows.field(instance, key, object, where), key, where) if needed else []
        tests = found[key]
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise UserError(f"{where}: field {key!r} must be a list of test names")
    if row.get("dataset_name") is not None:
        found["dataset_name"] = rows.field(row, "dataset_name", str, row_id)
    mode = row.get("mode") or MODES[0]
    if mode not in MODES:
        raise UserError(f"{row_id}: field 'mode' is {mode!r}; known: {', '.join(MODES)}")
    return found | {"mode": mode}


def file_contents(row: Mapping[str, Json], key: str, row_id: str) -> dict[str, str]:
    """Path -> text from a field at the top of a row or below its `metadata`; empty when it is in neither."""
    metadata = row.get("metadata")
    value, where = row.get(key), row_id
    if not value and isinstance(metadata, Mapping):
        value, where = metadata.get(key), f"{row_id} metadata"
    found = rows.loose_json(value or {}, key, row_id)
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{where}: field {key!r} must map paths to texts")
    return dict(found)


def image_of(row: Mapping[str, Json]) -> str:
    """The name of the container image that holds a row's repository; empty when it names none."""
    metadata = row.get("metadata")
    image = metadata.get("image") if isinstance(metadata, Mapping) else None
    return image if isinstance(image, str) else ""
