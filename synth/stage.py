"""Stages and how they are run: by shard, marked when complete, resumed exactly, never redone in silence.

`<workdir>/<stage>/00003-of-00016.jsonl.zst` holds the documents of one shard and `.done.json` beside it says
what made them. A shard whose marker fits is skipped, one without a marker is run, and one whose marker tells
of another recipe stops the run with the field that changed. Only this module writes into stage folders.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pretrain.config import ConfigError, diff, local
from pretrain.rundir import RunDir, file_sha256, storage_errors, write_json_atomic
from synth.document import Document, Failure
from synth.llm import cached
from synth.llm.budget import Budget
from synth.shards import SUFFIX, LineWriter, parse_stem, read_documents, shard_stem

_FAIL_FAST_AFTER = 20  # failures; a share over fewer would stop a run for its first bad luck
_ECHO_EVERY_S = 5.0


class StageFailed(RuntimeError):
    """More items failed than the run allows; the errors files say which and why."""


@dataclass(kw_only=True)
class Tally:
    """What one shard counted. Everything in it adds over shards and stages."""

    counts: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    partial: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "cost_usd": self.cost_usd,
            "partial": self.partial,
        }


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One part of a stage's work.

    `scratch` is a path that this shard may extend for files it keeps (its cache), `needed` the shards of the
    earlier stages that its stage declares to need.
    """

    index: int
    count: int
    recipe: str
    scratch: Path
    needed: Mapping[str, tuple[Path, ...]]
    budget: Budget
    tally: Tally


