"""Runs the cells of a plan as jobs; a cell that is finished is read, one that was killed resumes, both by its run folder.

A cell's folder is `<workdir>/<ladder>/<fingerprint8>`, the one that `pretrain.main` would give that config. Nothing
else remembers what has been done, so the same command after any death goes on where it was.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.allocator import keep_heap
from pretrain.config import ConfigError, fingerprint
from pretrain.data.tables import PreparedData, prepare_tables
from pretrain.jobs.api import Crashed, Done, Failure, Job, JobsFailed, Lost, Raised
from pretrain.metrics import read_metrics
from pretrain.rundir import RunDir
from pretrain.scaling.cells import Cell
from pretrain.scaling.plan import Planned, ScalingConfig, plan_cells
from pretrain.train import EXIT_PREEMPTED, TrainConfig, run_dir, train

Say = Callable[[str], None]


class Preempted(RuntimeError):
    """A cell was asked to stop and has saved; it is nobody's fault."""


def train_cell(config: TrainConfig, name: str) -> str:
    """The job: train one cell, return its run folder."""
    keep_heap()
    result = train(config, name=name)
    if result.exit_code == EXIT_PREEMPTED:
        raise Preempted(f"{result.folder} stopped at step {result.steps} of {config.run.num_steps}")
    return str(result.folder)


class Tables:
    """The row tables of a ladder, built once, before many processes ask for them."""

    def __init__(self, config: ScalingConfig):
        self._workdir = Path(config.train.run.workdir)
        self._found: dict[str, PreparedData] = {}
        self.vocab_size = self.of(config.train).tokenizer.vocab_size

    def of(self, train: TrainConfig) -> PreparedData:
        """The tables that this run reads."""
        key = fingerprint(train.data)
        if key not in self._found:
            self._found[key] = prepare_tables(train.data, self._workdir, train.run.seed)
        return self._found[key]

    def unique_tokens(self, train: TrainConfig) -> int:
        """Positions of all train rows that a run may read: padding counts, as it does in D."""
        rows = sum(len(table) for table in self.of(train).train_tables.values())
        return rows * train.data.row_length


def read_cell(planned: Planned, name: str, tables: Tables) -> Cell | None:
    """The finished cell, None when its run is not.

    Raises:
      ConfigError: the metrics of a finished run are damaged.
    """
    run = cell_dir(planned, name)
    if not run.summary_json.exists():
        return None
    summary = json.loads(run.summary_json.read_text())
    if summary["steps"] < planned.train.run.num_steps:
        return None
    evaluated = [
        r for r in read_metrics(run.metrics_jsonl) if r["kind"] == "eval" and r["step"] == summary["steps"]
    ]
    if not evaluated:
        raise ConfigError(
            f"{run.metrics_jsonl} must end with an evaluation at step {summary['steps']}; remove {run.root}"
        )
    return Cell(
        name=planned.name,
        role=planned.role,
        params=planned.params,
        params_total=planned.params_total,
        tokens=planned.tokens,
        unique_tokens=tables.unique_tokens(planned.train),
        flops=planned.flops,
        budget_flops=planned.budget_flops,
        seed=planned.train.run.seed,
        loss=float(evaluated[-1]["nats_per_token"]),
        seconds=float(summary["seconds"]),
    )


def cell_dir(planned: Planned, name: str) -> RunDir:
    """Where the run of a cell lies."""
    return run_dir(planned.train, name)


def run_cells(config: ScalingConfig, name: str, planned: Sequence[Planned], say: Say = print) -> None:
    """Train what is not finished, smallest first; a cell that crashed or was lost is tried again.

    Raises:
      ConfigError: bad input of a cell.
      JobsFailed: cells failed for good; the others have been run.
    """
    waiting = [p for p in planned if not _is_finished(p, name)]
    say(f"{len(planned) - len(waiting)} of {len(planned)} cells are finished")
    total_flops, done_flops, began = sum(p.flops for p in waiting), 0.0, time.monotonic()
    failures: list[Failure] = []
    folder = Path(config.train.run.workdir) / name / "jobs"
    for _ in range(config.scaling.retries + 1):
        failures = []
        by_name = {p.name: p for p in waiting}
        jobs = [
            Job(name=p.name, function=train_cell, arguments=(p.train, name), resources=config.resources)
            for p in sorted(waiting, key=lambda p: p.flops)
        ]
        for outcome in config.jobs.build(folder).run(jobs) if jobs else ():
            cell = by_name.pop(outcome.name)
            if isinstance(outcome, Done):
                done_flops += cell.flops
                spent_s = time.monotonic() - began
                left_s = spent_s * (total_flops - done_flops) / done_flops
                say(
                    f"{outcome.name} done in {outcome.wall_s:.0f} s; {len(by_name)} to go, about {left_s / 60:.0f} min"
                )
            else:
                failures.append(outcome)
                say(f"{outcome.name} {outcome.reason()}")
        faults = [f for failure in failures if isinstance(failure, Raised) for f in failure.faults]
        if faults:
            raise ConfigError(*dict.fromkeys(faults))
        again = {f.name for f in failures if isinstance(f, (Crashed, Lost))}
        waiting = [p for p in waiting if p.name in again]
        if not waiting:
            break
    if failures:
        raise JobsFailed(failures, len(planned))


def _is_finished(planned: Planned, name: str) -> bool:
    path = cell_dir(planned, name).summary_json
    return path.exists() and json.loads(path.read_text())["steps"] >= planned.train.run.num_steps


def finished_cells(config: ScalingConfig, name: str, tables: Tables) -> tuple[list[Cell], list[Planned]]:
    """What the run folders hold: finished cells, and the planned ones that are missing."""
    cells, missing = [], []
    for planned in plan_cells(config, tables.vocab_size):
        cell = read_cell(planned, name, tables)
        if cell is None:
            missing.append(planned)
        elif not math.isfinite(cell.loss):
            raise ConfigError(f"the loss of {cell.name} must be finite, got {cell.loss}; lower the peak rate")
        else:
            cells.append(cell)
    return cells, missing
