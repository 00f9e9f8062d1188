"""Rewards as pure functions of a problem and a text; a text that plays with the checker earns nothing.

Answers are read by small grammars, numbers compared as fractions. Nothing a model writes is evaluated.
"""

import dataclasses
import re
from fractions import Fraction
from typing import Literal, Protocol

from pretrain.config import ConfigError, stable_seed
from pretrain.rl.expression import read_expression
from pretrain.rl.problem import Problem


class Reward(Protocol):
    """A pure function; its values can be pickled, since it runs in a process of its own."""

    def __call__(self, problem: Problem, text: str) -> float: ...


_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\$?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<decimals>\d+))?(?:/(?P<below>\d+))?(?P<percent>%?)"
)
# Of TeX: no space after a comma, and the strokes before $ and %.
_TEX_NUMBER = re.compile(r"\\!\s*|\\(?=[$%])")
# Longer numbers are no answers to problems of this kind, and cost time without end.
_MAX_CHARACTERS = 40


def read_number(text: str) -> Fraction | None:
    r"""The number that `text` is: digits with or without thousands commas, decimals, a/b, percent; else None.

    As TeX writes them too: \$1,\!234 and 12\%.
    """
    text = text.strip().rstrip(".").strip()
    if not 0 < len(text) <= _MAX_CHARACTERS or not text.isascii():
        return None
    found = _NUMBER.fullmatch(_TEX_NUMBER.sub("", text))
    if found is None or (found["whole"] is None and found["decimals"] is None):
        return None
    if found["below"] is not None and (found["decimals"] is not None or int(found["below"]) == 0):
        return None
    value = Fraction((found["whole"] or "0").replace(",", ""))
    if found["decimals"] is not None:
        value += Fraction(int(found["decimals"]), 10 ** len(found["decimals"]))
    if found["below"] is not None:
        value /= int(found["below"])
    if found["percent"]:
        value /= 100
    return -value if found["sign"] == "-" else value


# TeX sets all of these as a box: \boxed {7} beside \boxed{8} is two answers. \mbox has no frame, units stand in it.
_BOX = re.compile(r"\\(?!mbox(?![a-zA-Z]))[a-zA-Z]*box(?:ed)?(?![a-zA-Z])")
# Between a word and another it parts them; elsewhere it says nothing.
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def _whole(text: str) -> str | None:
    return text


def _after_hashes(text: str) -> str | None:
    """What follows the only `####`, up to the end of its line."""
    parts = text.split("####")
    return parts[1].split("\n")[0] if len(parts) == 2 else None


def _boxed(text: str) -> str | None:
    r"""The content of the only \boxed{..}; several boxes are no answer, however they are spelled."""
    parts = text.split("\\boxed{")
    if len(parts) != 2 or len(_BOX.findall(text)) != 1:
        return None
    depth = 1
    for place, character in enumerate(parts[1]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return parts[1][:place]
    return None


def _plain(text: str) -> str:
    return _IDLE_SPACE.sub("", " ".join(text.split()))


_PLACES = {"whole": _whole, "hashes": _after_hashes, "boxed": _boxed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberReward:
    """1 when the answer is the right number, `format_reward` when it is another number in the right place, else 0.

    Raises ValueError where the problem's own answer is no number: such a problem could not be solved.
    """

    place: Literal["whole", "hashes", "boxed"] = "whole"
    format_reward: float = 0.0

    def __post_init__(self):
        if self.place not in _PLACES:
            raise ConfigError(f"place must be one of {', '.join(_PLACES)}, got {self.place!r}")
        if not 0 <= self.format_reward < 1:
            raise ConfigError(f"format_reward must lie in [0, 1), got {self.format_reward}")

    def __call__(self, problem: Problem, text: str) -> float:
        expected = read_number(problem.answer)
        if expected is None:
            raise ValueError(
                f"{problem.id} must have a number as its answer, got {problem.answer[:80]!r}; ExpressionReward reads more"
            )
        answer = _PLACES[self.place](text)
        value = None if answer is None else read_number(answer)
        if value is None:
            return 0.0
        return 1.0 if value == expected else self.format_reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpressionReward:
    """`NumberReward` for answers like those of MATH: fractions, roots, polynomials, points; see expression.py.

    Numbers are compared as fractions, other answers by their values; a reference that cannot be read is met by its own
    characters alone, white space that parts no words aside.
    """

    place: Literal["whole", "hashes", "boxed"] = "boxed"
    format_reward: float = 0.0

    def __post_init__(self):
        NumberReward(place=self.place, format_reward=self.format_reward)  # the same rules

    def __call__(self, problem: Problem, text: str) -> float:
        answer = _PLACES[self.place](text)
        if answer is None:
            return 0.0
        number, expected_number = read_number(answer), read_number(problem.answer)
        if number is not None and expected_number is not None:
            return 1.0 if number == expected_number else self.format_reward
        value, expected = read_expression(answer), read_expression(problem.answer)
        if expected is None:
            return 1.0 if _plain(answer) == _plain(problem.answer) else 0.0
        if value is None:
            return 0.0
        return 1.0 if value.equals(expected) else self.format_reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomReward:
    """1 with a fixed chance, whatever the text: the control that must teach nothing."""

    chance: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.chance <= 1:
            raise ConfigError(f"chance must lie in [0, 1], got {self.chance}")

    def __call__(self, problem: Problem, text: str) -> float:
        return float(stable_seed("reward", self.seed, problem.id, text) < self.chance * 2**63)
