"""A campaign in the terminal: one line for each finished candidate, and below them a table of the arms that stays in place.

Ideas are foreign text: they are shown as text, without control characters, on one line.
"""

import dataclasses
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from research_env.search.proposal import Told


@dataclasses.dataclass
class _Row:
    told: int = 0
    ok: int = 0
    best: float | None = None
    best_metric: float | None = None
    device_s: float = 0.0
    idea: str = ""


class LiveTable:
    """Use as a context; without a terminal only the lines are printed."""

    def __init__(self, console: Console, *, metric: str, baseline: float, num_candidates: int):
        self._console, self._metric, self._baseline = console, metric, baseline
        self._num_candidates = num_candidates
        self._rows: dict[str, _Row] = {}
        self._start = time.monotonic()
        self._live = Live(self.table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def told(self, arm: str, item: Told) -> None:
        """A candidate has finished."""
        row = self._rows.setdefault(arm, _Row())
        row.told += 1
        row.device_s += item.result.device_s
        if item.gain is not None:
            row.ok += 1
            if row.best is None or item.gain > row.best:
                row.best, row.best_metric, row.idea = item.gain, item.result.metric, item.node.idea
        found = "" if item.gain is None else f"{item.result.metric:.4f} ({item.gain:+.4f})"
        line = (
            f"{arm} {row.told:3d}  {item.result.status.value:14s} {found:20s} {one_line(item.node.idea, 70)}"
        )
        self._console.print(Text(line))
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The arms side by side."""
        minutes = (time.monotonic() - self._start) / 60
        table = Table(
            title=f"{self._metric}, baseline {self._baseline:.4f}, {minutes:.1f} min", title_justify="left"
        )
        for name in ("arm", "done", "ok", "best", "gain", "device-s", "best idea"):
            table.add_column(name, justify="left" if name in ("arm", "best idea") else "right", no_wrap=True)
        for arm, row in self._rows.items():
            best = ("", "") if row.best is None else (f"{row.best_metric:.4f}", f"{row.best:+.4f}")
            table.add_row(
                arm, f"{row.told}/{self._num_candidates}", str(row.ok), *best, f"{row.device_s:.0f}", Text(one_line(row.idea, 60))
            )  # fmt: skip
        return table


def one_line(text: str, max_characters: int) -> str:
    """Printable text on one line."""
    return "".join(c if c.isprintable() else " " for c in text)[:max_characters]
