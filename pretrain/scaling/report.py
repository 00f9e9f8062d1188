"""What a ladder shows: the fitted law, its predictions beside what was measured, and one page with pictures of it."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import fingerprint, to_json
from pretrain.origin import origin
from pretrain.plots import COLORS, QUIET, Curve, Panel, draw
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.scaling import page
from pretrain.scaling.cells import HELD_OUT, LADDER, REPEAT, Cell, Columns, columns
from pretrain.scaling.compare import Multiplier, multiplier
from pretrain.scaling.fit import (
    Fit,
    FitConfig,
    Interval,
    fit,
    left_out_error,
    misfit,
    noise_sigma,
    optimal_share,
)
from pretrain.scaling.isoflop import Parabola, optimum_exponent, parabolas
from pretrain.scaling.laws import LAWS
from pretrain.scaling.plan import Planned, ScalingConfig
from pretrain.scaling.run import Tables

FREE_EPOCHS = 4.0  # up to here a token read again is worth nearly a new one (arXiv 2305.16264)
PUBLISHED_R_STAR = 15.4  # arXiv 2305.16264, R*_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run no fit has seen, beside what the law says."""

    cell: Cell
    predicted: float
    interval: Interval

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.cell.loss - 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything that the cells say."""

    cells: tuple[Cell, ...]
    fit: Fit
    doubts: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    parabolas: tuple[Parabola, ...]
    repeat_fits: tuple[Fit, ...]
    repeat_errors: tuple[
        float, ...
    ]  # of each law on the most repeated runs, fitted without them; NaN: too few others
    multipliers: tuple[Multiplier, ...]
    num_missing: int

    def of_role(self, role: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.role == role]


def analyze(cells: Sequence[Cell], config: FitConfig, *, num_missing: int = 0) -> Analysis:
    """Fit the ladder, predict the held-out runs, compare the arms, fit the repetition laws.

    Raises:
      ConfigError: too few finished cells for a fit.
    """
    ladder = [cell for cell in cells if cell.role == LADDER]
    base = columns(ladder)
    found = fit("chinchilla", base, config)
    doubts = list(found.doubts)
    if (wrong := misfit(found, base)) is not None:
        doubts.append(wrong)
    if num_missing:
        doubts.append(f"{num_missing} cells of the plan are not finished and not in this fit")
    repeated = [cell for cell in cells if cell.role == REPEAT]
    joint = columns([*ladder, *repeated])
    laws = [law for law in LAWS.values() if law.repeats] if repeated else []
    epochs = joint.tokens / joint.unique
    most_repeated = epochs > 0.4 * epochs.max()
    if repeated and epochs.max() < 2:
        doubts.append(
            f"the repeated runs read their data {epochs.max():.1f} times at most, so a repetition cannot be weighed"
        )
    again = [cell for cell in cells if cell.role in (LADDER, HELD_OUT) and cell.epochs > FREE_EPOCHS]
    if again:
        doubts.append(
            f"{len(again)} ladder cells read their data more than {FREE_EPOCHS:.0f} times, up to "
            f"{max(cell.epochs for cell in again):.1f}: their D is not all new, which the law takes it for"
        )
    arms = sorted({cell.role for cell in cells} - {LADDER, HELD_OUT, REPEAT})
    multipliers = [multiplier(arm, ladder, [c for c in cells if c.role == arm], found) for arm in arms]
    doubts += [f"arm {m.arm}: {m.doubt}" for m in multipliers if m.doubt]
    return Analysis(
        cells=tuple(cells),
        fit=found,
        doubts=tuple(doubts),
        predictions=tuple(predict(found, cell) for cell in cells if cell.role == HELD_OUT),
        parabolas=tuple(parabolas(ladder)),
        repeat_fits=tuple(fit(law, joint, config) for law in laws),
        repeat_errors=tuple(
            left_out_error(law, joint, most_repeated) if (~most_repeated).sum() > len(law.names) else math.nan
            for law in laws
        ),
        multipliers=tuple(multipliers),
        num_missing=num_missing,
    )


def predict(found: Fit, cell: Cell) -> Prediction:
    """What the law says about a cell, with the interval of one new run."""
    at = columns([cell])
    return Prediction(cell=cell, predicted=float(found.loss(at)[0]), interval=found.prediction(at)[0])


# --- text --------------------------------------------------------------------------------------------


def plan_text(planned: Sequence[Planned], tables: Tables) -> str:
    """The plan as a table, with what it will read."""
    lines = [f"{'cell':44} {'budget':>9} {'N':>10} {'D':>12} {'D/N':>7} {'epochs':>7}"]
    for p in planned:
        epochs = p.tokens / tables.unique_tokens(p.train)
        lines.append(
            f"{p.name:44} {p.budget_flops:9.2e} {p.params:10,} {p.tokens:12,} {p.tokens / p.params:7.1f} {epochs:7.2f}"
        )
    lines.append(f"{len(planned)} cells, {sum(p.flops for p in planned):.3g} FLOPs")
    return "\n".join(lines)


def fit_text(analysis: Analysis) -> str:
    """The law, its intervals, its doubts, its predictions."""
    found = analysis.fit
    lines = [
        f"{found.law.name} through {len(analysis.of_role(LADDER))} cells, {found.confidence:.0%} intervals"
    ]
    lines += [f"  {row[0]:8} {row[1]:>10}  {row[2]}" for row in _value_rows(found)]
    lines.append(f"  relative residual {found.sigma:.3%}")
    lines += [f"  doubt: {doubt}" for doubt in analysis.doubts]
    for p in analysis.predictions:
        lines.append(
            f"held out {p.cell.name}: predicted {p.predicted:.4f} [{p.interval.low:.4f}, {p.interval.high:.4f}], "
            f"measured {p.cell.loss:.4f}, error {p.error:+.2%}"
        )
    for fitted, error in zip(analysis.repeat_fits, analysis.repeat_errors, strict=True):
        values = ", ".join(f"{r[0]} {r[1]} {r[2]}" for r in _value_rows(fitted) if r[0] in ("R_star", "P"))
        lines.append(
            f"repetition, {fitted.law.name}: {values}, residual {fitted.sigma:.3%}, error on the most repeated when left out {_share(error)}"
        )
        lines += [f"  doubt: {doubt}" for doubt in fitted.doubts]
    for m in analysis.multipliers:
        verdict = {None: "not told apart from 1", True: "better", False: "worse"}[m.better]
        lines.append(
            f"arm {m.arm}: effective compute x {m.value:.3f} [{m.interval.low:.3f}, {m.interval.high:.3f}], {verdict}"
        )
    return "\n".join(lines)


def _share(value: float) -> str:
    return "not known: too few other runs" if math.isnan(value) else f"{value:.2%}"


def _value_rows(found: Fit) -> list[tuple[str, str, str]]:
    rows = []
    for name, value in found.values.items():
        interval = found.intervals[name]
        rows.append((name, f"{value:.4g}", f"[{interval.low:.4g}, {interval.high:.4g}]"))
    return rows


# --- pictures ----------------------------------------------------------------------------------------


def ladder_panels(analysis: Analysis) -> list[Panel]:
    """Loss over size at each budget (points are runs, lines their means and the law), and loss over compute with the held-out runs."""
    ladder = analysis.of_role(LADDER)
    budgets = sorted({cell.budget_flops for cell in ladder})
    isoflop: list[Curve] = []
    for index, budget in enumerate(budgets):
        color = COLORS[index % len(COLORS)]
        cells = sorted((c for c in ladder if c.budget_flops == budget), key=lambda c: (c.params, c.seed))
        sizes = sorted({c.params for c in cells})
        means = [float(np.mean([c.loss for c in cells if c.params == size])) for size in sizes]
        isoflop += [
            Curve(label="", x=sizes, y=means, color=color, width=2.0),
            Curve(
                label="",
                x=[c.params for c in cells],
                y=[c.loss for c in cells],
                color=color,
                width=0.0,
                markers=True,
            ),
        ]
        isoflop.append(_law_at_budget(analysis.fit, cells, f"{budget:.1e}", color))
    best = [min(c.loss for c in ladder if c.budget_flops == b) for b in budgets]
    frontier_flops = np.geomspace(budgets[0], max(c.flops for c in analysis.cells) * 1.2, 40)
    per_pair = float(np.median([c.flops / c.params / c.tokens for c in ladder]))
    law, half = _frontier(analysis.fit, frontier_flops, per_pair)
    compute = [
        Curve(label="law, best size", x=frontier_flops, y=law, band=half, color=QUIET, dashed=True),
        Curve(label="best of budget", x=budgets, y=best, color=COLORS[0], width=2.0, markers=True),
    ]
    held = sorted(analysis.predictions, key=lambda p: p.cell.flops)
    if held:
        x = [p.cell.flops for p in held]
        for label, y, color in (
            ("predicted", [p.predicted for p in held], COLORS[2]),
            ("measured", [p.cell.loss for p in held], COLORS[1]),
        ):
            compute.append(Curve(label=label, x=x, y=y, color=color, width=3.0, markers=True))
    loss_label = "held-out loss (nats per token)"
    return [
        Panel(
            title="Loss at equal compute",
            x_label="parameters N",
            y_label=loss_label,
            curves=isoflop,
            x_log=True,
        ),
        Panel(
            title="Loss over compute",
            x_label="training FLOPs",
            y_label=loss_label,
            curves=compute,
            x_log=True,
        ),
    ]


def _law_at_budget(found: Fit, cells: Sequence[Cell], label: str, color: str) -> Curve:
    sizes = np.geomspace(min(c.params for c in cells), max(c.params for c in cells), 40)
    known = np.log([c.params for c in cells])
    order = np.argsort(known)
    tokens = np.exp(np.interp(np.log(sizes), known[order], np.log([c.tokens for c in cells])[order]))
    curve = found.loss(Columns(sizes, tokens, tokens, np.ones(len(sizes))))
    return Curve(label=label, x=sizes, y=curve, color=color, dashed=True)


def _frontier(found: Fit, flops: np.ndarray, per_pair: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest loss at each C = per_pair N D by the law, and half the height of its interval."""
    values, halves = [], []
    for budget in flops:
        pairs = budget / per_pair
        sizes = np.geomspace(pairs**0.5 / 100, pairs**0.5 * 100, 200)
        at = Columns(sizes, pairs / sizes, pairs / sizes, np.ones(len(sizes)))
        curve = found.loss(at)
        best = int(np.argmin(curve))
        values.append(float(curve[best]))
        (interval,) = found.band(at.take(np.array([best])))
        halves.append((interval.high - interval.low) / 2)
    return np.array(values), np.array(halves)


