"""Noise is a fact: how large it is, when a difference is one, and how much of the best is luck.

The rule: screen with one run, and go on when the gain exceeds half a sigma0; confirm on 3, 5 and then 8 fresh seeds, paired with
the baseline on the same seeds; promote when the one-sided 97.5 % lower bound of the mean gain exceeds `min_delta`. The
screening run never enters the confirming mean, because it was selected for being lucky.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

SCREEN_SIGMAS = 0.5
CONFIRM_SEEDS = (3, 5, 8)  # looks at this many paired seeds
CONFIDENCE = 0.975
# At three seeds a test at 97.5 % would rarely see three times the noise, and promote 13 % of such nulls; at 90 % it is 5 %.
SCATTER_CONFIDENCE = 0.9


@dataclasses.dataclass(frozen=True)
class Noise:
    """The standard deviation of the metric over seeds, and from how many repeats it was estimated."""

    sigma: float
    num_repeats: int

    @classmethod
    def of(cls, metrics: Sequence[float]) -> "Noise":
        """Estimate from repeats of the baseline; at least two."""
        return cls(float(np.std(metrics, ddof=1)), len(metrics))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Where a candidate stands after some paired seeds. Gains are positive when better."""

    decision: str  # promote, reject, continue
    mean: float
    lower: float
    upper: float
    num_seeds: int


def gain(candidate: float, baseline: float, higher_is_better: bool) -> float:
    """How much better, whatever the metric's direction."""
    return candidate - baseline if higher_is_better else baseline - candidate


def passes_screen(screen_gain: float, noise: Noise) -> bool:
    """Whether one run is promising enough to confirm."""
    return screen_gain > SCREEN_SIGMAS * noise.sigma


def judge_gains(gains: Sequence[float], noise: Noise, min_delta: float, *, is_last: bool) -> Verdict:
    """The verdict after paired gains on fresh seeds.

    The interval uses sigma0 from the baseline's repeats (Student's t with their degrees of freedom) and takes the noise of
    candidate and baseline as independent: common seeds can only make it narrower, so this errs on the safe side. A candidate
    whose own gains scatter more than that (an F test at SCATTER_CONFIDENCE) is judged by its own scatter, when that is wider.
    """
    count = len(gains)
    mean = float(np.mean(gains))
    half = student_t_quantile(CONFIDENCE, noise.num_repeats - 1) * noise.sigma * math.sqrt(2.0 / count)
    scatter = float(np.std(gains, ddof=1)) if count > 1 else 0.0
    if scatter**2 > f_quantile(SCATTER_CONFIDENCE, count - 1, noise.num_repeats - 1) * 2.0 * noise.sigma**2:
        half = max(half, student_t_quantile(CONFIDENCE, count - 1) * scatter / math.sqrt(count))
    lower, upper = mean - half, mean + half
    if lower > min_delta:
        decision = "promote"
    elif upper < min_delta or is_last:
        decision = "reject"
    else:
        decision = "continue"
    return Verdict(decision, mean, lower, upper, count)


def confirm(run_pairs: Callable[[int, int], Sequence[float]], noise: Noise, min_delta: float) -> Verdict:
    """Judge at each look; `run_pairs(first, last)` returns the gains on paired seeds first..last-1."""
    gains: list[float] = []
    for index, count in enumerate(CONFIRM_SEEDS):
        gains += run_pairs(len(gains), count)
        verdict = judge_gains(gains, noise, min_delta, is_last=index == len(CONFIRM_SEEDS) - 1)
        if verdict.decision != "continue":
            return verdict
    raise AssertionError("the last look decides")


def posterior_mean(mean_gain: float, num_runs: int, noise: Noise, prior_sigma: float) -> float:
    """Shrink a gain towards zero under a normal prior: what is left of a lucky best."""
    variance = 2.0 * noise.sigma**2 / num_runs
    if variance == 0.0:
        return mean_gain
    return mean_gain * prior_sigma**2 / (prior_sigma**2 + variance)


