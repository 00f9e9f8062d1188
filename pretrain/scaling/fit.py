"""Fits of a law to cells by variable projection, with bootstrap intervals and a list of what the data do not support.

Given its exponents a law is linear, so the coefficients follow from a non-negative least-squares solve and only the
exponents are searched (Golub and Pereyra 1973). Residuals are relative, (fit - loss) / loss; those beyond
`huber_sigmas` robust standard deviations count linearly, by reweighting. Intervals: residual bootstrap, the residuals
of the fit divided by sqrt(1 - leverage) and dealt out anew with random signs. It keeps the design: drawing cells with
replacement leaves out whole sizes, and a fit without its largest size is about another question. Its assumption is
that relative noise has one size everywhere; seeds on the smallest budget are there to look at that.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.optimize import least_squares, nnls

from pretrain.config import ConfigError
from pretrain.scaling.cells import Columns
from pretrain.scaling.laws import LAWS, Law

_ROUNDS = 6  # of reweighting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How intervals are made. `confidence` 0.9 means from the 5th to the 95th percentile."""

    num_bootstrap: int = 300
    confidence: float = 0.9
    seed: int = 0
    huber_sigmas: float = 3.0

    def __post_init__(self):
        faults = []
        if self.num_bootstrap < 20:
            faults.append(f"fit.num_bootstrap must be at least 20, got {self.num_bootstrap}")
        if not 0 < self.confidence < 1:
            faults.append(f"fit.confidence must lie in (0, 1), got {self.confidence}")
        if self.huber_sigmas <= 0:
            faults.append(f"fit.huber_sigmas must be positive, got {self.huber_sigmas}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. `samples` [bootstrap, parameter] in the order of `law.names`.

    Attributes:
      sigma: standard deviation of the relative residuals, for the parameters used up.
      doubts: what the data do not support, in words; empty when there is nothing to say.
    """

    law: Law
    values: dict[str, float]
    intervals: dict[str, Interval]
    samples: np.ndarray
    residuals: np.ndarray
    sigma: float
    confidence: float
    seed: int
    doubts: tuple[str, ...]

    @property
    def vector(self) -> np.ndarray:
        """Values in the order of `law.names`."""
        return np.array([self.values[name] for name in self.law.names])

    def loss(self, cells: Columns) -> np.ndarray:
        """The law at these cells."""
        return self.law.loss(self.vector, cells)

    def samples_of_loss(self, cells: Columns) -> np.ndarray:
        """The law of every bootstrap sample at these cells: [bootstrap, cell]."""
        return np.stack([self.law.loss(sample, cells) for sample in self.samples])

    def band(self, cells: Columns) -> list[Interval]:
        """Where the law lies at these cells."""
        return [self._interval(column) for column in self.samples_of_loss(cells).T]

    def prediction(self, cells: Columns) -> list[Interval]:
        """Where a new run at each of these cells would end: the band with the noise of one run."""
        rng = np.random.default_rng(self.seed)
        spread = 1.0 + self.sigma * rng.standard_normal((len(self.samples), len(cells)))
        return [self._interval(column) for column in (self.samples_of_loss(cells) * spread).T]

    def _interval(self, sample: np.ndarray) -> Interval:
        return _interval(sample, self.confidence)


def _interval(sample: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(sample, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


# --- the solve ---------------------------------------------------------------------------------------


def _solve(law: Law, log_exponents: np.ndarray, cells: Columns, root_weights: np.ndarray):
    """Coefficients (not negative) at these exponents, and the weighted relative residuals."""
    design = law.features(list(np.exp(log_exponents)), cells) / cells.loss[:, None]
    # Columns differ by orders of magnitude; at one scale the active set is chosen by fit and not by unit.
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    weighted = design / scale * root_weights[:, None]
    scaled, _ = nnls(weighted, root_weights)
    return scaled / scale, weighted @ scaled - root_weights


def _search(
    law: Law, cells: Columns, root_weights: np.ndarray, start: np.ndarray
) -> tuple[float, np.ndarray]:
    low = np.log([e.low for e in law.exponents])
    high = np.log([e.high for e in law.exponents])
    found = least_squares(
        lambda x: _solve(law, x, cells, root_weights)[1],
        np.clip(start, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        xtol=1e-13,
        ftol=1e-13,
        gtol=1e-13,
        max_nfev=200,
    )
    return float(found.cost), found.x


def _relative(law: Law, values: np.ndarray, cells: Columns) -> np.ndarray:
    return law.loss(values, cells) / cells.loss - 1.0


def _robust_sigma(residuals: np.ndarray, num_parameters: int) -> float:
    spare = max(len(residuals) - num_parameters, 1)
    return 1.4826 * float(np.median(np.abs(residuals))) * math.sqrt(len(residuals) / spare)


def estimate(
    law: Law, cells: Columns, starts: Sequence[np.ndarray], huber_sigmas: float, rounds: int = _ROUNDS
) -> np.ndarray:
    """Values in the order of `law.names`: the best of all starts, then reweighted until it stays."""
    root_weights = np.ones(len(cells))
    _, x = min((_search(law, cells, root_weights, start) for start in starts), key=lambda pair: pair[0])
    for _ in range(rounds):
        coefficients, _ = _solve(law, x, cells, root_weights)
        residuals = _relative(law, np.concatenate([np.exp(x), coefficients]), cells)
        sigma = _robust_sigma(residuals, len(law.names))
        if sigma < 1e-10:
            break
        size = np.maximum(np.abs(residuals), 1e-300)
        weights = np.minimum(1.0, huber_sigmas * sigma / size)
        if np.allclose(np.sqrt(weights), root_weights, atol=1e-3):
            break
        root_weights = np.sqrt(weights)
        _, x = _search(law, cells, root_weights, x)
    coefficients, _ = _solve(law, x, cells, root_weights)
    return np.concatenate([np.exp(x), coefficients])


def _leverage(law: Law, values: np.ndarray, cells: Columns) -> np.ndarray:
    """How much of its own residual each cell explains away, below one."""
    fitted = law.loss(values, cells)
    moved = np.diag(1e-5 * np.maximum(np.abs(values), 1e-12)) + values
    jacobian = np.stack([law.loss(v, cells) / fitted - 1.0 for v in moved], axis=1)
    basis, sizes, _ = np.linalg.svd(jacobian, full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes[0]]
    return np.minimum((basis**2).sum(axis=1), 0.95)


def fit(law: Law | str, cells: Columns, config: FitConfig = FitConfig()) -> Fit:
    """Fit a law, with intervals and doubts.

    Raises:
      ConfigError: fewer cells than parameters and one, or cells that are no positive numbers; nothing can be said about
        the fit then.
    """
    law = LAWS[law] if isinstance(law, str) else law
    _check(cells)
    num_parameters = len(law.names)
    if len(cells) <= num_parameters:
        raise ConfigError(
            f"a fit of {law.name} needs more cells than its {num_parameters} parameters, got {len(cells)}; run more of the ladder"
        )
    starts = [np.log(start) for start in itertools.product(*(e.starts for e in law.exponents))]
    values = estimate(law, cells, starts, config.huber_sigmas)
    fitted = law.loss(values, cells)
    residuals = fitted / cells.loss - 1.0
    # Percentiles of a resampled normal are normal ones; with few cells Student's are wider.
    spare, tail = len(cells) - num_parameters, (1 + config.confidence) / 2
    widening = float(stats.t.ppf(tail, spare) / stats.norm.ppf(tail))
    pool = widening * residuals / np.sqrt(1.0 - _leverage(law, values, cells))
    rng = np.random.default_rng(config.seed)
    samples = []
    for _ in range(config.num_bootstrap):
        noise = rng.choice(pool, len(cells)) * rng.choice([-1.0, 1.0], len(cells))
        redrawn = cells.with_loss(fitted * np.exp(noise))  # stays positive when few cells leave much noise
        start = np.log(values[: len(law.exponents)])
        samples.append(estimate(law, redrawn, [start], config.huber_sigmas, rounds=1))
    table = np.array(samples)
    sigma = float(np.sqrt((residuals**2).sum() / (len(cells) - num_parameters)))
    intervals = {
        name: _interval(column, config.confidence) for name, column in zip(law.names, table.T, strict=True)
    }
    named = dict(zip(law.names, values.tolist(), strict=True))
    return Fit(
        law=law,
        values=named,
        intervals=intervals,
        samples=table,
        residuals=residuals,
        sigma=sigma,
        confidence=config.confidence,
        seed=config.seed,
        doubts=tuple(_doubts(law, cells, named, intervals)),
    )


def _check(cells: Columns) -> None:
    faults = []
    for field in dataclasses.fields(cells):
        values = getattr(cells, field.name)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            faults.append(
                f"{field.name} of a cell must be positive and finite, got {values[bad[0]]} in cell {bad[0]}"
            )
    if faults:
        raise ConfigError(*faults)


def left_out_error(law: Law | str, cells: Columns, left_out: np.ndarray, huber_sigmas: float = 3.0) -> float:
    """Root mean square of the relative errors on the cells left out of the fit: what laws are compared by."""
    law = LAWS[law] if isinstance(law, str) else law
    kept = cells.take(np.flatnonzero(~left_out))
    starts = [np.log(start) for start in itertools.product(*(e.starts for e in law.exponents))]
    tested = cells.take(np.flatnonzero(left_out))
    return float(np.sqrt(np.mean(_relative(law, estimate(law, kept, starts, huber_sigmas), tested) ** 2)))


# --- what the data do not support ----------------------------------------------------------------------


def _doubts(law: Law, cells: Columns, values: dict[str, float], intervals: dict[str, Interval]) -> list[str]:
    doubts = []
    for label, axis in (("parameters N", cells.params), ("tokens D", cells.tokens)):
        distinct = len(np.unique(np.round(np.log(axis), 2)))
        spread = float(axis.max() / axis.min())
        if distinct < 3 or spread < 3:
            doubts.append(
                f"{label} take {distinct} values over a factor {spread:.1f}; an exponent needs at least 3 over a factor 3"
            )
    if len(cells) > 2:
        n, d = np.log(cells.params), np.log(cells.tokens)
        if min(n.std(), d.std()) > 0 and abs(together := np.corrcoef(n, d)[0, 1]) > 0.98:
            how = (
                "N and D rise together in all cells"
                if together > 0
                else "N falls as D rises in all cells, as at one budget"
            )
            doubts.append(f"{how}, so their effects cannot be told apart")
    for exponent in law.exponents:
        value, found = values[exponent.name], intervals[exponent.name]
        if value < exponent.low * 1.01 or value > exponent.high / 1.01:
            doubts.append(f"{exponent.name} lies at the end of its range, {value:.3g}")
        elif found.high - found.low > value:
            doubts.append(
                f"the interval of {exponent.name}, [{found.low:.3g}, {found.high:.3g}], is wider than its value {value:.3g}"
            )
    for name in law.coefficients:
        if values[name] <= 0:
            doubts.append(f"{name} is zero: its term explains nothing in these cells")
    return doubts


def noise_sigma(cells: Columns) -> tuple[float, int]:
    """Relative standard deviation between seeds of one cell, and its degrees of freedom (0: no repeats)."""
    groups: dict[tuple[float, float, float], list[float]] = {}
    for key, loss in zip(zip(cells.params, cells.tokens, cells.unique, strict=True), cells.loss, strict=True):
        groups.setdefault(key, []).append(float(loss))
    squares, freedom = 0.0, 0
    for losses in groups.values():
        mean = sum(losses) / len(losses)
        squares += sum((loss / mean - 1) ** 2 for loss in losses)
        freedom += len(losses) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def misfit(found: Fit, cells: Columns) -> str | None:
    """Whether the residuals are larger than seeds explain: the law is wrong in shape, whatever its intervals say."""
    noise, freedom = noise_sigma(cells)
    if freedom < 2:
        return None
    spare = len(cells) - len(found.law.names)
    if found.sigma > 1e-9 and found.sigma**2 > noise**2 * stats.f.ppf(0.99, spare, freedom):
        times = f"{found.sigma / noise:.1f} times" if noise > 0 else "more than"
        return (
            f"residuals of {found.sigma:.2%} are {times} the noise between seeds ({noise:.2%}, "
            f"{freedom} degrees of freedom): the law misses something"
        )
    return None


# --- what follows from a fit ---------------------------------------------------------------------------


def optimal_share(found: Fit) -> tuple[float, Interval]:
    """a in N_opt ~ C^a: beta / (alpha + beta), with its interval."""
    alpha, beta = (found.law.names.index(name) for name in ("alpha", "beta"))
    sample = found.samples[:, beta] / (found.samples[:, alpha] + found.samples[:, beta])
    value = found.values["beta"] / (found.values["alpha"] + found.values["beta"])
    return value, _interval(sample, found.confidence)


def optimal_params(values: dict[str, float], flops: float, flops_per_param_token: float = 6.0) -> float:
    """N that minimizes the law at C = k N D (arXiv 2203.15556, eq. 4)."""
    alpha, beta = values["alpha"], values["beta"]
    ratio = (alpha * values["A"] / (beta * values["B"])) ** (1 / (alpha + beta))
    return ratio * (flops / flops_per_param_token) ** (beta / (alpha + beta))
