"""Line charts as one SVG file, drawn by hand so that a benchmark needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INK, MUTED, GRID = "#1c1d1f", "#676a70", "#e3e3de"  # the report's colours on paper
COLOURS = {"mopd": "#3b7cc9", "grpo": "#d79a2b"}
SPARE = ("#2e9a74", "#9a62b8", "#cf5b52", "#6b6d70")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 260, 46, 40, 44
TICKS = 5


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y), named once in the legend however many curves share the name."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: its title, what x is, the curves, and a level that is drawn across."""

    title: str
    x_label: str
    lines: Sequence[Line]
    level: float | None = None


def step_of_ticks(span: float) -> float:
    """A round distance of ticks (1, 2 or 5 times a power of ten) that gives at most `TICKS` of them over the span."""
    if span <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= TICKS)


def short(value: float) -> str:
    """A tick's label: 1500000 as 1.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side as the text of an SVG file. Empty curves are left out."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    spare = iter(SPARE)
    colours = {name: COLOURS.get(name) or next(spare, INK) for name in names}
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        parts += [f'<g transform="translate({WIDTH * index} 0)">', *_panel(panel, colours), "</g>"]
    x = LEFT
    for name, colour in colours.items():
        parts.append(f'<line x1="{x}" y1="12" x2="{x + 18}" y2="12" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 23}" y="16" fill="{INK}">{escape(name)}</text>')
        x += 46 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colours: dict[str, str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    right = max((x for x, _ in points), default=1.0) or 1.0
    top = max([y for _, y in points] + [panel.level or 0.0, 1e-9]) * 1.05
    inner_w, inner_h = WIDTH - LEFT - 14, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + inner_w * x / right, TOP + inner_h * (1.0 - y / top)

    parts = [f'<text x="{LEFT}" y="{TOP - 8}" fill="{INK}" font-weight="600">{escape(panel.title)}</text>']
    for across, limit in ((False, right), (True, top)):
        step = step_of_ticks(limit)
        for tick in (step * count for count in range(int(limit / step) + 1)):
            x, y = place(0.0 if across else tick, tick if across else 0.0)
            end = f'x2="{LEFT + inner_w}" y2="{y:.1f}"' if across else f'x2="{x:.1f}" y2="{TOP}"'
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" {end} stroke="{GRID}"/>')
            text_x, text_y = (LEFT - 5, y + 4) if across else (x, y + 15)
            anchor = "end" if across else "middle"
            parts.append(
                f'<text x="{text_x:.1f}" y="{text_y:.1f}" fill="{MUTED}" text-anchor="{anchor}">{short(tick)}</text>'
            )
    if panel.level is not None:
        _, y = place(0.0, panel.level)
        ends = f'x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + inner_w}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="{INK}" stroke-dasharray="4 3"/>')
    for line in panel.lines:
        if line.points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[line.name]}" stroke-width="1.6"/>')
    middle = LEFT + inner_w / 2
    label = f'<text x="{middle}" y="{HEIGHT - 10}" fill="{MUTED}" text-anchor="middle">{escape(panel.x_label)}</text>'
    return [*parts, label]
