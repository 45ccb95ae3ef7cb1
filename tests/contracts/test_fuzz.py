"""Every parser of the catalogue in `tools/fuzz` takes any text within its time and without an escaping exception.

A few hundred inputs each; `python -m tools.fuzz` tries 100,000 and docs/fuzzing.md has what came of it. Whoever adds a
domain, a reward module or an instruction adds its parser to the catalogue: a test here fails until then.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
import warnings
from pathlib import Path

import pytest

from nemo_cascade import domains, reward
from nemo_cascade.reward import instructions
from tools.fuzz import __main__ as fuzz
from tools.fuzz.drawn import drawn
from tools.fuzz.engines import PATIENCE, run
from tools.fuzz.grammars import Grammar
from tools.fuzz.inputs import MAX_FLOOD, Inputs, from_bytes
from tools.fuzz.parsers import ARGUMENTS, CATALOGUE, NOT_PARSERS, Parser

INPUTS = int(os.environ.get("NEMO_CASCADE_FUZZ", "250"))  # from damaged valid texts
DRAWN = max(25, INPUTS // 10)  # by hypothesis, whose inputs take a hundred times as long to make


@pytest.mark.parametrize("name", CATALOGUE)
def test_any_text(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # programs that compile with a warning
        for tally in (fuzz.tally_of(CATALOGUE[name], "grammar", INPUTS, 1), drawn(CATALOGUE[name], DRAWN, 1)):
            assert fuzz.faults(tally) == []
            assert tally.held
            assert tally.inputs >= (INPUTS if tally.engine == "grammar" else DRAWN // 2)  # no text is drawn twice


def test_every_domain_and_reward_module_has_a_parser() -> None:
    served = {domain for parser in CATALOGUE.values() for domain in parser.domains}
    assert served == set(domains.known())
    covered = {module for parser in CATALOGUE.values() for module in parser.modules}
    walked = pkgutil.walk_packages(reward.__path__, "nemo_cascade.reward.")  # whole names, or no package is entered
    found = [module.name.removeprefix("nemo_cascade.") for module in walked]
    found += [f"domains.{name}" for name in domains.known()]
    checks = "reward.instructions."  # their entry is the package's: `instructions` runs them all
    assert {name for name in found if not name.startswith(checks)} - covered == set(NOT_PARSERS)
    for module in covered:
        importlib.import_module(f"nemo_cascade.{module}")


def test_every_instruction_is_tried() -> None:
    """An instruction whose arguments the catalogue lacks would raise Unsupported, which no parser may."""
    text = "The frog sat."
    tried = {name: instructions.check(name, ARGUMENTS, "Say frog twice.", text) for name in instructions.CHECKS}
    assert len(tried) == len(instructions.CHECKS) >= 111
    assert CATALOGUE["instructions"].refuses == ()


def test_what_breaks_is_seen() -> None:
    """The tally can fail: what escapes is counted once per input and kept once per kind, what takes too long is broken
    off.
    """

    def read(text: str) -> int:
        if "9" in text:
            raise LookupError(text)
        while len(text) == 3:
            continue  # Python code, so that the timer can break it off
        return int(text)

    parser = Parser("test", read, Grammar((), ("1",)), (), (), (ValueError,), 0.05)
    tally = run(parser, iter(["1", "x", "9", "93", "111", "2"]), 6, 0, "grammar")
    assert (tally.inputs, tally.refused, tally.num_escaped, tally.num_late, tally.held) == (6, 1, 2, 1, False)
    assert tally.escaped == [("LookupError: 9", "9")]
    assert tally.late[0][1] == "111"
    assert 0.05 < tally.slowest_s < 0.05 * PATIENCE + 1.0
    assert [line.split(":")[0] for line in fuzz.faults(tally)] == ["ESCAPED test", "LATE test"]


def test_atheris_tries_as_many_as_asked() -> None:
    pytest.importorskip("atheris", reason="requirements/bench.txt is not installed")
    tally = fuzz.tally_of(CATALOGUE["equivalence"], "atheris", 300, 0)
    assert (tally.inputs, tally.engine, tally.held) == (300, "atheris", True)
    assert tally.longest > 20  # the examples are its first inputs


def test_inputs_follow_from_the_seed_and_reach_everywhere() -> None:
    grammar = CATALOGUE["responses"].grammar

    def first(count: int, seed: int) -> list[str]:
        inputs = Inputs("responses", seed, grammar.examples, grammar.words)
        return [inputs.draw() for _ in range(count)]

    texts = first(2000, 3)
    assert first(50, 3) == texts[:50] != first(50, 4)
    assert max(map(len, texts)) > MAX_FLOOD // 4
    assert any("\udc80" <= char <= "\udcff" for text in texts for char in text)  # bytes that are no UTF-8
    assert any("[" * 900 in text for text in texts)
    assert from_bytes(b"\0\xff") == "\udcff"
    assert from_bytes(b"\1\xff") == "\ufffd"
    assert from_bytes(b"") == ""


def test_the_page_has_every_parser_at_its_full_count() -> None:
    """docs/fuzzing.md: 100,000 inputs to every parser, nothing escaped, nothing late."""
    rows = {}
    for engine in ("grammar", "atheris"):
        part = fuzz.PAGE.read_text(encoding="utf-8").split(f"<!-- {engine} -->\n")[1]
        lines = part.split(f"\n<!-- end of {engine} -->")[0].splitlines()[len(fuzz.HEAD) :]
        rows[engine] = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert all(int(row[1].replace(",", "")) >= 100_000 for row in rows[engine])
        assert all((row[4], row[7]) == ("0", "0") for row in rows[engine])
        assert all(row[5] == f"{CATALOGUE[row[0]].seconds:g}" for row in rows[engine])
    assert [row[0] for row in rows["grammar"]] == list(CATALOGUE)
    assert {row[0] for row in rows["atheris"]} <= set(CATALOGUE)  # the slowest are not tried again after every change


def test_rows_of_the_page_are_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fuzz.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "fuzzing.md"
    page.write_text(text, encoding="utf-8")
    fuzz.write([fuzz.tally_of(CATALOGUE["boxes"], "grammar", 7, 0)], page)
    assert re.search(r"^\| boxes \| 7 \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    fuzz.write([fuzz.tally_of(CATALOGUE["boxes"], "grammar", 8, 0)], page)
    assert re.findall(r"^\| boxes \| (\d+) \|", page.read_text(encoding="utf-8"), re.MULTILINE) == ["8"]
    assert fuzz.main(["--parsers", "boxes", "frames", "--inputs", "20"]) == 0
    assert capsys.readouterr().out.count("| 20 |") == 2
    if importlib.util.find_spec("atheris") is None:
        assert fuzz.main(["--parsers", "boxes", "--inputs", "20", "--engine", "atheris"]) == 2
        assert capsys.readouterr().err.startswith("--engine atheris: atheris is not installed; run `pip install -r req")
    assert fuzz.main(["--parsers", "boxen"]) == 2
    assert capsys.readouterr().err.startswith("--parsers: no parser 'boxen'; known: boxes, ")
