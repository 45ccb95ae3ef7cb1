"""The state of a cascade as a table for a page: what a reader of a README sees."""

from __future__ import annotations

import shutil

import pytest

from nemo_cascade.cascade.status import markdown, status
from tests.unit.cascade.finished_cascade import DOMAINS, write_cascade


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("runs") / "nano")


def test_markdown_has_the_start_and_every_stage_with_its_arrows(where):
    head, rule, *rows = markdown(where).splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert sorted(columns) == sorted(name.replace("_", " ") for name in DOMAINS)
    assert rule == "|---" * (1 + len(DOMAINS)) + "|"
    table = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in rows}
    assert list(table)[:2] == ["start of `sft`", "`sft`"]
    assert not [cell for cell in table["start of `sft`"] if "\u25b2" in cell or "*" in cell]
    stages = {row["name"]: row for row in status(where)["stages"]}
    for name, row in stages.items():
        for column, cell in zip(columns, table[f"`{name}`"], strict=True):
            domain = column.replace(" ", "_")
            if domain not in row["scores"]:
                assert cell == ""
                continue
            assert cell.strip("*").split()[0] == f"{100 * row['scores'][domain]['score']:.0f}"
            assert cell.startswith("**") == (row["kind"] == "grpo" and domain in row["domains"])
            gain = row["gains"][domain]
            assert ("\u25b2" in cell, "\u25bc" in cell) == (gain["ci_low"] > 0, gain["ci_high"] < 0)
    assert "\u25b2" in table["`if_rl`"][columns.index("instruction following")]
    assert "\u25bc" in table["`if_rl`"][columns.index("preference")]


def test_markdown_without_any_score_is_a_sentence(where, tmp_path):
    copy = shutil.copytree(where, tmp_path / "nano")
    for evaluation in copy.glob("*/evaluation"):
        shutil.rmtree(evaluation)
    assert markdown(copy) == (
        f"No scores to show: 5 of 6 stages of nano are done in {copy} under this config, and none has `report` scores."
    )
