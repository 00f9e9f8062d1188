"""What a run says about itself while it runs: metric lines, TensorBoard, a progress bar, a clock.

`metrics.jsonl` is the record; every other writer is a view of it. A line is written with one system call,
so a killed run leaves at most one unfinished line, which readers ignore. `step` counts finished optimizer
updates: a run that resumes from the checkpoint of step s drops the lines with step > s first, so the curve
never holds a step twice.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from pretrain.config import ConfigError
from pretrain.rundir import storage_error, write_atomic

Value = float | int | str | Mapping[str, float | str]


class MetricWriter(Protocol):
    """Where metric lines go. `values` may hold one level of mapping, e.g. a loss for each source."""

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class WriterConfig(Protocol):
    """An optional writer named by a config; the JSONL file is always written."""

    def build(
        self, folder: Path, *, config_json: Mapping[str, Any], resume_step: int | None
    ) -> MetricWriter: ...


# --- JSONL -------------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The finished lines of a metrics file, in order; an absent file holds none.

    Raises:
      ConfigError: a finished line is not a JSON object with an integer step (names file and line).
    """
    return [record for _, record in _numbered_records(Path(path))]


def drop_after(path: str | Path, step: int | None) -> list[dict[str, Any]]:
    """Remove, atomically, the lines after `step` and a last line that a kill left unfinished.

    `step` None is a start without a checkpoint: every line goes, that of step 0 too.
    Returns the records removed. A file with nothing to remove keeps its bytes and its date.

    Raises:
      ConfigError: a line is damaged, or the folder cannot be written.
    """
    path = Path(path)
    if not path.exists():
        return []
    contents = path.read_bytes()
    kept, dropped = [], []
    for line, record in _numbered_records(path):
        (kept if step is not None and record["step"] <= step else dropped).append((line, record))
    remaining = b"".join(line for line, _ in kept)
    if remaining != contents:
        write_atomic(path, remaining)
    return [record for _, record in dropped]


def _numbered_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its newline, record) for each finished line."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return  # only the last line can lack it: the kill came while it was written
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError("step is not an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number} must be a JSON object with an integer step, got {line[:60]!r}; "
                "remove the line, or start a new run folder"
            ) from error
        yield line, _restored(record)


def _plain(value: Any) -> Any:
    """`value` as strict JSON, which has no NaN and no infinity: they become {"not_finite": "nan"}."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()  # a numpy or jax scalar
    if isinstance(value, float) and not math.isfinite(value):
        return {"not_finite": str(value)}
    return value


def _restored(value: Any) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"not_finite"}:
        return float(value["not_finite"])
    return {key: _restored(item) for key, item in value.items()}


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk is the caller's: one clear line instead of an OSError."""
    try:
        yield
    except OSError as error:
        refused = storage_error(error, path)
        if refused is None:
            raise
        raise refused from error


class JsonlWriter:
    """Appends `{"step": .., "kind": .., **values}` lines to `path`.

    Raises:
      ConfigError: the file cannot be written (read-only folder, no space left).
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        with _storage_errors(self._path):
            # O_APPEND and one write for each line: no buffer that a SIGKILL could lose.
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        record = _plain({"step": step, "kind": kind, **values})
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with _storage_errors(self._path):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def flush(self) -> None:
        """Force the lines to the disk; call it before a checkpoint is marked complete."""
        with _storage_errors(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)


# --- TensorBoard -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """Event files for TensorBoard in `<run folder>/tensorboard`."""

    def build(
        self, folder: Path, *, config_json: Mapping[str, Any], resume_step: int | None
    ) -> "TensorBoardWriter":
        return TensorBoardWriter(folder / "tensorboard", resume_step=resume_step)


class TensorBoardWriter:
    """Scalars named `kind/name` and `kind/name/source`; texts are left to the JSONL file.

    The event file is written without tensorboardX's SummaryWriter: that one has a thread and a queue, whose
    errors (a full disk) nobody would see, and two restarts within a second would share a file name.

    Raises:
      ConfigError: the files cannot be written (read-only folder, no space left).
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None):
        self._folder = Path(folder)
        with _storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"), filename_suffix=f".{os.getpid()}")
        # Event files only grow; this record tells TensorBoard to hide what the resumed run repeats.
        first_step = 0 if resume_step is None else resume_step + 1
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(kind, values)]
        self._add(step, summary=Summary(value=points))

    def flush(self) -> None:
        with _storage_errors(self._folder):
            self._events.flush()

    def close(self) -> None:
        with _storage_errors(self._folder):
            self._events.close()

    def _add(self, step: int, **contents: Any) -> None:
        with _storage_errors(self._folder):
            self._events.write_event(Event(step=step, wall_time=time.time(), **contents))


def scalars(kind: str, values: Mapping[str, Value]) -> Iterator[tuple[str, float]]:
    """The numbers among `values`, named `kind/name` or `kind/name/key`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(f"{kind}/{name}", value)
        elif not isinstance(value, str):
            yield f"{kind}/{name}", float(value)


class Writers:
    """Several writers as one; the JSONL file comes first, so that it is complete when a view fails."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        for writer in self._writers:
            writer.write(step, kind, values)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(
    folder: Path, configs: Sequence[WriterConfig], *, config_json: Mapping[str, Any], resume_step: int | None
) -> tuple[Writers, list[dict[str, Any]]]:
    """Writers for a run folder that goes on from `resume_step` (None: from the start), and what was dropped."""
    path = folder / "metrics.jsonl"
    dropped = drop_after(path, resume_step)
    views = [config.build(folder, config_json=config_json, resume_step=resume_step) for config in configs]
    return Writers([JsonlWriter(path), *views]), dropped


