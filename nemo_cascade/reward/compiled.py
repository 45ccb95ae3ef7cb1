"""Programs in compiled languages: compiled once per submission inside its sandbox, then run on each standard input."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemo_cascade.reward.sandbox import Limits, RunResult, Sandbox

COMPILE_LIMITS = Limits(cpu_seconds=60.0, wall_seconds=180.0, memory_mb=4096, output_bytes=1 << 16, file_mb=128)
ROOMY_MB = 64  # a binary's file, at least


@dataclass(frozen=True)
class Language:
    """How a language is compiled: `compiler` on PATH, with `flags`, from a file named `source`."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    source: str

    def program(self) -> str | None:
        """The compiler's path below /usr, which is all that a sandbox sees; None when there is none."""
        return shutil.which(self.compiler, path="/usr/bin:/usr/local/bin")


LANGUAGES = {
    "cpp": Language("C++", "g++", ("-O2", "-std=c++17", "-pipe"), "main.cpp"),
    "c": Language("C", "gcc", ("-O2", "-std=c11", "-pipe"), "main.c"),
}
ALIASES = {"c++": "cpp", "cpp17": "cpp", "c++17": "cpp", "python3": "python", "py": "python"}


class NotCompiled(Exception):
    """The compiler refused the program; the message is its first error."""


class NoCompiler(Exception):
    """This machine lacks the compiler; the message says what to install."""


def run_compiled(
    sandbox: Sandbox,
    language: Language,
    source: str,
    stdins: Sequence[str],
    limits: Limits,
    stop: Callable[[int, RunResult], bool],
) -> list[RunResult]:
    """Results in order until `stop` says so, or the wall clock expires. NotCompiled and NoCompiler as they say.

    All runs share a work folder, where a program finds what it wrote itself and nothing else: expected outputs are
    compared outside. Standard library only.
    """
    program = language.program()
    if program is None:
        raise NoCompiler(f"no {language.name} compiler on this machine: install {language.compiler}")
    results: list[RunResult] = []
    with sandbox.session({language.source: source}) as session:
        built = session.run([program, *language.flags, "-o", "main", language.source, "-lm"], "", COMPILE_LIMITS)
        if built.status == "wall_time":
            return [built]
        if built.status != "ok":
            raise NotCompiled(_first_error(built))
        for stdin in stdins:
            results.append(session.run(["./main"], stdin, replace(limits, file_mb=max(limits.file_mb, ROOMY_MB))))
            if results[-1].status in ("wall_time", "crashed") or stop(len(results) - 1, results[-1]):
                break
    return results


def _first_error(built: RunResult) -> str:
    lines = [line for line in built.stderr.splitlines() if "error" in line]
    return (lines[0] if lines else built.status)[:200]
