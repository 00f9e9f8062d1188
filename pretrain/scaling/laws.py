"""Laws of loss: each a function in one table, linear in its coefficients once its exponents are given.

    chinchilla      L = E + A N^-alpha + B D^-beta                                     arXiv 2203.15556, eq. 2
    effective_data  the same at D' = U + U R* (1 - exp(-(D/U - 1) / R*))               arXiv 2305.16264, eq. 5
    penalty         the same at D, plus P (D/U - 1) (N/U)                              arXiv 2605.01640, additive

U tokens are different, D are read. In effective_data a token's worth decays by its repetitions and no run gets worse
for repeating; the penalty can turn the curve upward. That paper also discounts excess parameters (its R*_N): left
out, because a ladder that fits on one machine does not identify it. Doubt: of the penalty's published forms ours is
the one-coefficient one as we understand it (both powers 1); we have seen its description, not its equation.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pretrain.scaling.cells import Columns


@dataclasses.dataclass(frozen=True)
class Exponent:
    """A parameter that enters nonlinearly: searched between bounds, in logarithms, from several starts."""

    name: str
    low: float
    high: float
    starts: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Law:
    """`features(exponents, cells)` has a column for each coefficient; coefficients are not negative."""

    name: str
    exponents: tuple[Exponent, ...]
    coefficients: tuple[str, ...]
    features: Callable[[Sequence[float], Columns], np.ndarray]
    repeats: bool = False  # whether it says anything about U

    @property
    def names(self) -> tuple[str, ...]:
        """Exponents, then coefficients."""
        return (*(e.name for e in self.exponents), *self.coefficients)

    def loss(self, values: np.ndarray, cells: Columns) -> np.ndarray:
        """The law at `values` (in the order of `names`); cells need no loss."""
        split = len(self.exponents)
        return self.features(list(values[:split]), cells) @ np.asarray(values[split:], float)


def effective_tokens(tokens: np.ndarray, unique: np.ndarray, half_life: float) -> np.ndarray:
    """D': what D tokens of which U are different are worth in different tokens; U (1 + R*) at most."""
    repetitions = np.maximum(tokens / unique - 1.0, 0.0)
    return unique * (1.0 + half_life * -np.expm1(-repetitions / half_life))


def _chinchilla(exponents: Sequence[float], cells: Columns) -> np.ndarray:
    alpha, beta = exponents
    return np.stack([np.ones(len(cells)), cells.params**-alpha, cells.tokens**-beta], axis=1)


def _effective_data(exponents: Sequence[float], cells: Columns) -> np.ndarray:
    alpha, beta, half_life = exponents
    worth = effective_tokens(cells.tokens, cells.unique, half_life)
    return np.stack([np.ones(len(cells)), cells.params**-alpha, worth**-beta], axis=1)


def _penalty(exponents: Sequence[float], cells: Columns) -> np.ndarray:
    repetitions = np.maximum(cells.tokens / cells.unique - 1.0, 0.0)
    return np.column_stack([_chinchilla(exponents, cells), repetitions * cells.params / cells.unique])


_ALPHA = Exponent("alpha", 0.02, 2.0, (0.15, 0.35, 0.7))
_BETA = Exponent("beta", 0.02, 2.0, (0.15, 0.35, 0.7))
_HALF_LIFE = Exponent("R_star", 0.3, 300.0, (3.0, 20.0))

LAWS = {
    law.name: law
    for law in (
        Law("chinchilla", (_ALPHA, _BETA), ("E", "A", "B"), _chinchilla),
        Law("effective_data", (_ALPHA, _BETA, _HALF_LIFE), ("E", "A", "B"), _effective_data, repeats=True),
        Law("penalty", (_ALPHA, _BETA), ("E", "A", "B", "P"), _penalty, repeats=True),
    )
}
