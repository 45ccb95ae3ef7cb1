"""The table of what FP8 does: each cell from the numbers of its run, distances to the first line."""

from __future__ import annotations

from tools.bench.fp8_effect import HEAD, TAIL, table


def test_cells_are_those_of_the_runs() -> None:
    drift = {"mean": 0.25, "p99": 0.5, "max": 2.0, "flips": 0.015}
    exact = [1.0, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]
    lines = [
        {"case": "fp32", "drift": None, "sft_loss": exact, "reward": [0.0] * TAIL + [1.0] * TAIL, "sampler_gap": 0.0},
        {"case": "fp8", "drift": drift, "sft_loss": [1.5, *exact[1:-1], 0.5]},
    ]
    head, rule, one, two = ([cell.strip() for cell in row.strip("|").split("|")] for row in table(lines).splitlines())
    assert tuple(head) == HEAD and len(rule) == len(HEAD)
    assert one == ["fp32", "-", "-", "-", "-", "1.0000", "0.2500", "0.2500", "0.0000", "0.000", "1.000", "0.0000"]
    assert two == ["fp8", "0.2500", "0.5000", "2.0000", "1.50%", "1.5000", "0.2500", "0.3000", "0.5000", "-", "-", "-"]