class Stage(Protocol):
    """Documents in, documents out. A gather stage has one shard and sees everything."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def gather(self) -> bool: ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of earlier stages, besides the one before, whose documents it reads in whole."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Config, prompt hashes, model: what decides the output besides the input, as plain JSON."""
        ...

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Yield what becomes of `documents`, in an order that does not depend on timing."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a pipeline runs. Only `num_shards` is part of what it makes."""

    workdir: str = local("runs/synth")
    num_shards: int = 1
    num_processes: int = local(1)
    fresh: tuple[str, ...] = local(())
    budget: Budget = local(Budget())
    max_failed_fraction: float = local(0.02)
    dry_run: Literal["no", "scripted", "pilot"] = local("no")
    dry_run_documents: int = local(3)

    def __post_init__(self):
        faults = []
        if not 1 <= self.num_shards <= 99999:
            faults.append(f"num_shards must lie in [1, 99999], got {self.num_shards}")
        if self.num_processes < 1:
            faults.append(f"num_processes must be at least 1, got {self.num_processes}")
        if not 0 <= self.max_failed_fraction <= 1:
            faults.append(f"max_failed_fraction must lie in [0, 1], got {self.max_failed_fraction}")
        if self.dry_run_documents < 1:
            faults.append(f"dry_run_documents must be at least 1, got {self.dry_run_documents}")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage left on the disk, summed over its shards."""

    name: str
    folder: Path
    recipe: str
    content: str
    shard_count: int
    counts: Mapping[str, int]
    cost_usd: float
    partial: str
    num_run: int

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its shards, in order."""
        return tuple(
            self.folder / (shard_stem(i, self.shard_count) + SUFFIX) for i in range(self.shard_count)
        )

    def documents(self) -> Iterator[Document]:
        """All documents of the stage, shard after shard."""
        for path in self.paths:
            yield from read_documents(path)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to run: plain values, so that another process can take it."""

    stage: Stage
    signature: dict[str, Any]
    recipe: str
    folder: Path
    index: int
    count: int
    inputs: tuple[Path, ...]
    every: int
    needed: Mapping[str, tuple[Path, ...]]
    budget: Budget
    max_failed_fraction: float


def run_pipeline(
    stages: Sequence[Stage], run: RunConfig, echo: Callable[[str], None] = print
) -> list[StageResult]:
    """Run the stages in order, each on the output of the one before it; the first gets no documents.

    Raises:
      ConfigError: a stage in `run.fresh` that does not exist, markers made by another recipe, a workdir that
        cannot be written or that another process is writing.
      StageFailed: more than `run.max_failed_fraction` of the items of a stage failed.
    """
    names = [stage.name for stage in stages]
    unknown = [name for name in run.fresh if name not in names]
    if unknown:
        raise ConfigError(
            f"run.fresh must name stages of this pipeline ({', '.join(names)}), got {unknown[0]!r}"
        )
    workdir = Path(run.workdir)
    folder = RunDir(workdir)
    folder.create()
    with folder.lock():
        fresh_from = min((names.index(name) for name in run.fresh), default=len(names))
        for name in names[fresh_from:]:
            _remove_markers(workdir / name)  # first, so that a crash cannot leave old work behind new
        results: list[StageResult] = []
        for position, stage in enumerate(stages):
            later = [workdir / name for name in names[position + 1 :]]
            results.append(run_stage(stage, results, workdir, run, later, echo))
    return results


def run_stage(
    stage: Stage,
    earlier: Sequence[StageResult],
    workdir: Path,
    run: RunConfig,
    later: Sequence[Path],
    echo: Callable[[str], None],
) -> StageResult:
    """Run the shards of `stage` that have no fitting marker, on the last of the `earlier` results.

    `later` are folders whose markers a rerun voids.
    """
    previous = earlier[-1] if earlier else None
    needed = [result for result in earlier if result.name in stage.needs]
    folder = workdir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    count = 1 if stage.gather else run.num_shards
    config = json.loads(json.dumps({"version": stage.version, **stage.identity()}))
    read = needed if previous is None or previous in needed else [*needed, previous]
    inputs = {result.name: {"recipe": result.recipe, "content": result.content} for result in read}
    signature = {"stage": stage.name, "config": config, "shard_count": count, "inputs": inputs}
    recipe = _digest([stage.name, config, [result.recipe for result in read]])
    budget = _unspent(run.budget, workdir, folder, count).split(count)
    jobs = []
    for index in range(count):
        if not _is_done(folder, index, signature):
            jobs.append(
                _Job(
                    stage=stage,
                    signature=signature,
                    recipe=recipe,
                    folder=folder,
                    index=index,
                    count=count,
                    inputs=_input_paths(previous, index, count),
                    every=1 if previous is None or previous.shard_count == count else count,
                    needed={result.name: result.paths for result in needed},
                    budget=budget,
                    max_failed_fraction=run.max_failed_fraction,
                )
            )
    if jobs:
        for other in later:
            _remove_markers(other)
        if len(jobs) < count:
            echo(f"{stage.name}: {count - len(jobs)} of {count} shards are complete, {len(jobs)} to run")
        _run_jobs(jobs, run.num_processes, echo)
    markers = [_read_marker(folder, index, count) for index in range(count)]
    result = _sum_markers(stage.name, folder, recipe, markers, len(jobs))
    total = result.counts.get("out", 0) + result.counts.get("failed", 0)
    if result.counts.get("failed", 0) > run.max_failed_fraction * total:
        raise StageFailed(
            _too_many(stage.name, folder, result.counts["failed"], total, run.max_failed_fraction)
        )
    if result.partial:
        echo(f"{stage.name}: stopped early, {result.partial}; the same command with a larger budget goes on")
    state = "" if jobs else " (complete before, nothing to do)"
    echo(f"{stage.name}: {_describe(result.counts, result.cost_usd)}{state}")
    return result


def _run_jobs(jobs: Sequence[_Job], num_processes: int, echo: Callable[[str], None]) -> None:
    if num_processes == 1 or len(jobs) == 1:
        for job in jobs:
            _run_shard(job, echo)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy event loops and open databases
    with concurrent.futures.ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context) as pool:
        for future in [pool.submit(_run_shard, job) for job in jobs]:
            future.result()


def _run_shard(job: _Job, echo: Callable[[str], None] | None = None) -> None:
    stem = shard_stem(job.index, job.count)
    output, errors = job.folder / (stem + SUFFIX), job.folder / f"{stem}.errors.jsonl"
    tally = Tally()
    shard = Shard(
        index=job.index,
        count=job.count,
        recipe=job.recipe,
        scratch=job.folder / stem,
        needed=job.needed,
        budget=job.budget,
        tally=tally,
    )
    started = spoken = time.monotonic()
    documents = _shard_documents(job, tally)
    failed = num_listed = 0
    with storage_errors(job.folder), LineWriter(output) as written, LineWriter(errors) as refused:
        for made in job.stage.run(documents, shard=shard):
            if isinstance(made, Failure) and made.dropped:
                num_listed += 1
                tally.counts[made.reason] += 1
                refused.write(made.to_line())
            elif isinstance(made, Failure):
                failed += 1
                num_listed += 1
                tally.counts["failed"] += 1
                tally.counts[f"failed_{made.reason}"] += 1
                refused.write(made.to_line())
                total = failed + tally.counts["out"]
                if failed >= _FAIL_FAST_AFTER and failed > job.max_failed_fraction * total:
                    refused.commit()
                    raise StageFailed(
                        _too_many(job.stage.name, errors, failed, total, job.max_failed_fraction)
                    )
            else:
                tally.counts["out"] += 1
                written.write(made.to_line())
            if echo is not None and time.monotonic() - spoken > _ECHO_EVERY_S:
                spoken = time.monotonic()
                rate = tally.counts["out"] / (spoken - started)
                echo(
                    f"{job.stage.name} {stem}: {_describe(tally.counts, tally.cost_usd)}, {rate:.1f} texts/s"
                )
        written.commit()
        refused.commit()
    if not num_listed:
        errors.unlink()
    marker = {
        "signature": job.signature,
        "fingerprint": _digest(job.signature),
        "output_sha256": file_sha256(output),
        "seconds": round(time.monotonic() - started, 3),
        **tally.to_json(),
    }
    write_json_atomic(job.folder / f"{stem}.done.json", marker)


def _input_paths(previous: StageResult | None, index: int, count: int) -> tuple[Path, ...]:
    """Shards to read: its own when the counts agree, else all (of which it takes every `count`-th document)."""
    if previous is None:
        return ()
    return (previous.paths[index],) if count == previous.shard_count else previous.paths


def _shard_documents(job: _Job, tally: Tally) -> Iterator[Document]:
    position = 0
    for path in job.inputs:
        for document in read_documents(path):
            if position % job.every == job.index % job.every:
                tally.counts["in"] += 1
                yield document
            position += 1


# --- markers -----------------------------------------------------------------------------------------


def _is_done(folder: Path, index: int, signature: dict[str, Any]) -> bool:
    """Whether a fitting marker and the output that it names are there.

    Raises:
      ConfigError: a marker of another recipe; the message names the first field that changed.
    """
    count = signature["shard_count"]
    for path in sorted(folder.glob("*.done.json")):
        stem = parse_stem(path.name)
        if stem is None or (stem[1] == count and stem[0] != index):
            continue
        marker = _load_marker(path)
        changes = diff(marker["signature"], signature)
        if changes:
            raise ConfigError(_changed(signature["stage"], folder, changes))
        if marker["partial"]:
            return False  # a larger budget may go further; what is kept costs nothing
        output = folder / (shard_stem(index, count) + SUFFIX)
        if not output.is_file() or file_sha256(output) != marker["output_sha256"]:
            return False
        return True
    return False


def _changed(stage: str, folder: Path, changes: Sequence[tuple[str, Any, Any]]) -> str:
    lines = [f"{path} was {_short(old)}, is now {_short(new)}" for path, old, new in changes]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return (
        f"stage {stage} is complete in {folder} with another recipe: {'; '.join(lines[:3])}{more}; "
        f"write \"run.fresh=('{stage}',)\" to make it and what follows again, or name a new run.workdir"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _load_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(path.read_bytes())
    except ValueError:
        marker = {}
    if not {"signature", "output_sha256", "partial", "counts", "cost_usd"} <= set(marker):
        raise ConfigError(f"{path} must be a marker in JSON, it is not; remove it to run its shard again")
    return marker


def _read_marker(folder: Path, index: int, count: int) -> dict[str, Any]:
    return _load_marker(folder / f"{shard_stem(index, count)}.done.json")


def _remove_markers(folder: Path) -> None:
    for path in folder.glob("*.done.json"):
        path.unlink()


def _sum_markers(
    name: str, folder: Path, recipe: str, markers: Sequence[Mapping[str, Any]], num_run: int
) -> StageResult:
    counts: Counter[str] = Counter()
    for marker in markers:
        counts.update(marker["counts"])
    return StageResult(
        name=name,
        folder=folder,
        recipe=recipe,
        content=_digest([marker["output_sha256"] for marker in markers]),
        shard_count=len(markers),
        counts=dict(counts),
        cost_usd=sum(marker["cost_usd"] for marker in markers),
        partial=next((marker["partial"] for marker in markers if marker["partial"]), ""),
        num_run=num_run,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe(counts: Mapping[str, int], cost: float) -> str:
    words = {
        "in": "documents in",
        "out": "out",
        "failed": "failed",
        "paid_calls": "calls",
        "cached_calls": "from cache",
    }
    parts = [f"{counts[key]:,} {text}" for key, text in words.items() if counts.get(key)]
    if counts.get("completion_tokens"):
        parts.append(f"{counts['completion_tokens']:,} tokens written")
    if cost:
        parts.append(f"${cost:.4f}")
    return ", ".join(parts) or "nothing"


def _too_many(stage: str, where: Path, failed: int, total: int, fraction: float) -> str:
    return (
        f"stage {stage}: {failed} of {total} items failed, run.max_failed_fraction={fraction} allows "
        f"{fraction * total:.0f}; reasons are in {where} (errors.jsonl); raise the fraction to accept them, "
        f"or mend the cause and write \"run.fresh=('{stage}',)\" (kept replies are not paid again)"
    )


# --- budget ------------------------------------------------------------------------------------------


def cache_path(scratch: Path) -> Path:
    """Where the shard with this scratch path keeps its replies."""
    return scratch.with_name(scratch.name + cached.SUFFIX)


def _unspent(budget: Budget, workdir: Path, folder: Path, count: int) -> Budget:
    """What everything paid in this workdir leaves, except what the shards of `folder` count for themselves."""
    own = {cache_path(folder / shard_stem(index, count)) for index in range(count)}
    for path in workdir.rglob(f"*{cached.SUFFIX}"):
        if path not in own:
            budget = budget.minus(cached.paid_in(path))
    return budget
