"""Curves of accuracy against synthetic tokens: sums of exponentials by AICc, a logarithm, and their intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls


@dataclass(frozen=True, kw_only=True)
class Curve:
    """y(x) = a - sum_k b_k r_k^x with b_k >= 0 and 0 < r_k < 1; terms sorted by r, slowest first."""

    a: float
    b: tuple[float, ...]
    r: tuple[float, ...]
    aicc: float = float("nan")

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        """The value at x."""
        x = np.asarray(x, dtype=float)
        return self.a - sum(b * np.power(r, x) for b, r in zip(self.b, self.r, strict=True))


# Llama 3 8B on QuALITY, x in millions of synthetic tokens (arXiv 2409.07431v2; secondary source).
PUBLISHED = Curve(a=64.5456, b=(13.8352, 8.4705, 3.9320), r=(0.9989, 0.8961, 0.0546))


def fit_exponentials(x: np.ndarray, y: np.ndarray, num_terms: int, *, num_starts: int = 12) -> Curve:
    """Least squares. The rates are searched from log-spaced starts, a and b solved exactly for each trial.

    Raises:
      ValueError: fewer points than parameters.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 2 * num_terms + 1:
        raise ValueError(f"{num_terms} terms need at least {2 * num_terms + 1} points, got {len(x)}")
    steps = np.diff(np.unique(x))
    slowest, fastest = np.log(0.05 / (x.max() - x.min())), np.log(6.0 / steps.min())

    def solve(log_rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = np.exp(-np.exp(log_rates)[None, :] * x[:, None])
        # a is free and b >= 0: a = a_plus - a_minus makes both parts non-negative.
        design = np.column_stack([np.ones_like(x), -np.ones_like(x), -columns])
        weights, _ = nnls(design, y)
        return weights, design @ weights - y

    rng = np.random.default_rng(0)
    best: tuple[float, np.ndarray] | None = None
    for start in range(num_starts):
        spread = np.linspace(slowest, fastest, num_terms + 2)[1:-1]
        first = spread if start == 0 else np.sort(rng.uniform(slowest, fastest, num_terms))
        found = least_squares(
            lambda log_rates: solve(log_rates)[1],
            first,
            bounds=(slowest - 3, fastest + 3),
            xtol=1e-15,
            ftol=1e-15,
        )
        if best is None or found.cost < best[0]:
            best = (found.cost, found.x)
    assert best is not None
    weights, residual = solve(best[1])
    order = np.argsort(best[1])
    squares = max(float(residual @ residual), 1e-300)
    num_parameters = 2 * num_terms + 2  # a, b, r and the noise
    spare = len(x) - num_parameters - 1
    aicc = len(x) * np.log(squares / len(x)) + 2 * num_parameters
    aicc += 2 * num_parameters * (num_parameters + 1) / spare if spare > 0 else float("inf")
    return Curve(
        a=float(weights[0] - weights[1]),
        b=tuple(weights[2:][order].tolist()),
        r=tuple(np.exp(-np.exp(best[1][order])).tolist()),
        aicc=float(aicc),
    )


def choose_exponentials(x: np.ndarray, y: np.ndarray, max_terms: int = 3) -> Curve:
    """The number of terms with the smallest AICc among those that the points can bear."""
    fits = [fit_exponentials(x, y, k) for k in range(1, max_terms + 1) if len(x) >= 2 * k + 1]
    return min(fits, key=lambda curve: curve.aicc)


def fit_log(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(a, b) of y = a + b ln x."""
    b, a = np.polyfit(np.log(x), y, 1)
    return float(a), float(b)


def bootstrap(
    x: np.ndarray,
    runs: np.ndarray,
    at: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], Curve],
    *,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % band of the fitted curve at `at`, resampling the rows of `runs` [runs, points] (seeds or documents)."""
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(200):
        rows = rng.integers(0, len(runs), len(runs))
        curves.append(fit(x, runs[rows].mean(axis=0))(at))
    low, high = np.quantile(np.array(curves), [0.025, 0.975], axis=0)
    return low, high
