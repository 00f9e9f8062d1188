"""From trials to a table: every arm at its best validation loss, reported on test documents, paired over seeds.

Intervals are Student's t over seeds: with three seeds they are wide, and that is what three seeds can say. The
fraction of the oracle's gain is undefined where the interval of that gain reaches zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.plots import COLORS, INK, QUIET, Curve, Level, Panel, draw
from synth.sbp.parts import TEST, VALIDATION
from synth.sbp.trials import ORACLE_ARM, REPETITION

# Student's t, 97.5 %, by degrees of freedom.
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ARMS = (REPETITION, "self_samples", "random_pair", "sbp", ORACLE_ARM)
COLOR_OF = {
    REPETITION: INK,
    "self_samples": COLORS[4],
    "random_pair": COLORS[3],
    "sbp": COLORS[0],
    ORACLE_ARM: COLORS[2],
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval (infinitely wide for one seed) and the value of each seed."""

    mean: float
    half_width: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.mean:.4f} ± {self.half_width:.4f}"
            if math.isfinite(self.half_width)
            else f"{self.mean:.4f}"
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.mean) > self.half_width

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; no interval for one seed."""
        half = self.half_width if math.isfinite(self.half_width) else None
        return {"mean": self.mean, "half_width": half, "values": list(self.values)}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean=mean, half_width=math.inf, values=tuple(values))
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    t = _T[min(count - 1, len(_T) - 1)]  # beyond the table a little too wide, never too narrow
    return Estimate(mean=mean, half_width=t * spread / math.sqrt(count), values=tuple(values))


def fraction_of_oracle(
    repetition: Sequence[float], arm: Sequence[float], oracle: Sequence[float]
) -> Estimate | None:
    """(repetition - arm) / (repetition - oracle), of losses paired by seed.

    None where the oracle's gain cannot be told from zero: its interval holds zero, or (one seed) it is not positive.
    """
    gains = [r - o for r, o in zip(repetition, oracle, strict=True)]
    gain = estimate(gains)
    if gain.mean <= 0 or (len(gains) > 1 and not gain.excludes_zero):
        return None
    return estimate([(r - a) / g for r, a, g in zip(repetition, arm, gains, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial and what its run says."""

    seed: int
    trial: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def arm(self) -> str:
        return self.trial["arm"]

    @property
    def validation(self) -> float:
        """Nats per token on what chooses."""
        return self.run["nats_per_token"][VALIDATION]

    @property
    def test(self) -> float:
        """Nats per token on what is reported."""
        return self.run["nats_per_token"][TEST]

    def describe(self) -> str:
        """The setting in words."""
        share = f", share {self.trial['share']:g}" if self.trial["share"] else ""
        return f"{self.trial['num_steps']} steps, decay {self.trial['weight_decay']:g}{share}"


