"""Bounds on an expression that nobody has worked out yet: digits of its integers, terms once multiplied out, degree.

The arithmetic of `math_reader`, which reads an answer's text: each operation takes the bounds of its parts to a bound
of the result, in constant time, however large the result would be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_DIGITS = 10_000  # of any integer, and before the point of any number
MAX_ROOT_DIGITS = 300  # below a root, which is searched for square factors, and in a floor
MAX_FACTORED_DIGITS = 50  # beside two logarithms or the factorial of a symbol: simplifying these factors integers
MAX_TERMS = 64  # of any sum once multiplied out; half of it below a fraction
MAX_DEGREE = 120  # of a polynomial over a sum: it is cancelled term by term
EXACT_DIGITS = 30
MANY_SYMBOLS = 8
LOG10_E = math.log10(math.e)


@dataclass(frozen=True, slots=True)
class Size:
    """Bounds on one expression. log10 of the integers above and below its fraction bar; `high`: log10 of the largest
    value, at least 0, with symbols counted as 1; terms above and below once multiplied out; degree; `exact`: its value
    where that is a small rational number; `plain`: a rational number, of one term however it is made; `wave`: a
    trigonometric function, whose powers unfold into multiple angles; `symbols`: letters, roots and functions in it.
    """

    above: float = 0.0
    below: float = 0.0
    high: float = 0.0
    top: float = 1.0
    bottom: float = 1.0
    degree: float = 1.0
    exact: Fraction | None = None
    plain: bool = False
    wave: bool = False
    symbols: frozenset[str] = frozenset()

    @property
    def digits(self) -> float:
        """Of all integers in it."""
        return self.above + self.below

    @property
    def bound(self) -> float:
        """The largest absolute value."""
        if self.exact is not None:
            return abs(float(self.exact))
        return 10.0 ** min(self.high, 300.0)


E = Size(high=LOG10_E, symbols=frozenset("e"))


def symbol(name: str, high: float = 0.0) -> Size:
    """A letter, or a constant that stays as it is."""
    return Size(high=high, symbols=frozenset((name,)))


def number(value: Fraction) -> Size:
    """A small rational number."""
    above, below = math.log10(max(1, abs(value.numerator))), math.log10(value.denominator)
    high = max(0.0, above - below)
    return Size(above, below, high, degree=0.0, exact=value, plain=True)


def literal(text: str) -> Size:
    """Digits with a decimal point and an exponent, as `1.5` and `2E10`."""
    mantissa, _, power = text.lower().partition("e")
    whole, _, part = mantissa.partition(".")
    shift = float(power or 0)
    if len(whole) + len(part) + abs(shift) <= EXACT_DIGITS:
        return number(Fraction(text))
    above, below = len(whole) + len(part) + max(0.0, shift), len(part) + max(0.0, -shift)
    return Size(above, below, max(0.0, len(whole.lstrip("0")) + shift), degree=0.0, plain=True)


def add(a: Size, b: Size) -> Size:
    """Sum, difference, or two parts of a list or an equation."""
    if a.exact is not None and b.exact is not None and a.digits + b.digits <= EXACT_DIGITS:
        return number(a.exact + b.exact)
    below = a.below + b.below
    above = max(a.above + b.below, b.above + a.below) + math.log10(2)
    high = max(a.high, b.high) + math.log10(2)
    if a.plain and b.plain:
        return Size(above, below, high, degree=0.0, plain=True)
    apart = a.bottom > 1 or b.bottom > 1
    degree = a.degree + b.degree if apart else max(a.degree, b.degree)
    top, symbols = a.top * b.bottom + b.top * a.bottom, together(a, b)
    return _gathered(Size(above, below, high, top, a.bottom * b.bottom, degree, symbols=symbols))


def multiply(a: Size, b: Size) -> Size:
    """Product."""
    if a.exact is not None and b.exact is not None and a.digits + b.digits <= EXACT_DIGITS:
        return number(a.exact * b.exact)
    plain, degree = a.plain and b.plain, a.degree + b.degree
    above, below, high = a.above + b.above, a.below + b.below, a.high + b.high
    top, bottom, symbols = a.top * b.top, a.bottom * b.bottom, together(a, b)
    return _gathered(Size(above, below, high, top, bottom, degree, plain=plain, symbols=symbols))


def divide(a: Size, b: Size) -> Size:
    """Quotient; a divisor that may be zero is taken for a small number."""
    if b.exact is not None:
        return multiply(a, number(1 / b.exact)) if b.exact else a
    high = b.below if b.plain else b.digits
    return multiply(a, replace(b, above=b.below, below=b.above, high=high, top=b.bottom, bottom=b.top, exact=None))


def raised(base: Size, exponent: Size) -> Size:
    """Power, multiplied out as often as the exponent's bound says."""
    times, known = exponent.bound, exponent.exact
    if base.exact is not None and abs(base.exact) in (0, 1):
        return base
    whole = known is not None and known.denominator == 1
    if whole and base.exact is not None and base.digits * max(1.0, times) <= EXACT_DIGITS:
        return number(base.exact ** int(known))  # type: ignore[arg-type]
    plain = base.plain and whole
    if known is not None and known < 0:
        inverse = raised(base, replace(exponent, exact=-known))
        return divide(number(Fraction(1)), inverse)
    high = base.high * times if known is not None else max(base.high, base.below) * times
    top, bottom = (1.0, 1.0) if base.plain else (_terms(base.top, times), _terms(base.bottom, times))
    if base.wave:
        top = max(top, times + 1)
    degree = 0.0 if plain else max(base.degree, 1.0) * times
    above, below, symbols = base.above * times, base.below * times, together(base, exponent)
    return _gathered(Size(above, below, high, top, bottom, degree, plain=plain, symbols=symbols))


