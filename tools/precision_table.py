"""The dtype of every tensor, as Markdown: `python -m tools.precision_table [--write]`.

Everything printed is read from models/dtypes.py, which the Learner, the exports and the refits ask, too. `--write`
renews the table in docs/precision.md; a test compares the two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_cascade.models.dtypes import (
    ENGINES,
    EXPORTS,
    KINDS,
    PROFILES,
    Kind,
    engine_dtype,
    export_dtype,
    learner_dtype,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "precision.md"
TABLE = "table"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def product(kind: Kind, precision: str) -> str:
    """What the operands of the tensor's product are rounded to; `=` where they are what the Learner holds."""
    recipe = PROFILES[precision].recipe
    return f"e4m3 {recipe}" if kind.fp8 and recipe is not None else "="


def learner_table() -> list[str]:
    """One line per kind: held dtype and product of each profile, then what the optimizer keeps."""
    names = [name for name in PROFILES if not PROFILES[name].emulated]
    lines = [
        "| tensor | " + " | ".join(names) + " | master | Adam moments | gradient sum |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for kind in KINDS:
        cells = []
        for name in names:
            held, rounded = SHORT[learner_dtype(kind, name)], product(kind, name)
            cells.append(held if rounded == "=" else f"{held}, product {rounded}")
        kept = ["fp32", "fp32", "fp32"] if kind.trained else ["none", "none", "none"]
        lines.append(f"| {kind.name} | " + " | ".join([*cells, *kept]) + " |")
    return lines


def leaving_table() -> list[str]:
    """One line per kind: exported folders and engines."""
    columns = [f"export {policy}" for policy in EXPORTS] + [f"engine {engine}" for engine in ENGINES]
    lines = ["| tensor | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for kind in KINDS:
        cells = [SHORT[export_dtype(kind, policy)] for policy in EXPORTS]
        for engine in ENGINES:
            rounds = " (rounds: reported)" if engine in kind.rounded_by else ""
            cells.append(SHORT[engine_dtype(kind, engine)] + rounds)
        lines.append(f"| {kind.name} | " + " | ".join(cells) + " |")
    return lines


def render() -> str:
    """Both tables."""
    return "\n".join([*learner_table(), "", *leaving_table()])


def replace_part(part: str, text: str, page: Path = PAGE) -> None:
    """Renew what stands between the two marks of a part of a page."""
    begin, end = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
    content = page.read_text(encoding="utf-8")
    head, rest = content.split(begin)
    page.write_text(head + begin + text + end + rest.split(end, 1)[1], encoding="utf-8")


def main() -> None:
    """Print the tables; with --write put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    given = parser.parse_args()
    sys.stdout.write(render() + "\n")
    if given.write:
        replace_part(TABLE, render())


if __name__ == "__main__":
    main()