def best_of(
    outcomes: Sequence[Outcome], arm: str, keep: Callable[[Outcome], bool] = lambda _: True
) -> list[Outcome]:
    """For each seed, in order, the outcome of the arm with the lowest validation loss; one without a number is last."""
    found = []
    for seed in sorted({o.seed for o in outcomes}):
        mine = [o for o in outcomes if o.seed == seed and o.arm == arm and keep(o)]
        if mine:
            found.append(min(mine, key=lambda o: (math.isnan(o.validation), o.validation)))
    return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All numbers of the page."""

    loss: dict[str, Estimate]
    chosen: dict[str, list[str]]
    fraction: dict[str, Estimate | None]
    differences: dict[str, Estimate]  # positive: the first is better
    by_setting: list[tuple[str, str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "nats_per_token": {arm: e.to_json() for arm, e in self.loss.items()},
            "chosen": self.chosen,
            "fraction_of_oracle_gain": {arm: e and e.to_json() for arm, e in self.fraction.items()},
            "differences": {name: e.to_json() for name, e in self.differences.items()},
            "by_setting": [[arm, setting, e.to_json()] for arm, setting, e in self.by_setting],
        }


def compare(outcomes: Sequence[Outcome]) -> Comparison:
    """Every arm at its best, and all settings."""
    best = {arm: best_of(outcomes, arm) for arm in ARMS}
    best = {arm: found for arm, found in best.items() if found}
    test = {arm: [o.test for o in found] for arm, found in best.items()}
    fraction = {}
    if REPETITION in test and ORACLE_ARM in test:
        for arm in test.keys() - {REPETITION, ORACLE_ARM}:
            fraction[arm] = fraction_of_oracle(test[REPETITION], test[arm], test[ORACLE_ARM])
    differences = {}
    for other in (REPETITION, "random_pair", "self_samples"):
        if "sbp" in test and other in test:
            differences[f"{other} - sbp"] = estimate(
                [b - a for a, b in zip(test["sbp"], test[other], strict=True)]
            )
    settings: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        settings.setdefault((outcome.arm, outcome.describe()), []).append(outcome.test)
    return Comparison(
        loss={arm: estimate(values) for arm, values in test.items()},
        chosen={arm: [o.describe() for o in found] for arm, found in best.items()},
        fraction={arm: fraction[arm] for arm in ARMS if arm in fraction},
        differences=differences,
        by_setting=[(arm, setting, estimate(values)) for (arm, setting), values in settings.items()],
    )


def comparison_lines(comparison: Comparison, floors: Mapping[str, float]) -> list[str]:
    """The table of arms in Markdown, then the differences that are the claim, then every setting."""
    lines = [
        "| arm, at its best setting | nats per token, test | of the oracle's gain | chosen by seed |",
        "|---|---|---|---|",
    ]
    for arm, loss in comparison.loss.items():
        gain = "-"
        if arm in comparison.fraction:
            found = comparison.fraction[arm]
            gain = "undefined" if found is None else _percent(found)
        lines.append(f"| {arm} | {loss} | {gain} | {'; '.join(comparison.chosen[arm])} |")
    for name, value in floors.items():
        lines.append(f"| {name} | {value:.4f} | - | exact |")
    lines += [
        "",
        "| difference in nats per token (positive: SBP is better) | mean | by seed |",
        "|---|---|---|",
    ]
    for name, found in comparison.differences.items():
        lines.append(f"| {name} | {found} | {', '.join(f'{v:+.4f}' for v in found.values)} |")
    lines += ["", "| arm | setting | nats per token, test |", "|---|---|---|"]
    lines += [f"| {arm} | {setting} | {found} |" for arm, setting, found in comparison.by_setting]
    return lines


def _percent(found: Estimate) -> str:
    half = f" ± {100 * found.half_width:.1f}" if math.isfinite(found.half_width) else ""
    return f"{100 * found.mean:.1f}{half} %"


def picture(
    outcomes: Sequence[Outcome], floors: Mapping[str, float], tokens_per_step: int, title: str
) -> bytes:
    """Test loss against tokens for each arm at its best, and against the share of synthetic rows."""
    best = {arm: found for arm in ARMS if (found := best_of(outcomes, arm))}
    curves = []
    for arm, found in best.items():
        # Seeds may choose other settings; a mean is drawn over the first seed's.
        same = [o for o in found if o.trial["num_steps"] == found[0].trial["num_steps"]]
        steps = [step for step, _ in same[0].run["curve"]]
        values = np.array([[nats[TEST] for _, nats in o.run["curve"]] for o in same]).mean(axis=0)
        tokens = [step * tokens_per_step for step in steps]
        curves.append(Curve(label=arm, x=tokens, y=values, color=COLOR_OF[arm], width=1.5))
    shares = []
    for arm in best:
        values = sorted({o.trial["share"] for o in outcomes if o.arm == arm and o.trial["share"]})
        if values:
            means = [
                estimate([o.test for o in best_of(outcomes, arm, lambda o, s=s: o.trial["share"] == s)]).mean
                for s in values
            ]
            shares.append(Curve(label=arm, x=values, y=means, color=COLOR_OF[arm], width=1.5, markers=True))
    levels = [
        Level(label=arm, y=estimate([o.test for o in best[arm]]).mean, color=COLOR_OF[arm])
        for arm in (REPETITION, ORACLE_ARM)
        if arm in best
    ]
    exact = [Level(label=name, y=value, color=QUIET) for name, value in floors.items()]
    panels = [
        Panel(
            title="Test loss while training",
            x_label="tokens",
            y_label="nats per token",
            curves=curves,
            levels=exact,
        ),
        Panel(
            title="Test loss by share of synthetic rows",
            x_label="share",
            y_label="nats per token",
            curves=shares,
            levels=levels,
        ),
    ]
    return draw(
        panels, title=title, subtitle="each arm at its best setting by validation loss; means over seeds"
    )
