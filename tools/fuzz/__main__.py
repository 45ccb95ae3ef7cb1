"""Every parser of the catalogue on many inputs: what escaped, what was slow.

    python -m tools.fuzz [--inputs 100000] [--parsers NAME ...] [--engine grammar|hypothesis|atheris] [--write]

`grammar` damages valid texts (`inputs.py`), `hypothesis` draws arbitrary ones, `atheris` is guided by the lines that an
input reaches (requirements/bench.txt; each parser in a process of its own). `--write` puts the rows into
docs/fuzzing.md. The exit status is 1 when an exception escaped or a limit was passed; what did it is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from nemo_cascade.types import UserError
from tools.fuzz.engines import Tally, run
from tools.fuzz.inputs import Inputs
from tools.fuzz.parsers import CATALOGUE, Parser
from tools.precision_table import replace_part

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fuzzing.md"
ENGINES = ("grammar", "hypothesis", "atheris")
HEAD = (
    "| parser | inputs | longest, chars | refused | exceptions | limit, s | slowest, ms (chars) | over the limit |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


def tally_of(parser: Parser, engine: str, inputs: int, seed: int) -> Tally:
    """One parser's tally."""
    if engine == "grammar":
        texts = Inputs(parser.name, seed, parser.grammar.examples, parser.grammar.words)
        return run(parser, texts, inputs, seed, engine)
    if engine == "hypothesis":
        from tools.fuzz.drawn import drawn

        return drawn(parser, inputs, seed)
    from tools.fuzz.guided import guided

    return guided(parser, inputs, seed)


def line(tally: Tally) -> str:
    """A tally as a row of the page's table."""
    slowest = f"{tally.slowest_s * 1e3:.3g} ({tally.slowest_chars:,})"
    cells = [tally.parser, f"{tally.inputs:,}", f"{tally.longest:,}", f"{tally.refused / max(1, tally.inputs):.0%}"]
    cells += [str(tally.num_escaped), f"{tally.limit_s:g}", slowest, str(tally.num_late)]
    return f"| {' | '.join(cells)} |"


def write(tallies: Sequence[Tally], page: Path = PAGE) -> None:
    """Renew the rows of these parsers in the page's table of their engine; the others stay."""
    engine = tallies[0].engine
    part = page.read_text(encoding="utf-8").split(f"<!-- {engine} -->\n")[1].split(f"\n<!-- end of {engine} -->")[0]
    rows = {row.split("|")[1].strip(): row for row in part.splitlines()[len(HEAD) :] if row}
    rows |= {tally.parser: line(tally) for tally in tallies}
    replace_part(engine, "\n".join([*HEAD, *(rows[name] for name in CATALOGUE if name in rows)]), page)


def faults(tally: Tally) -> list[str]:
    """A line for each input that broke a parser."""
    found = [f"ESCAPED {tally.parser}: {what}: {text[:300]!r}" for what, text in tally.escaped]
    late = [f"{spent} s for {len(text)} characters: {text[:120]!r}" for spent, text in tally.late]
    return found + [f"LATE {tally.parser}: {what}" for what in late]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every parser held."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=100_000, help="per parser")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--parsers", nargs="*", default=[], metavar="NAME", help="these only")
    arguments.add_argument("--engine", choices=ENGINES, default="grammar")
    arguments.add_argument("--json", action="store_true", help="one object per parser, with the inputs that broke it")
    arguments.add_argument("--write", action="store_true", help=f"put the rows into docs/{PAGE.name}")
    given = arguments.parse_args(argv)
    try:
        unknown = sorted(set(given.parsers) - set(CATALOGUE))
        if unknown:
            raise UserError(f"--parsers: no parser {unknown[0]!r}; known: {', '.join(CATALOGUE)}")
        if given.engine == "atheris" and importlib.util.find_spec("atheris") is None:
            raise UserError("--engine atheris: atheris is not installed; run `pip install -r requirements/bench.txt`")
        warnings.simplefilter("ignore")  # programs that compile with a warning
        tallies = []
        if not given.json:
            sys.stdout.write("\n".join(HEAD) + "\n")
        for name in given.parsers or CATALOGUE:
            tallies.append(tally_of(CATALOGUE[name], given.engine, given.inputs, given.seed))
            shown = [json.dumps(tallies[-1].as_json())] if given.json else [line(tallies[-1]), *faults(tallies[-1])]
            sys.stdout.write("\n".join(shown) + "\n")
            sys.stdout.flush()
            if given.write:
                write(tallies[-1:])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return int(not all(tally.held for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