def repeat_panel(analysis: Analysis) -> Panel:
    """Loss over epochs at a fixed number of steps, with both laws."""
    cells = sorted(analysis.of_role(REPEAT), key=lambda c: c.epochs)
    epochs = np.geomspace(max(cells[0].epochs, 0.5), cells[-1].epochs, 60)
    tokens, params = float(cells[0].tokens), float(cells[0].params)
    at = Columns(np.full(60, params), np.full(60, tokens), np.minimum(tokens / epochs, tokens), np.ones(60))
    curves = [
        Curve(
            label="measured",
            x=[c.epochs for c in cells],
            y=[c.loss for c in cells],
            color=COLORS[0],
            width=2.0,
            markers=True,
        )
    ]
    curves += [
        Curve(label=f.law.name, x=epochs, y=f.loss(at), color=COLORS[1 + i], dashed=True)
        for i, f in enumerate(analysis.repeat_fits)
    ]
    return Panel(
        title="Repeated data",
        x_label="epochs at equal steps",
        y_label="held-out loss (nats per token)",
        curves=curves,
        x_log=True,
    )


# --- the page ----------------------------------------------------------------------------------------


def write_report(analysis: Analysis, config: ScalingConfig, name: str, command: str) -> Path:
    """Write `<workdir>/<ladder>/report.html` and report.json beside it; return the page's path."""
    folder = Path(config.train.run.workdir) / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "report.json", summary_json(analysis, config, command))
    path = folder / "report.html"
    write_atomic(path, page.page(f"Scaling ladder {name}", page_parts(analysis, config, name, command)))
    return path


