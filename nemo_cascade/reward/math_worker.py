"""One process that decides whether two mathematical answers are equal; started, bounded and killed by `math_equal`.

Reads a JSON line `[gold, prediction]`, answers a JSON line `true` or `false`. Symbolic algebra can run away inside a
single C call that no Python signal interrupts, so each question gets its own CPU allowance from the kernel:
exceeding it ends the process, which the parent reads as "not equal".
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import resource
import sys

MEMORY_BYTES = 2 << 30
POINT_DIGITS = 20
NEAR = 1e-5  # relative: math-verify rounds floats to six places
PRIMES = (83, 97, 113, 61, 139, 71, 157, 103)
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
    reverse). Pairs whose values differ at a point are not handed to it: simplifying them is what takes long.
    """
    from math_verify import verify

    return any(
        not differ(wanted, given) and verify([wanted], [given], timeout_seconds=None)
        for wanted, given in itertools.product(_parse_gold(gold), _parse(prediction))
    )


def differ(wanted: object, given: object) -> bool:
    """Whether two expressions are certainly not equal, because they are not where each symbol has a value of its own.

    False where that says nothing: relations, sets, matrices and texts, single symbols and percentages, which
    math-verify compares by other rules, values that cannot be had to full precision, and nearly equal ones.
    """
    import sympy
    from sympy.core.evalf import PrecisionExhausted
    from sympy.core.function import AppliedUndef

    steps = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum, sympy.Product)
    opaque = (sympy.UnevaluatedExpr, AppliedUndef, *steps)
    for side in (wanted, given):
        if not isinstance(side, sympy.Expr) or isinstance(side, sympy.Symbol) or side.has(*opaque):
            return False
    assert isinstance(wanted, sympy.Expr) and isinstance(given, sympy.Expr)
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    point = {symbol: sympy.Rational(PRIMES[at % len(PRIMES)] + at, 1 << 7) for at, symbol in enumerate(symbols)}
    try:
        one, other = (side.evalf(POINT_DIGITS, subs=point, strict=True) for side in (wanted, given))
        gap = abs(one - other) if one.is_number and other.is_number else sympy.nan
        return bool(gap.is_finite and gap > NEAR * (1 + abs(one)))
    except (PrecisionExhausted, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError):
        return False


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
