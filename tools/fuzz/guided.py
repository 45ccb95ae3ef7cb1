"""atheris (libFuzzer): inputs that reach new lines are kept and changed again. Each parser in a process of its own.

libFuzzer owns the process it runs in and ends it, so the tally comes back in a file; and code must be instrumented
while it is imported, so this module imports no parser before `main` does.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cascade.types import UserError
from tools.fuzz.inputs import from_bytes

if TYPE_CHECKING:
    from tools.fuzz.engines import Tally
    from tools.fuzz.parsers import Parser

INSTRUMENTED = ("nemo_cascade", "yaml", "tomllib", "unidiff")
MAX_BYTES = 4096
HOURS = 2.0


def guided(parser: Parser, inputs: int, seed: int) -> Tally:
    """The tally of a process that tries so many inputs."""
    from tools.fuzz.engines import Tally

    with tempfile.TemporaryDirectory(prefix="nemo-cascade-fuzz-") as folder:
        place = Path(folder)
        corpus = place / "corpus"
        corpus.mkdir()
        for number, text in enumerate(parser.grammar.examples):
            (corpus / str(number)).write_bytes(b"\0" + text.encode("utf-8", "surrogatepass"))
        (place / "words").write_text("".join(map(_entry, parser.grammar.words)), encoding="ascii")
        argv = [sys.executable, "-W", "ignore", "-m", __name__, parser.name, str(inputs), str(seed), folder]
        ended = subprocess.run(argv, capture_output=True, timeout=HOURS * 3600, check=False)
        if not (place / "tally.json").exists():
            last = ended.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise UserError(f"atheris ended with status {ended.returncode} before its last input: {last[:300]}")
        fields = json.loads((place / "tally.json").read_text(encoding="utf-8"))
    return Tally(**fields)


def _entry(word: str) -> str:
    """A line of libFuzzer's dictionary."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogatepass")) + '"\n'


def main(name: str, inputs: int, seed: int, folder: str) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        catalogue = importlib.import_module("tools.fuzz.parsers").CATALOGUE
    engines = importlib.import_module("tools.fuzz.engines")
    parser = catalogue[name]
    tally = engines.Tally(parser.name, "atheris", seed, parser.seconds)
    trial = engines.Trial(parser, tally)
    engines.keep_time()

    def one(data: bytes) -> None:
        if tally.inputs < inputs:
            trial(from_bytes(data))
        if tally.inputs == inputs and not (Path(folder) / "tally.json").exists():
            tally.cpu_s = sum(os.times()[:2])
            (Path(folder) / "tally.json").write_text(json.dumps(tally.as_json()), encoding="utf-8")

    limits = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-len_control=0", "-verbosity=0"]
    limits.append(f"-dict={folder}/words")
    atheris.Setup([sys.argv[0], *limits, f"{folder}/corpus"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