def summary_json(analysis: Analysis, config: ScalingConfig, command: str) -> dict[str, Any]:
    """All numbers of the page as JSON values: what other reports read."""

    def fitted(found: Fit) -> dict[str, Any]:
        return {
            "law": found.law.name,
            "values": found.values,
            "intervals": {k: [i.low, i.high] for k, i in found.intervals.items()},
            "confidence": found.confidence,
            "residual": found.sigma,
            "doubts": list(found.doubts),
        }

    return {
        "command": command,
        "origin": origin(),
        "fingerprint": fingerprint(config),
        "config": to_json(config),
        "cells": [dataclasses.asdict(cell) for cell in analysis.cells],
        "num_missing": analysis.num_missing,
        "fit": fitted(analysis.fit),
        "doubts": list(analysis.doubts),
        "predictions": [
            {
                "cell": p.cell.name,
                "predicted": p.predicted,
                "interval": [p.interval.low, p.interval.high],
                "measured": p.cell.loss,
                "error": p.error,
            }
            for p in analysis.predictions
        ],
        "repetition": [
            {**fitted(found), "left_out_error": None if math.isnan(error) else error}
            for found, error in zip(analysis.repeat_fits, analysis.repeat_errors, strict=True)
        ],
        "multipliers": [
            {
                "arm": m.arm,
                "value": m.value,
                "interval": [m.interval.low, m.interval.high],
                "better": m.better,
            }
            for m in analysis.multipliers
        ],
    }