def estimate_prior_sigma(gains: Sequence[float], noise: Noise) -> float:
    """Spread of the true gains: the variance of screened ones less the noise's share (never below a hundredth of it).

    A screened gain is one run less the mean of the baseline's repeats.
    """
    if len(gains) < 2:
        return noise.sigma
    observed = float(np.mean(np.square(gains)))
    return math.sqrt(max(observed - (1.0 + 1.0 / noise.num_repeats) * noise.sigma**2, 0.01 * observed))


def luck_of_best(count: int) -> float:
    """Expected maximum of `count` standard normals: the gain of the best of that many null candidates, in sigmas."""
    if count < 2:
        return 0.0
    x = np.linspace(-10.0, 10.0, 20_001)
    cdf = 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    # E[max] = integral of x d(cdf^n) = integral over x > 0 of (1 - F^n) minus over x < 0 of F^n
    power = cdf**count
    step = float(x[1] - x[0])
    return float(np.sum(np.where(x > 0, 1.0 - power, -power)) * step)


def student_t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t, by bisection on its distribution function."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if 1.0 - 0.5 * _incomplete_beta(degrees / (degrees + middle * middle), 0.5 * degrees, 0.5) < p:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def f_quantile(p: float, above: int, below: int) -> float:
    """The p-quantile of the F distribution of a ratio of variances with `above` and `below` degrees of freedom."""
    if above < 1:
        return math.inf
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = 0.5 * (low + high)
        if _incomplete_beta(above * middle / (above * middle + below), 0.5 * above, 0.5 * below) < p:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function by Lentz's continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(1.0 - x, b, a)
    front = (
        math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
        / a
    )
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    total = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + numerator * d)
            c = 1.0 + numerator / c
            total *= c * d
        if abs(c * d - 1.0) < 1e-12:
            break
    return front * total


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of a mean by Student's t; the interval is the value itself for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = (
        student_t_quantile(0.5 + confidence / 2, len(values) - 1)
        * float(np.std(values, ddof=1))
        / math.sqrt(len(values))
    )
    return mean, mean - half, mean + half


# --- successive halving ------------------------------------------------------------------------------


class Halving:
    """Asynchronous successive halving over programs: a candidate climbs when it is in the top 1/eta of its rung.

    Scores are the judge's, on a run of the rung's length; a streamed loss may stop a run but never scores it.
    """

    def __init__(self, num_rungs: int, eta: int = 3):
        self._scores: list[dict[str, float]] = [{} for _ in range(num_rungs)]
        self._climbed: list[set[str]] = [set() for _ in range(num_rungs)]
        self._eta = eta

    def tell(self, name: str, rung: int, score: float) -> None:
        """Record a score (higher is better) at a rung."""
        self._scores[rung][name] = score

    def climbers(self) -> list[tuple[str, int]]:
        """Candidates that may run at the next rung now, highest rung first; each is returned once."""
        found = []
        for rung in range(len(self._scores) - 2, -1, -1):
            scores = self._scores[rung]
            ranked = sorted(scores, key=lambda name: (-scores[name], name))
            for name in ranked[: len(ranked) // self._eta]:
                if name not in self._climbed[rung]:
                    self._climbed[rung].add(name)
                    found.append((name, rung + 1))
        return found

    def place(self, name: str, rung: int) -> tuple[int, int]:
        """(place from 1, how many) of a scored candidate at a rung; ties by name."""
        scores = self._scores[rung]
        ranked = sorted(scores, key=lambda other: (-scores[other], other))
        return ranked.index(name) + 1, len(ranked)

    def killed(self) -> list[tuple[str, int]]:
        """Candidates that stay below: (name, the rung they ended at)."""
        return [
            (name, rung)
            for rung in range(len(self._scores) - 1)
            for name in self._scores[rung]
            if name not in self._climbed[rung]
        ]
