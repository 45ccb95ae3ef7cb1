"""The hand-drawn charts: where points land, and round ticks."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tools.line_chart import COLOURS, HEIGHT, LEFT, TOP, WIDTH, Line, Panel, draw, short, step_of_ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_ticks_are_round_and_few() -> None:
    assert [step_of_ticks(span) for span in (1.0, 1.05, 60.0, 180.0, 7e5, 0.0)] == [
        0.2, 0.5, 20.0, 50.0, 2e5, 1.0
    ]  # fmt: skip
    assert [short(value) for value in (0.2, 40.0, 1500.0, 2.5e6)] == ["0.2", "40", "1.5k", "2.5M"]


def test_points_land_on_the_scale() -> None:
    lines = [Line("mopd", [(0, 0.5), (10, 1.0)]), Line("grpo", [(20, 0.25)]), Line("mopd", []), Line("sft", [(5, 0.5)])]
    root = ElementTree.fromstring(draw([Panel("A & B", "steps", lines, 0.9), Panel("second", "tokens", lines[:1])]))
    assert root.get("width") == str(2 * WIDTH)
    first, second = root.findall(f"{SVG}g")
    curves = first.findall(f"{SVG}polyline")
    assert [curve.get("stroke") for curve in curves] == [COLOURS["mopd"], COLOURS["grpo"], "#2e9a74"]
    points = [[tuple(map(float, pair.split(","))) for pair in curve.get("points", "").split()] for curve in curves]
    floor, height = HEIGHT - 44, HEIGHT - 44 - TOP
    assert points[0][0] == pytest.approx((LEFT, floor - height * 0.5 / 1.05), abs=0.06)
    assert points[1][0][0] == pytest.approx(WIDTH - 14)  # the largest x of the panel is its right edge
    assert points[0][1][0] == pytest.approx((LEFT + WIDTH - 14) / 2)
    dashed = [line for line in first.findall(f"{SVG}line") if line.get("stroke-dasharray")]
    assert float(dashed[0].get("y1", "")) == pytest.approx(floor - height * 0.9 / 1.05, abs=0.06)
    assert not [line for line in second.findall(f"{SVG}line") if line.get("stroke-dasharray")]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"A & B", "second", "mopd", "grpo", "sft", "steps", "tokens"} <= set(texts)
    assert re.search(r"translate\(380 0\)", draw([Panel("", "", []), Panel("", "", [])]))