def page_parts(analysis: Analysis, config: ScalingConfig, name: str, command: str) -> list[str]:
    """The sections of the page."""
    found = analysis.fit
    parts = [
        page.paragraph(
            f"{len(analysis.cells)} finished runs, {sum(c.flops for c in analysis.cells):.3g} FLOPs in "
            f"{sum(c.seconds for c in analysis.cells) / 60:.1f} process minutes."
        ),
        page.code(command),
        page.figure(draw(ladder_panels(analysis)), "Loss against size at equal compute, and against compute"),
        page.heading("The law"),
        page.paragraph("L = E + A N^-alpha + B D^-beta; N counts matmul parameters, the head included."),
        page.table(("constant", "value", f"{found.confidence:.0%} interval"), _value_rows(found)),
        page.paragraph(_allocation_text(analysis)),
    ]
    parts += [page.paragraph(f"Not supported by these data: {doubt}.", "doubt") for doubt in analysis.doubts]
    if analysis.predictions:
        parts.append(page.heading("Predicted before measured"))
        rows = [
            (
                p.cell.name,
                f"{p.cell.flops / max(c.budget_flops for c in analysis.of_role(LADDER)):.1f} x",
                f"{p.predicted:.4f}",
                f"[{p.interval.low:.4f}, {p.interval.high:.4f}]",
                f"{p.cell.loss:.4f}",
                f"{p.error:+.2%}",
            )
            for p in analysis.predictions
        ]
        header = ("run", "largest budget", "predicted", "interval of one run", "measured", "error")
        parts.append(page.table(header, rows))
    if analysis.repeat_fits:
        parts += _repeat_parts(analysis)
    if analysis.multipliers:
        rows = [
            (m.arm, f"{m.value:.3f}", f"[{m.interval.low:.3f}, {m.interval.high:.3f}]", len(m.cells))
            for m in analysis.multipliers
        ]
        parts += [
            page.heading("Changes, as effective compute"),
            page.table(("arm", "multiplier", "interval", "pairs of runs"), rows),
        ]
    parts += [page.heading("IsoFLOP diagnostic"), _parabola_table(analysis)]
    parts += [page.heading("Runs"), _cell_table(analysis)]
    return parts


def _allocation_text(analysis: Analysis) -> str:
    value, interval = optimal_share(analysis.fit)
    base = columns(analysis.of_role(LADDER))
    noise, freedom = noise_sigma(base)
    said = f"Optimal N grows as C^{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]. Residuals of the fit: {analysis.fit.sigma:.2%}"
    return said + (f", noise between seeds: {noise:.2%} ({freedom} degrees of freedom)." if freedom else ".")


def _repeat_parts(analysis: Analysis) -> list[str]:
    rows = [
        row for found in analysis.repeat_fits for row in ((found.law.name, *r) for r in _value_rows(found))
    ]
    parts = [
        page.heading("Repeated data"),
        page.figure(draw([repeat_panel(analysis)]), "Loss over epochs at a fixed number of training tokens"),
        page.paragraph(f"The published R* of effective data is {PUBLISHED_R_STAR} (arXiv 2305.16264)."),
        page.table(("law", "constant", "value", "interval"), rows),
        page.paragraph("Relative error on the most repeated runs, by a fit that has not seen them:"),
        page.table(
            ("law", "error"),
            [
                (f.law.name, _share(e))
                for f, e in zip(analysis.repeat_fits, analysis.repeat_errors, strict=True)
            ],
        ),
    ]
    doubts = [f"{found.law.name}: {doubt}" for found in analysis.repeat_fits for doubt in found.doubts]
    return parts + [page.paragraph(f"Not supported by these data: {doubt}.", "doubt") for doubt in doubts]


def _parabola_table(analysis: Analysis) -> str:
    rows = []
    for p in analysis.parabolas:
        if p.params is None:
            rows.append((f"{p.budget_flops:.2e}", "refused", p.refused))
        else:
            rows.append((f"{p.budget_flops:.2e}", f"{p.params:,.0f}", f"{p.loss:.4f}"))
    exponent = optimum_exponent(analysis.parabolas)
    rows.append(("exponent of N*", "refused" if exponent is None else f"{exponent:.3f}", ""))
    return page.table(("budget", "N at the minimum", "loss there"), rows)


def _cell_table(analysis: Analysis) -> str:
    rows = [
        (
            c.name,
            c.role,
            f"{c.params:,}",
            f"{c.tokens:,}",
            f"{c.epochs:.2f}",
            f"{c.flops:.3g}",
            f"{c.loss:.4f}",
            f"{c.seconds:.0f}",
            c.skipped_steps,
        )
        for c in analysis.cells
    ]
    return page.table(("run", "role", "N", "D", "epochs", "FLOPs", "loss", "seconds", "skipped steps"), rows)