# --- goodput -----------------------------------------------------------------------------------------

PHASES: tuple[str, ...] = (
    "compile",
    "step",
    "data_wait",
    "checkpoint_block",
    "evaluation",
    "sampling",
    "lost_to_restart",
    "other",
)


class GoodputClock:
    """Splits wall time into phases; the phases always add up to the wall time.

    Phases nest, and the inner one takes the time. What no phase claims is `other`. `seconds` of an earlier
    process (from its checkpoint) are carried on, `lost_to_restart` is what a killed process computed for nothing.
    """

    def __init__(
        self, seconds: Mapping[str, float] | None = None, *, now: Callable[[], float] = time.perf_counter
    ):
        self._seconds = dict.fromkeys(PHASES, 0.0)
        for phase, value in (seconds or {}).items():
            self._check(phase)
            self._seconds[phase] = float(value)
        self._now = now
        self._mark = now()
        self._stack = ["other"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside the `with` block on `name`."""
        self._check(name)
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def lose(self, dropped: Sequence[Mapping[str, Any]]) -> None:
        """Book what a killed process did after the checkpoint: its dropped lines say when it still lived.

        A line's `seconds` is the clock's total when it was written.
        """
        alive_s = max((float(record["seconds"]) for record in dropped if "seconds" in record), default=0.0)
        self._seconds["lost_to_restart"] += max(0.0, alive_s - self.total_s())

    def seconds(self) -> dict[str, float]:
        """Seconds by phase until now; feed it to a new clock after a restart."""
        self._settle()
        return dict(self._seconds)

    def total_s(self) -> float:
        return sum(self.seconds().values())

    def _settle(self) -> None:
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    @staticmethod
    def _check(name: str) -> None:
        if name not in PHASES:
            raise ValueError(f"a goodput phase is one of {', '.join(PHASES)}; got {name!r}")


# --- progress ----------------------------------------------------------------------------------------


class ProgressView(Protocol):
    """What a person watching the run sees."""

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_progress(
    *,
    num_steps: int,
    start_step: int = 0,
    stream: IO[str] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> ProgressView:
    """A bar when `stream` (standard output) is a terminal, a plain line every ten seconds when it is not."""
    console = Console(file=stream, highlight=False, soft_wrap=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return BarProgress(console, num_steps=num_steps, start_step=start_step, now=now)
    return LineProgress(console.file, num_steps=num_steps, now=now)


class _Pace:
    """Time to go at the mean pace since the first update: evaluation and checkpoints are part of it."""

    def __init__(self, num_steps: int, now: Callable[[], float]):
        self.num_steps = num_steps
        self._now = now
        self._first: tuple[int, float] | None = None

    def remaining_s(self, step: int) -> float:
        """Seconds to go, infinite at the first update: what came before it is mostly compilation."""
        time_s = self._now()
        if self._first is None:
            self._first = (step, time_s)
        first_step, first_time_s = self._first
        if step >= self.num_steps:
            return 0.0
        if step <= first_step:
            return math.inf
        return (time_s - first_time_s) / (step - first_step) * (self.num_steps - step)


class BarProgress:
    """A bar at the bottom of a terminal. It redraws only inside `update`, so it needs no thread."""

    def __init__(self, console: Console, *, num_steps: int, start_step: int, now: Callable[[], float]):
        self._now = now
        self._pace = _Pace(num_steps, now)
        self._drawn = -math.inf
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("[bold]loss {task.fields[loss]}[/] · {task.fields[rate]} · ETA {task.fields[eta]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task(
            "train", total=num_steps, completed=start_step, loss="–", rate="– tokens/s", eta="–"
        )

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        fields: dict[str, Any] = {
            "loss": f"{loss:.4f}",
            "rate": f"{tokens_per_second:,.0f} tokens/s",
            "eta": format_duration(self._pace.remaining_s(step)),
        }
        self._bar.update(self._task, completed=step, **fields)
        if self._now() - self._drawn >= 0.1 or step >= self._pace.num_steps:
            self._drawn = self._now()
            self._bar.refresh()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def close(self) -> None:
        self._bar.stop()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LineProgress:
    """Plain lines for logs: the first update, then one every `interval_s`, then the last."""

    def __init__(
        self,
        stream: IO[str],
        *,
        num_steps: int,
        now: Callable[[], float],
        interval_s: float = 10.0,
    ):
        self._stream = stream
        self._now = now
        self._interval_s = interval_s
        self._printed = -math.inf
        self._pace = _Pace(num_steps, now)

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        remaining_s = self._pace.remaining_s(step)
        if self._now() - self._printed < self._interval_s and step < self._pace.num_steps:
            return
        self._printed = self._now()
        self.say(
            f"step {step}/{self._pace.num_steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"ETA {format_duration(remaining_s)}"
        )

    def say(self, text: str) -> None:
        # Flushed at once: a log that lags behind a killed run hides where it died.
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def format_duration(seconds: float) -> str:
    """`75` -> `1:15`, `3725` -> `1:02:05`, not finite -> an en dash."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
