"""One plotting style, and the curves that are drawn from run folders.

Matplotlib's object interface on the Agg canvas: no pyplot, hence no display, no global figure list, and
the same bytes for the same input. A figure is data first (`Panel`, `Curve`, `Level`) and drawn in one place,
so that loss curves, scaling curves and tables of arms look alike.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

from pretrain.metrics import read_metrics
from pretrain.rundir import write_atomic

# Okabe and Ito (2008): distinct for color-blind readers and in gray print. Black is kept for totals.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
INK = "#1a1a1a"
QUIET = "#6b6b6b"

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through (x, y); `label` is written at its right end, "" writes none.

    Attributes:
      band: half the height of a shaded interval around y, or None.
      faint: the unsmoothed data behind another curve.
      markers: draw the points too (few measurements rather than a dense curve).
    """

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    color: str = INK
    width: float = 1.2
    band: Sequence[float] | np.ndarray | None = None
    faint: bool = False
    markers: bool = False
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line for a number that does not depend on x, such as a baseline."""

    label: str
    y: float
    color: str = QUIET


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    levels: Sequence[Level] = ()
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None


_LEFT, _AXES = 0.62, 3.53  # inches left of an axis for its numbers, and its own


def draw(panels: Sequence[Panel], *, title: str = "", subtitle: str = "") -> bytes:
    """The panels side by side as a PNG file's bytes (144 dots per inch)."""
    with matplotlib.rc_context(STYLE):
        name_inches = max(1.25, 0.3 + 0.066 * max(len(name) for panel in panels for name in _names(panel)))
        figure = Figure(figsize=((_LEFT + _AXES + name_inches) * len(panels), 3.9), dpi=144)
        canvas = FigureCanvasAgg(figure)
        heading_inches = 0.62 if title else 0.1
        grid = figure.add_gridspec(
            1,
            len(panels),
            left=_LEFT / figure.get_figwidth(),
            right=1 - name_inches / figure.get_figwidth(),
            bottom=0.5 / figure.get_figheight(),
            top=1 - (heading_inches + 0.3) / figure.get_figheight(),
            wspace=(_LEFT + name_inches) / _AXES,
        )
        for index, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(grid[0, index]), panel)
        left = 0.2 / figure.get_figwidth()
        if title:
            figure.text(left, 1 - 0.28 / 3.9, title, fontsize=12, fontweight="bold", color=INK)
            figure.text(left, 1 - 0.48 / 3.9, subtitle, fontsize=8, color=QUIET)
        buffer = io.BytesIO()
        # Without the Software entry the bytes do not change with matplotlib's version number.
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_log:
        axes.set_xscale("log")
        # Labels at all nine minor ticks would run into each other.
        axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2.5, 2.0)))
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.y_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    names: list[tuple[float, str, str]] = []
    for curve in panel.curves:
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        axes.plot(
            x,
            y,
            color=curve.color,
            linewidth=0.6 if curve.faint else curve.width,
            alpha=0.25 if curve.faint else 1.0,
            linestyle=(0, (4, 2)) if curve.dashed else "-",
            marker="o" if curve.markers else None,
            markersize=1.6 + 0.9 * curve.width,
            zorder=2 if curve.faint else 3,
        )
        if curve.band is not None:
            half = np.asarray(curve.band, float)
            axes.fill_between(x, y - half, y + half, color=curve.color, alpha=0.15, linewidth=0)
        finite = y[np.isfinite(y)]
        if curve.label and len(finite):
            names.append((float(finite[-1]), _named(curve.label, finite[-1]), curve.color))
    for level in panel.levels:
        axes.axhline(level.y, color=level.color, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        names.append((level.y, _named(level.label, level.y), level.color))
    axes.set_ylim(*(panel.y_range or _y_range(panel)))
    axes.margins(x=0.02)
    _write_names(axes, names)


def _named(label: str, y: float) -> str:
    return f"{label} {y:.2f}"


def _names(panel: Panel) -> list[str]:
    """What may be written at the right edge; never empty."""
    return [_named(item.label, 0.0) for item in (*panel.curves, *panel.levels)] or [""]


def _y_range(panel: Panel) -> tuple[float, float]:
    """All levels and the curves but for their first steep part, which would flatten the rest."""
    tails = [np.asarray(c.y, float)[len(c.y) // 20 :] for c in panel.curves]
    values = np.concatenate([*tails, [level.y for level in panel.levels]])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if panel.y_log and low > 0:
        return low / 1.1, high * 1.1
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _write_names(axes: Axes, names: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right edge, moved apart where they would collide and led back to their lines."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    x_right = axes.get_xlim()[1]
    wanted = sorted(
        (float(to_fraction.transform((x_right, y))[1]), label, color) for y, label, color in names
    )
    places = spread([min(1.0, max(0.0, place)) for place, _, _ in wanted], gap=0.06)
    for place, (end, label, color) in zip(places, wanted, strict=True):
        axes.plot(
            [1.0, 1.012, 1.032, 1.042],
            [min(1.0, max(0.0, end))] * 2 + [place] * 2,
            transform=axes.transAxes,
            color=color,
            linewidth=0.6,
            clip_on=False,
        )
        axes.text(1.052, place, label, transform=axes.transAxes, color=color, fontsize=8, va="center")


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Sorted `places` moved as little as possible (least squares) until neighbors are `gap` apart."""
    # Pool adjacent violators (Ayer et al. 1955) on place - i * gap, which must not decrease.
    blocks: list[list[float]] = []
    for index, place in enumerate(places):
        blocks.append([place - index * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean_a, size_a), (mean_b, size_b) = blocks[-2], blocks.pop()
            blocks[-1] = [(mean_a * size_a + mean_b * size_b) / (size_a + size_b), size_a + size_b]
    flat = [mean for mean, size in blocks for _ in range(int(size))]
    return [value + index * gap for index, value in enumerate(flat)]


def smooth(y: Sequence[float] | np.ndarray, *, span: int) -> np.ndarray:
    """Centered mean with triangular weights over `span` points to each side; NaN stays where it is.

    Centered, because a trailing mean would draw a falling curve too high.
    """
    values = np.asarray(y, float)
    finite = np.isfinite(values)
    if not len(values):
        return values
    kernel = 1.0 - np.abs(np.arange(-span, span + 1)) / (span + 1)
    total = np.convolve(np.where(finite, values, 0.0), kernel)[span : span + len(values)]
    weight = np.convolve(finite.astype(float), kernel)[span : span + len(values)]
    return np.where(finite, total / np.maximum(weight, 1e-12), math.nan)


# --- the loss curve of a run -------------------------------------------------------------------------


def draw_loss(folder: str | Path, *, title: str | None = None) -> Path:
    """Write `<folder>/loss.png` from metrics.jsonl, and summary.json when it is there.

    Reads `loss` and `loss_by_source` (nats per token) of the lines of kind "train", `bits_per_byte` and
    `bits_per_byte_by_source` of kind "eval", and `baseline_bits_per_byte` of the summary.

    Raises:
      ConfigError: a damaged line, or the folder cannot be written.
    """
    folder = Path(folder)
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    title = title if title is not None else f"{folder.resolve().parent.name} · {folder.name}"
    panels = loss_panels(read_metrics(folder / "metrics.jsonl"), summary.get("baseline_bits_per_byte", {}))
    write_atomic(folder / "loss.png", draw(panels, title=title, subtitle=_subtitle(summary)))
    return folder / "loss.png"


def loss_panels(records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> list[Panel]:
    """Training loss on the left, held-out bits per byte with the baselines on the right."""
    train = [r for r in records if r["kind"] == "train" and "loss" in r]
    evaluated = [r for r in records if r["kind"] == "eval" and "bits_per_byte" in r]
    sources = sorted({s for r in evaluated for s in r.get("bits_per_byte_by_source", {})})
    sources = sources or sorted({s for r in train for s in r.get("loss_by_source", {})})
    color_of = {source: COLORS[i % len(COLORS)] for i, source in enumerate(sources)}
    if len(sources) < 2:
        color_of = {}  # the only source is the total
    steps = [r["step"] for r in train]
    losses = [r["loss"] for r in train]
    span = max(1, len(train) // 50)
    train_curves = [
        _by_source_curve(train, "loss_by_source", source, color, span) for source, color in color_of.items()
    ]
    train_curves += [
        Curve(label="", x=steps, y=losses, faint=True),
        Curve(label="all" if color_of else "train", x=steps, y=smooth(losses, span=span), width=1.8),
    ]
    heldout_curves = [
        _by_source_curve(evaluated, "bits_per_byte_by_source", source, color, 0)
        for source, color in color_of.items()
    ]
    heldout_curves.append(
        Curve(
            label="all" if color_of else "model",
            x=[r["step"] for r in evaluated],
            y=[r["bits_per_byte"] for r in evaluated],
            width=1.8,
            markers=len(evaluated) < 40,
        )
    )
    return [
        Panel(title="Training loss", x_label="step", y_label="nats per token", curves=train_curves),
        Panel(
            title="Held-out text",
            x_label="step",
            y_label="bits per byte",
            curves=heldout_curves,
            levels=[Level(label=name, y=value) for name, value in baselines.items()],
        ),
    ]


def _by_source_curve(
    records: Sequence[Mapping[str, Any]], key: str, source: str, color: str, span: int
) -> Curve:
    """A source's values; batches without that source leave no point. `span` 0 does not smooth."""
    points = [(r["step"], r[key][source]) for r in records if source in r.get(key, {})]
    y = [value for _, value in points]
    return Curve(
        label=source,
        x=[step for step, _ in points],
        y=smooth(y, span=span) if span else y,
        color=color,
        markers=not span and len(points) < 40,
    )


def _subtitle(summary: Mapping[str, Any]) -> str:
    facts = []
    if "params" in summary:
        facts.append(f"{_short(summary['params'])} parameters")
    if "train_tokens" in summary:
        facts.append(f"{_short(summary['train_tokens'])} tokens")
    if summary.get("val_bits_per_byte") is not None:
        facts.append(f"{summary['val_bits_per_byte']:.3f} bits per byte held out")
    if summary.get("tokens_per_second") is not None:
        facts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    if "device" in summary:
        facts.append(str(summary["device"]))
    return " · ".join(facts)


def _short(count: float) -> str:
    """Three digits and a unit: 870000 -> 870k, 12345678 -> 12.3M."""
    return EngFormatter(sep="")(float(f"{count:.3g}"))
