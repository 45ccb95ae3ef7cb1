"""One process that decides whether two mathematical answers are equal; started, bounded and killed by `math_equal`.

Reads a JSON line `[gold, prediction]`, answers a JSON line `true` or `false`. Symbolic algebra can run away inside a
single C call that no Python signal interrupts, so each question gets its own CPU allowance from the kernel:
exceeding it ends the process, which the parent reads as "not equal".
"""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import sys

MEMORY_BYTES = 2 << 30
WARM_UP = (r"\frac{1}{2}", "0.5")


def allow_cpu(seconds: float) -> None:
    """From now on this process may use `seconds` more CPU time, rounded up to whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


@functools.lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> tuple[object, ...]:
    return _parse(answer)


def _parse(answer: str) -> tuple[object, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = (LatexExtractionConfig(), ExprExtractionConfig())
    return tuple(parse(f"\\boxed{{{answer}}}", targets, parsing_timeout=None))


def equal(gold: str, prediction: str) -> bool:
    """math-verify's verdict; the order of its arguments matters (a gold set accepts fewer predictions than the
    reverse).
    """
    from math_verify import verify

    parsed = _parse(prediction)
    return bool(parsed) and bool(verify(list(_parse_gold(gold)), list(parsed), timeout_seconds=None))


def main() -> None:
    """Answer questions until standard input closes."""
    cpu_seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may pass for an answer
    equal(*WARM_UP)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        allow_cpu(cpu_seconds)
        answers.write(json.dumps(equal(gold, prediction)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
