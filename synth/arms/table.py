"""Accuracy by arm, budget and kind of question, with intervals over documents; the page and the picture.

The interval of an accuracy and of a closed gap comes from a bootstrap over documents, all replicates together,
so it holds what differs between worlds, bases and orders of data as far as a few replicates can show it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.plots import Curve, Level, Panel, draw
from synth.question import Question

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table with its 95 % interval, and the same number for each replicate alone."""

    value: float
    low: float
    high: float
    num_questions: int
    by_replicate: tuple[float, ...]

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "num_questions": self.num_questions,
            "by_replicate": list(self.by_replicate),
        }


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Right answers and questions of one kind, by document; the documents of all replicates, in a fixed order."""

    right: np.ndarray
    asked: np.ndarray
    replicate: np.ndarray  # the number of each document's replicate


def marks_of(answers: Sequence[tuple[Sequence[Question], Sequence[int | None]]], kind: str | None) -> Marks:
    """The marks for questions with the tag `kind` (none: all), one entry of `answers` for each replicate."""
    right: dict[tuple[int, str], int] = {}
    asked: dict[tuple[int, str], int] = {}
    for number, (questions, choices) in enumerate(answers):
        for question, choice in zip(questions, choices, strict=True):
            if kind is None or kind in question.tags:
                place = (number, question.document)
                asked[place] = asked.get(place, 0) + 1
                right[place] = right.get(place, 0) + (choice == question.gold)
    places = sorted(asked)
    return Marks(
        right=np.array([right[p] for p in places], float),
        asked=np.array([asked[p] for p in places], float),
        replicate=np.array([p[0] for p in places]),
    )


def accuracy_cell(arm: Marks) -> Cell:
    """The accuracy."""
    return _cell((arm,), lambda right, asked: right[0] / asked[0])


def gap_cell(arm: Marks, base: Marks, ceiling: Marks) -> Cell | None:
    """The share of the way from `base` to `ceiling` that `arm` has gone.

    None when the interval of that way holds 0: a share of nothing says nothing.
    """
    if _cell((base, ceiling), lambda right, asked: (right[1] - right[0]) / asked[0]).low <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return _cell((arm, base, ceiling), lambda right, asked: (right[0] - right[1]) / (right[2] - right[1]))


def _cell(parts: Sequence[Marks], statistic: Callable[[Sequence[Any], Sequence[Any]], Any]) -> Cell:
    """`statistic` of the sums (right, asked) of each part, resampled by document in the same way for all parts."""

    def of(chosen: Any) -> Any:
        return statistic(
            [part.right[chosen].sum(axis=-1) for part in parts],
            [part.asked[chosen].sum(axis=-1) for part in parts],
        )

    replicate = parts[0].replicate
    count = len(replicate)
    picks = np.random.default_rng(0).integers(0, count, size=(_RESAMPLES, count))
    low, high = np.nanquantile(of(picks), [0.025, 0.975])
    return Cell(
        value=float(of(np.arange(count))),
        low=float(low),
        high=float(high),
        num_questions=int(parts[0].asked.sum()),
        by_replicate=tuple(float(of(np.flatnonzero(replicate == r))) for r in np.unique(replicate)),
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table: an arm after `tokens` positions of its own text, cells by kind ("all" first)."""

    arm: str
    tokens: int
    cells: Mapping[str, Cell]
    gaps: Mapping[str, Cell | None]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "arm": self.arm,
            "tokens": self.tokens,
            "accuracy": {kind: cell.to_json() for kind, cell in self.cells.items()},
            "gap_closed": {kind: cell and cell.to_json() for kind, cell in self.gaps.items()},
        }


def page(
    entries: Sequence[Entry],
    gates: Sequence[str],
    kinds: Sequence[str],
    replay: Mapping[str, Mapping[str, float]],
) -> str:
    """The result as Markdown: gates, accuracies, closed gaps at the largest budget, every replicate, forgetting.

    `replay` are bits per byte of held-out replay after the largest budget, by arm and source.
    """
    columns = ("all", *kinds)
    lines = ["# Arms", "", *(f"- {line}" for line in gates), ""]
    lines += ["Accuracy in percent, 95 % interval over documents.", ""]
    lines += [f"| arm | tokens | {' | '.join(columns)} |", f"|---|---:|{'---|' * len(columns)}"]
    for entry in entries:
        lines.append(
            f"| {entry.arm} | {entry.tokens:,} | {' | '.join(str(entry.cells[kind]) for kind in columns)} |"
        )
    lines += ["", "Share of the way from the base to the open book, in percent, at the largest budget.", ""]
    lines += [f"| arm | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    largest = max(entry.tokens for entry in entries)
    for entry in entries:
        if entry.tokens == largest and entry.gaps:
            found = [entry.gaps[kind] for kind in columns]
            cells = [str(cell) if cell else "no gap" for cell in found]
            lines.append(f"| {entry.arm} | {' | '.join(cells)} |")
    lines += ["", "Every replicate alone, all kinds.", "", "| arm | tokens | accuracy |", "|---|---:|---|"]
    for entry in entries:
        alone = ", ".join(f"{100 * value:.1f}" for value in entry.cells["all"].by_replicate)
        lines.append(f"| {entry.arm} | {entry.tokens:,} | {alone} |")
    sources = list(dict.fromkeys(name for values in replay.values() for name in values))
    lines += [
        "",
        "Held-out replay after the largest budget, bits per byte: what an arm forgets, it pays here.",
        "",
    ]
    lines += [f"| arm | {' | '.join(sources)} |", f"|---|{'---:|' * len(sources)}"]
    for arm, values in replay.items():
        lines.append(f"| {arm} | {' | '.join(f'{values[name]:.4f}' for name in sources)} |")
    return "\n".join(lines) + "\n"


_COLORS = ("#1b1b1b", "#b5482a", "#2a6fb5", "#3f8f4f", "#8a5fb0", "#b08a2a", "#5f8a8a")


def picture(entries: Sequence[Entry], kinds: Sequence[str], levels: Sequence[Entry], title: str) -> bytes:
    """A panel for each kind: accuracy against tokens of own text; `levels` do not depend on them."""
    arms = list(dict.fromkeys(entry.arm for entry in entries))
    panels = []
    for kind in kinds:
        curves = []
        for number, arm in enumerate(arms):
            of_arm = [entry for entry in entries if entry.arm == arm]
            cells = [entry.cells[kind] for entry in of_arm]
            curves.append(
                Curve(
                    label=arm,
                    x=[entry.tokens for entry in of_arm],
                    y=[100 * cell.value for cell in cells],
                    band=[50 * (cell.high - cell.low) for cell in cells],
                    color=_COLORS[number % len(_COLORS)],
                    markers=True,
                )
            )
        panels.append(
            Panel(
                title=kind,
                x_label="tokens of the arm's own text",
                y_label="accuracy, %",
                curves=curves,
                levels=[Level(label=level.arm, y=100 * level.cells[kind].value) for level in levels],
                x_log=True,
                y_range=(0.0, 100.0),
            )
        )
    return draw(panels, title=title, subtitle="95 % intervals over documents")
