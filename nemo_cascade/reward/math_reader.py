r"""How large would a comparison of this answer get? An upper bound from its text alone, before any algebra.

`2^{100}`, `1000!` and `(x+1)^5` are answers; `9^{9^{9}}`, `\binom{10^9}{10^8}` and `(a+b+c+d)^{99}` would keep a
computer algebra system busy for seconds or for ever. A small reader goes through the text (LaTeX, plain or Unicode) and
bounds every intermediate result (`math_size`). It is tolerant: what it does not know is a symbol, and where a text can
be read in two ways it takes the larger. What it misjudges is told apart by its value (`math_worker.differ`) or meets
the CPU limit.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import replace
from fractions import Fraction

from nemo_cascade.reward.math_size import (
    MAX_DEGREE,
    MAX_DIGITS,
    MAX_FACTORED_DIGITS,
    MAX_ROOT_DIGITS,
    MAX_TERMS,
    E,
    Size,
    add,
    binomial,
    divide,
    factorial,
    literal,
    multiply,
    number,
    raised,
    symbol,
    together,
)

MAX_DEPTH = 12  # of brackets: each level may double the work of the LaTeX parser
MAX_LEVEL = 26  # of arguments inside each other, two for each bracket: functions need none

_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f\u2071"  # superscripts
_SUPERSCRIPTS, _SUPERSCRIPT = str.maketrans(_RAISED, "0123456789+-ni"), re.compile(f"[{_RAISED}]+")
_SIGNS = {
    "\u221a": r"\sqrt ", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2217": "*",
    "\u00f7": r"\div ", "\u2211": r"\sum ", "\u220f": r"\prod ", "\u222b": r"\int ", "\u2212": "-", "\u2044": "/",
    "\u2215": "/", "\u0393": r"\Gamma ",
}  # fmt: skip
_SPACES = re.compile(r"(?<=\d)(?:\s|~|\\[,;:! ]|\{,\}|,(?=\d{3}(?!\d)))+(?=\d)")  # within a number
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|bb|cal|sf))\s*\{([^{}]*)\}")

UNWORKED = ("limsup", "liminf", "lim", "iiint", "iint", "int", "oint", "sum", "prod", "coprod", "det")
_BUILDERS = frozenset(
    "eye zeros ones diag hstack vstack orth ortho orthogonal orthogonalize rank trace tr rref nullspace norm cols rows "
    "eig eigen diagonalize eigenvals eigenvalues eigenvects eigenvectors svd SVD det".split()
)
_FRACTIONS, _BINOMIALS = ("frac", "dfrac", "tfrac", "cfrac"), ("binom", "dbinom", "tbinom", "binomial")
_WAVES = tuple(f"{arc}{name}{tail}" for arc in ("arc", "a", "") for name in ("sin", "cos", "tan", "csc", "sec", "cot")
               for tail in ("h", ""))  # fmt: skip
_FUNCTIONS = (*_WAVES, "log", "ln", "lg", "exp", "factorial", "Gamma", "gamma", "operatorname", "sqrt")
_MULTIPLY, _DIVIDE = ("cdot", "times", "ast", "*"), ("div", "/", ":")
_SILENT = frozenset(
    r"\left \right \middle \limits \nolimits \displaystyle \textstyle \quad \qquad \big \Big \bigg \Bigg "
    r"\bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \, \; \: \! ~ $ \$".split()
) | {"\\ "}
_OPEN = frozenset(("(", "[", "{", r"\{", r"\lfloor", r"\lceil", r"\langle", r"\lvert", r"\lVert", r"\begin"))
_CLOSE = frozenset((")", "]", "}", r"\}", r"\rfloor", r"\rceil", r"\rangle", r"\rvert", r"\rVert", r"\end"))
_FLOORS = (r"\lfloor", r"\lceil")
_BARS = frozenset(("|", r"\|", r"\vert", r"\Vert"))
_APART = frozenset(
    "+ - , ; = < > & \\\\ \\pm \\mp \\le \\leq \\ge \\geq \\ne \\neq \\to \\in \\cup \\cap \\lt \\gt \\approx \\equiv "
    "\\iff \\implies \\mid \\pmod \\bmod \\mod \\land \\lor \\wedge \\vee \\setminus \\sim".split()
)
_ENDS = _CLOSE | _APART | {r"\choose"}
_KNOWN = sorted(
    {*UNWORKED, *_FRACTIONS, *_BINOMIALS, *_FUNCTIONS, "choose", "pi", "infty", "begin", "end", "degree", "prime"}
    | {name for name in (*_MULTIPLY, *_DIVIDE) if name.isalpha()}
    | {name[1:] for name in _SILENT | _OPEN | _CLOSE | _BARS | _APART if name[:1] == "\\" and name[1:].isalpha()},
    key=len,
    reverse=True,
)
_TOKEN = re.compile(
    r"\s+|\\(?:" + "|".join(_KNOWN) + r")|\\[A-Za-z]+|\\.|\*\*|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    r"|(?<![A-Za-z])(?:sqrt|factorial|binomial|binom|gamma|exp|log|ln|sin|cos|tan)(?=\s*\()|.",
    re.DOTALL,
)  # a parser by longest match reads \sumk as \sum k, and so do we


class _TooLarge(Exception):
    """Ends the reading; its text says why."""


class Reader:
    """Reads one answer. Afterwards `too_large` says why it should not even be evaluated, `dear` why it should not be
    simplified, which only what holds letters has to be, and `unworked` whether it leaves work for the grader: a limit,
    an integral, a sum, a product, a determinant.
    """

    def __init__(self, text: str) -> None:
        self.too_large, self.dear, self.unworked = "", "", False
        self._letters = False
        tokens = _TOKEN.findall(_plain(text))
        self._tokens = [token for token in tokens if not token.isspace() and token not in _SILENT]
        self._at = self._depth = self._level = 0
        self._longest, self._factoring = 0.0, 0
        try:
            self._read()
        except _TooLarge as found:
            self.too_large = str(found)
        self.dear = self.dear if self._letters else ""

    def _read(self) -> None:
        whole = number(Fraction(0))
        while self._at < len(self._tokens):  # what closes without having been opened separates
            whole = self._note(add(whole, self._sum()))
            self._at += 1
        if self._factoring > 1 and self._longest > MAX_FACTORED_DIGITS:
            self.dear = self.dear or f"an integer to factor of more than {MAX_FACTORED_DIGITS} digits"

    def _note(self, size: Size) -> Size:
        """Every intermediate result passes here."""
        if max(size.above, size.below, size.high) > MAX_DIGITS:
            raise _TooLarge(f"a number of more than {MAX_DIGITS} digits")
        if max(size.top, 2 * size.bottom) > MAX_TERMS:
            self.dear = self.dear or f"more than {MAX_TERMS} terms when multiplied out"
        if size.bottom > 1 and size.degree > MAX_DEGREE:
            self.dear = self.dear or f"a quotient of degree above {MAX_DEGREE}"
        self._longest = max(self._longest, size.digits)
        return size

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._at += 1
        return token

    def _sum(self, bar: bool = False) -> Size:
        """Terms up to a closing bracket, or to the bar that ends an absolute value."""
        total: Size | None = None
        while (token := self._next()) and token not in _CLOSE and not (bar and token in _BARS):
            if token in _APART:
                self._at += 1
                continue
            if token == r"\choose":  # of all before it and all behind
                self._at += 1
                self._deeper()
                upper, lower = total if total is not None else number(Fraction(1)), self._sum(bar)
                self._level -= 1
                total = self._binomial(upper, lower)
                continue
            term = self._product(bar)
            total = term if total is None else self._note(add(total, term))
        return total if total is not None else number(Fraction(0))

    def _product(self, bar: bool) -> Size:
        product: Size | None = None
        divided = False
        while (token := self._next()) and token not in _ENDS and not (bar and token in _BARS):
            name = token.removeprefix("\\")
            if name in _MULTIPLY or name in _DIVIDE:
                divided = name in _DIVIDE
                self._at += 1
                continue
            factor = self._factor()
            combine = divide if divided else multiply
            product = self._note(factor if product is None else combine(product, factor))
            divided = False
        return product if product is not None else number(Fraction(1))

    def _factor(self) -> Size:
        """A base with its exponents, factorials and subscripts."""
        opened = self._next()
        base = self._argument()
        while (token := self._next()) in ("^", "**", "!", "_", "'"):
            self._at += 1
            if token == "!":
                base = self._factorial(base)
            elif token == "_":
                self._argument()
                if opened == "(":  # (n)_k is read as n!/(n-k)!
                    self._factorial(base)
            elif token in ("^", "**"):
                base = self._powers(base)
        return self._note(base)

    def _powers(self, base: Size) -> Size:
        """A chain such as 9^9^9: read from the left and from the right, the larger counts."""
        exponents = [self._exponent()]
        while self._next() in ("^", "**"):
            self._at += 1
            exponents.append(self._exponent())
        left = base
        for exponent in exponents:
            left = self._note(raised(left, exponent))
        tower = exponents[-1]
        for exponent in reversed(exponents[:-1]):
            tower = self._note(raised(exponent, tower))
        self._note(raised(base, tower))
        if self._next() == "!":  # of the exponent or of the whole
            self._note(raised(base, factorial(tower)))
        return left

    def _exponent(self) -> Size:
        minus = False
        while self._next() in ("+", "-"):
            minus ^= self._take() == "-"
        value = self._argument()
        return replace(value, exact=-value.exact) if minus and value.exact is not None else value

    def _argument(self) -> Size:
        """What belongs to a command or an exponent: a group, or one symbol or number, without what follows it."""
        self._deeper()
        found = self._base()
        self._level -= 1
        return found

    def _deeper(self) -> None:
        self._level += 1
        if self._level > MAX_LEVEL:
            raise _TooLarge(f"more than {MAX_LEVEL} functions inside each other")

    def _base(self) -> Size:
        if self._next() in _CLOSE:
            return number(Fraction(1))
        token = self._take()
        if token in _OPEN or token in _BARS:
            return self._group(token)
        if token[:1].isdecimal() or (token[:1] == "." and len(token) > 1):
            return self._note(literal(token))
        name = token.removeprefix("\\")
        if token in ("-", "+"):
            return self._factor()
        if name in _FRACTIONS:
            above = self._argument()
            return self._note(divide(above, self._argument()))
        if name in _BINOMIALS:
            return self._pair()
        if name in _FUNCTIONS and (token != name or len(name) > 1):
            return self._function(name)
        if name in UNWORKED and token != name:
            return self._task(name)
        if token == "e":
            return E
        self._letters |= name.isalpha() and name not in ("i", "pi", "\u03c0", "infty")
        return symbol(name, math.log10(4) if name in ("pi", "\u03c0") else 0.0)

    def _group(self, opened: str) -> Size:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooLarge(f"more than {MAX_DEPTH} brackets inside each other")
        matrix = opened == r"\begin"
        kind = self._environment() if matrix else ""
        start = self._at
        found = self._sum(bar=opened in _BARS)
        self._at += 1
        self._depth -= 1
        if opened in _FLOORS and max(found.digits, found.high) > MAX_ROOT_DIGITS:
            self.dear = self.dear or f"a floor of more than {MAX_ROOT_DIGITS} digits"
        if not matrix:
            return found
        rows = 1 + self._tokens[start : self._at].count("\\\\")
        self._environment()
        if kind == "vmatrix":
            found = self._note(replace(found, top=found.top * math.factorial(min(rows, 20)) / rows))
        elif self._next() in ("^", "**") and "".join(self._tokens[self._at + 1 : self._at + 4]).strip("{}") != "T":
            raise _TooLarge("a power of a matrix")
        return found

    def _environment(self) -> str:
        """The name in braces after begin or end."""
        if self._next() != "{":
            return ""
        end = next((at for at in range(self._at, len(self._tokens)) if self._tokens[at] == "}"), self._at)
        name = "".join(self._tokens[self._at + 1 : end])
        self._at = end + 1
        return name

    def _pair(self) -> Size:
        if self._next() == "(":  # binomial(n, k)
            self._at += 1
            upper = self._product(bar=False)
            self._at += self._next() == ","
            lower = self._product(bar=False)
            self._at += self._next() == ")"
        else:
            upper = self._argument()
            lower = self._argument()
        return self._binomial(upper, lower)

    def _task(self, name: str) -> Size:
        """A limit, an integral, a sum, a product: bounds, then the body. A product has a factor for each step."""
        self.unworked = True
        steps = symbol(name)
        while self._next() in ("_", "^"):
            if self._take() == "_":
                self._argument()
            else:
                steps = self._exponent()
        body = self._factor() if self._at < len(self._tokens) else symbol(name)
        if name in ("sum", "prod"):  # as often as there are steps: a product of the last, a sum of its powers
            step = replace(multiply(body, steps), exact=None)
            powers = math.ceil(body.degree) if body.degree < MAX_DIGITS else MAX_DIGITS
            times = steps if name == "prod" else number(Fraction(powers + 1))
            body = replace(raised(step, times), top=body.top, bottom=body.bottom, degree=body.degree)
        return self._note(body)

    def _factorial(self, of: Size) -> Size:
        self._factoring += 0 if of.plain else 2
        return self._note(factorial(of))

    def _binomial(self, n: Size, k: Size) -> Size:
        self._factoring += 0 if n.plain and k.plain else 2
        return self._note(binomial(n, k))

    def _function(self, name: str) -> Size:
        power: Size | None = None
        if name == "operatorname":
            name = self._environment() if self._next() == "{" else ""
        index = self._argument_in_brackets() if name == "sqrt" else number(Fraction(2))
        while self._next() in ("^", "_"):
            if self._take() == "^":
                power = self._exponent()
            else:
                self._argument()
        if name in _BUILDERS:
            self.unworked = True
        closed = name == "sqrt" or self._next() in _OPEN  # \sin(x)^2 is the square of the sine
        argument = self._argument() if closed else self._factor()
        value = self._note(self._applied(name, argument, index))
        return value if power is None else self._note(raised(value, power))

    def _argument_in_brackets(self) -> Size:
        if self._next() != "[":
            return number(Fraction(2))
        self._at += 1
        return self._group("[")

    def _applied(self, name: str, argument: Size, index: Size) -> Size:
        symbols = together(argument, symbol(f"{name} {self._at}"))
        if name == "sqrt":
            if argument.plain and argument.digits > MAX_ROOT_DIGITS:
                self.dear = self.dear or f"a root of more than {MAX_ROOT_DIGITS} digits"
            root = raised(argument, divide(number(Fraction(1)), index))
            return replace(root, symbols=symbols, degree=max(1.0, root.degree))
        if name == "exp":
            return raised(E, argument)
        if name in ("factorial", "Gamma", "gamma"):
            return self._factorial(argument)
        wave = name in _WAVES
        if wave and argument.degree > MAX_DEGREE:
            self.dear = self.dear or f"a {name} of degree above {MAX_DEGREE}"
        self._factoring += name in ("log", "ln", "lg")
        top = 1.0 if argument.plain or not wave else 4.0 ** (min(argument.top, 9.0) - 1)
        return Size(argument.above, argument.below, argument.high, top, wave=wave, symbols=symbols)


def _plain(text: str) -> str:
    """One alphabet: superscripts as powers, compatibility forms as ASCII, numbers without separators, words apart."""
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{found.group().translate(_SUPERSCRIPTS)}}}", text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = unicodedata.normalize("NFKC", text).translate(_digits(text))
    return _SPACES.sub("", _TEXT.sub(r" \1 ", text))


def _digits(text: str) -> dict[int, str]:
    """Digits of other scripts as ASCII."""
    return {ord(char): str(unicodedata.digit(char)) for char in set(text) if char.isdecimal() and not char.isascii()}
