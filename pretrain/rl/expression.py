r"""Answers that are expressions: a small grammar of LaTeX and plain text, compared by their values at drawn points.

Two expressions are equal when they agree at several random values of their variables (Schwartz 1980: polynomials that
differ agree almost nowhere). Values are fractions, compared exactly, until a root or pi makes them complex numbers. The
grammar is all there is: no text of a model reaches `eval`, sympy or another interpreter.

    value   = sum | bracket sum ("," sum)+ bracket           tuples, points, intervals: brackets must agree
    sum     = term (("+" | "-") term)*
    term    = power (("*" | "/" | "\cdot" | "\times" | "\div" | nothing) power)*
    power   = ("-" | "+") power | atom ("^" power)?
    atom    = number | letter | "\pi" | "(" sum ")" | "{" sum "}" | "\frac" atom atom | "\sqrt" ("[" sum "]")? atom

"Nothing" is a product only before a letter, a bracket or a command: `5 5` is two answers and no expression.
"""

import cmath
import dataclasses
import functools
import math
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from pretrain.config import stable_seed

Value = Fraction | complex

_MAX_CHARACTERS, _MAX_DEPTH, _MAX_EXPONENT = 200, 30, 64
_MAX_BITS = 4096  # of a numerator or denominator: fractions beyond are no answers, and cost time without end
_NUM_POINTS = 4
# Rounding of a few dozen operations on float64; a decimal for a root must be given to as many places.
_TOLERANCE = 1e-11
_DROPPED = re.compile(
    r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: $]|\$|\^\s*\{?\\circ\}?|\\displaystyle(?![a-zA-Z])"
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[a-zA-Z]+)|(?P<letter>[a-zA-Z])|(?P<sign>[-+*/^(){}\[\],]))"
)
_PRODUCTS = {"*": "*", "\\cdot": "*", "\\times": "*", "/": "/", "\\div": "/"}
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac")


class Unreadable(ValueError):
    """The text is no expression of this grammar."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was read: brackets ("" for a plain expression) and for each part its values at the drawn points."""

    brackets: str
    values: tuple[tuple[Value, ...], ...]

    def equals(self, other: "Answer") -> bool:
        """Whether all parts agree at all points."""
        if self.brackets != other.brackets or len(self.values) != len(other.values):
            return False
        pairs = [
            pair
            for mine, theirs in zip(self.values, other.values, strict=True)
            for pair in zip(mine, theirs, strict=True)
        ]
        return all(_equal(a, b) for a, b in pairs)


def read_expression(text: str) -> Answer | None:
    """The answer that `text` is, None when it is none of this grammar or has no finite value."""
    text = text.strip().rstrip(".").strip()
    if not 0 < len(text) <= _MAX_CHARACTERS or not text.isascii():
        return None
    try:
        tokens = _tokens(_DROPPED.sub(" ", text))
        parts, brackets = _parts(tokens)
        values = tuple(tuple(_Parser(part, point).all() for point in _points()) for part in parts)
    except (Unreadable, OverflowError, ZeroDivisionError):
        return None
    if not all(isinstance(value, Fraction) or cmath.isfinite(value) for part in values for value in part):
        return None
    return Answer(brackets, values)


def _equal(left: Value, right: Value) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    try:
        left, right = complex(left), complex(right)
    except OverflowError:  # a fraction beyond all floats
        return False
    return abs(left - right) <= _TOLERANCE * max(1.0, abs(left), abs(right))


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
            raise Unreadable("a fraction beyond all answers")
    return value


@functools.cache
def _points() -> list[Mapping[str, Fraction]]:
    """The same values of all letters for every text; away from 0 and 1, where much is equal."""
    rngs = [random.Random(stable_seed("expression", number)) for number in range(_NUM_POINTS)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [{letter: Fraction(rng.randint(1110, 3027), 1009) for letter in letters} for rng in rngs]


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise Unreadable(text[at:])
        tokens.append(found[0].strip())
        at = found.end()
    return tokens


def _parts(tokens: Sequence[str]) -> tuple[list[Sequence[str]], str]:
    """The parts of a tuple and its two brackets, or the whole and nothing."""
    depth, commas = 0, []
    for place, token in enumerate(tokens):
        depth += (token in "([{") - (token in ")]}")
        if token == "," and depth == 1:
            commas.append(place)
    if not commas or tokens[0] not in "([" or tokens[-1] not in ")]":
        return [tokens], ""
    ends = [0, *commas, len(tokens) - 1]
    return [tokens[a + 1 : b] for a, b in zip(ends[:-1], ends[1:], strict=True)], tokens[0] + tokens[-1]


def _raised(base: Value, exponent: Value) -> Value:
    """`base` to the power of `exponent`, a fraction when both say so."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if (bits - 1) * abs(exponent) > _MAX_BITS:  # at least so many bits: not computed to find out
            raise Unreadable("a power beyond all answers")
        return _bounded(base ** int(exponent))
    return complex(base) ** complex(exponent)


class _Parser:
    """Recursive descent that computes as it reads, with the letters at one point."""

    def __init__(self, tokens: Sequence[str], point: Mapping[str, Fraction]):
        self._tokens, self._point, self._at, self._depth = list(tokens), point, 0, 0

    def all(self) -> Value:
        value = self._sum()
        if self._at < len(self._tokens):
            raise Unreadable(self._tokens[self._at])
        return value

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._next()
        if not token or (expected and token != expected):
            raise Unreadable(token)
        self._at += 1
        return token

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        value = self._term()
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self._term())
        self._depth -= 1
        return value

    def _term(self) -> Value:
        value = self._power()
        while token := self._next():
            if token in _PRODUCTS:
                by_division = _PRODUCTS[self._take()] == "/"
                factor = self._power()
                value = _bounded(value / factor if by_division else value * factor)
            elif token.isalpha() or token in "({" or (token.startswith("\\") and token not in _FRACTIONS):
                value = _bounded(value * self._power())
            else:
                return value
        return value

    def _power(self) -> Value:
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        value = self._atom()
        if self._next() == "^":
            self._take()
            exponent = self._exponent()
            if abs(exponent) > _MAX_EXPONENT:
                raise Unreadable("an exponent beyond all answers")
            value = _raised(value, exponent)
        return sign * value

    def _exponent(self) -> Value:
        """TeX takes one character or a group; `^` groups to the right."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        value = self._power()
        self._depth -= 1
        return value

    def _atom(self) -> Value:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            if self._next() in _FRACTIONS:  # a mixed number, 2\frac{1}{2}
                self._take()
                return _bounded(Fraction(token) + self._fraction())
            return Fraction(token)
        if token in ("(", "{"):
            value = self._sum()
            self._take(")" if token == "(" else "}")
            return value
        if token in _FRACTIONS:
            return self._fraction()
        if token == "\\sqrt":
            degree: Value = Fraction(2)
            if self._next() == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            return _raised(self._argument(), 1 / degree)
        if token == "\\pi":
            return math.pi
        if token.isalpha():
            return self._point[token]
        raise Unreadable(token)

    def _fraction(self) -> Value:
        above = self._argument()
        return _bounded(above / self._argument())

    def _argument(self) -> Value:
        """A group, or a digit by itself as in \\frac12."""
        token = self._next()
        if token.isdigit() and len(token) > 1:
            self._tokens[self._at : self._at + 1] = list(token)
        return self._atom()