def together(a: Size, b: Size) -> frozenset[str]:
    """The symbols of both; beyond MANY_SYMBOLS nobody counts."""
    return a.symbols if len(a.symbols) > MANY_SYMBOLS else a.symbols | b.symbols


def _gathered(size: Size) -> Size:
    """Like terms together: there are C(degree + n, n) monomials of n symbols."""
    if not 0 < len(size.symbols) <= MANY_SYMBOLS or not size.degree <= MAX_DEGREE:
        return size
    most = float(math.comb(math.ceil(size.degree) + len(size.symbols), len(size.symbols)))
    return replace(size, top=min(size.top, most), bottom=min(size.bottom, most))


def _terms(terms: float, power: float) -> float:
    """Monomials of degree `power` in `terms` of them: C(terms + power - 1, power); infinite where far too many."""
    if terms <= 1 or power <= 1:
        return terms
    if terms > MAX_TERMS or power > MAX_TERMS:
        return math.inf
    return float(math.comb(int(terms) + math.ceil(power) - 1, math.ceil(power)))


def factorial(of: Size) -> Size:
    """n! and Gamma: n log10 n digits; of a symbol and a number, a product of as many factors."""
    n = of.bound
    digits = math.lgamma(n + 1) / math.log(10) + 1 if n < 1e15 else math.inf
    if of.plain:
        return Size(above=digits, high=digits, degree=0.0, plain=of.exact is not None and of.exact.denominator == 1)
    return Size(above=of.digits, high=digits, top=max(1.0, 3 * n) if n > 1 else 1.0, symbols=of.symbols)


def binomial(n: Size, k: Size) -> Size:
    """n over k, which has about k log10 n digits; where k is no integer, it is made of factorials."""
    if n.plain and k.exact is not None and k.exact.denominator > 1:
        return factorial(n)
    times = min(k.bound, abs(float(n.exact - k.exact))) if n.exact is not None and k.exact is not None else k.bound
    natural = n.exact is not None and n.exact.denominator == 1 and n.exact >= 0
    digits = min(times * (n.high + 1), n.bound * math.log10(2) + 1 if natural else math.inf)
    if n.plain and k.plain:
        return Size(above=digits, high=digits, degree=0.0, plain=True)
    top = 3 * max(1.0, times, n.bound)
    return Size(above=n.digits + k.digits, high=digits, top=top, symbols=together(n, k))
