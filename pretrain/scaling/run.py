"""Runs the cells of a plan as jobs; a cell that is finished is read, one that was killed resumes, both by its run folder.

A cell's folder is `<workdir>/<ladder>/<fingerprint8>`, the one that `pretrain.main` would give that config. Nothing
else remembers what has been done, so the same command after any death goes on where it was.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain.allocator import keep_heap
from pretrain.checkpoint import saved_steps
from pretrain.config import ConfigError, fingerprint
from pretrain.data.tables import PreparedData, prepare_tables
from pretrain.jobs.api import Crashed, Done, Failure, Job, JobsFailed, Lost, Raised
from pretrain.metrics import read_metrics
from pretrain.rundir import RunDir
from pretrain.scaling.cells import Cell
from pretrain.scaling.plan import Branch, Planned, ScalingConfig, branches, plan_cells
from pretrain.train import EXIT_PREEMPTED, TrainConfig, run_dir, train

Say = Callable[[str], None]


class Preempted(RuntimeError):
    """A cell was asked to stop and has saved; it is nobody's fault."""


def train_cell(config: TrainConfig, name: str, trunk: Path | None = None) -> str:
    """The job: train one cell, from a trunk if there is one; returns its run folder."""
    keep_heap()
    result = train(config, name=name, trunk=trunk)
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
        skipped_steps=int(summary["skipped_steps"]),
    )


def cell_dir(planned: Planned, name: str) -> RunDir:
    """Where the run of a cell lies."""
    return run_dir(planned.train, name)


def run_cells(config: ScalingConfig, name: str, planned: Sequence[Planned], say: Say = print) -> None:
    """Train what is not finished, trunks before their branches, small cells first.

    A cell that crashed or was lost is tried again and resumes from its checkpoint.

    Raises:
      ConfigError: bad input of a cell.
      JobsFailed: cells failed for good; the others have been run.
    """
    waiting = [p for p in planned if not _is_finished(p, name)]
    say(f"{len(planned) - len(waiting)} of {len(planned)} cells are finished")
    branch_of = branches(planned)
    by_name = {p.name: p for p in planned}
    progress = _Progress(waiting, say)
    failures: list[Failure] = []
    for branched in (False, True):
        jobs = [
            _job(config, name, cell, by_name, branch_of)
            for cell in sorted(waiting, key=lambda cell: cell.flops)
            if (cell.name in branch_of) == branched
        ]
        failures += _run_jobs(config, Path(config.train.run.workdir) / name / "jobs", jobs, progress)
    if failures:
        raise JobsFailed(failures, len(planned))


def _job(
    config: ScalingConfig,
    name: str,
    cell: Planned,
    by_name: Mapping[str, Planned],
    branch_of: Mapping[str, Branch],
) -> Job:
    """The call that trains a cell; a trunk keeps the steps where others leave it."""
    left = tuple(sorted(b.step for b in branch_of.values() if b.trunk == cell.name))
    policy = dataclasses.replace(cell.train.checkpoint, keep_steps=left)
    trunk = None
    if (branch := branch_of.get(cell.name)) is not None:
        path = cell_dir(by_name[branch.trunk], name).checkpoints / str(branch.step)
        # A trunk that failed, or was trained before it had branches, has no such step: train from step 0.
        trunk = path if branch.step in saved_steps(path.parent) else None
    train = dataclasses.replace(cell.train, checkpoint=policy)
    return Job(
        name=cell.name, function=train_cell, arguments=(train, name, trunk), resources=config.resources
    )


class _Progress:
    """Says what has ended, and when the rest will have at the same rate of FLOPs."""

    def __init__(self, waiting: Sequence[Planned], say: Say):
        self.say = say
        self._flops = {p.name: p.flops for p in waiting}
        self._total, self._done, self._began = sum(self._flops.values()), 0.0, time.monotonic()

    def done(self, outcome: Done) -> None:
        self._done += self._flops.pop(outcome.name)
        left_s = (time.monotonic() - self._began) * (self._total - self._done) / self._done
        self.say(
            f"{outcome.name} done in {outcome.wall_s:.0f} s; {len(self._flops)} to go, about {left_s / 60:.0f} min"
        )


def _run_jobs(config: ScalingConfig, folder: Path, jobs: Sequence[Job], progress: _Progress) -> list[Failure]:
    """Run jobs, again those that crashed or were lost; returns the failures that are left."""
    final: list[Failure] = []
    for attempt in range(config.scaling.retries + 1):
        failures: list[Failure] = []
        for outcome in config.jobs.build(folder).run(jobs) if jobs else ():
            if isinstance(outcome, Done):
                progress.done(outcome)
            else:
                failures.append(outcome)
                progress.say(f"{outcome.name} {outcome.reason()}")
        faults = [f for failure in failures if isinstance(failure, Raised) for f in failure.faults]
        if faults:
            raise ConfigError(*dict.fromkeys(faults))
        again = {f.name for f in failures if _may_be_repeated(f)}
        if attempt == config.scaling.retries:
            again = set()
        final += [f for f in failures if f.name not in again]
        jobs = [job for job in jobs if job.name in again]
    return final


def _may_be_repeated(failure: Failure) -> bool:
    """Whether it says nothing about the cell itself."""
    preempted = isinstance(failure, Raised) and failure.exception == Preempted.__qualname__
    return preempted or isinstance(failure, (Crashed, Lost))


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
