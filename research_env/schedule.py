"""Who runs when: a queue by priority, leases of devices, budgets that are checked before the spend, retries of host faults."""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from pretrain.config import ConfigError
from pretrain.jobs.api import Done, Job, Jobs, Lost, Resources
from research_env.ledger import Ledger
from research_env.records import Resource, Result, Status
from research_env.task import Task
from research_env.worker import JobSpec, run_spec

MAX_ATTEMPTS = 3
GRACE_S = 300.0  # of a job on a cluster, beyond the limits of what it runs
PRIORITIES = {"baseline": 0, "confirm": 1, "final": 1, "repair": 2, "rung": 3, "screen": 3}


class CannotGoOn(Exception):
    """The baseline or the host fails, so that nothing can be compared; what ran is kept, and the same command tries again."""


class OutOfBudget(Exception):
    """The next act would spend more than the campaign may; says which budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a campaign may spend; None is no limit.

    Runs, tokens and dollars are never exceeded. How many device-seconds a run takes is known when it has ended: once
    `max_device_s` are spent no further batch begins, and a batch that has begun is finished.
    """

    max_runs: int | None = None
    max_device_s: float | None = None
    max_tokens: int | None = None
    max_cost_usd: float | None = None

    def check(
        self,
        spent: Mapping[str, float],
        num_new_runs: int = 0,
        *,
        new_tokens: int = 0,
        new_cost_usd: float = 0.0,
    ) -> None:
        """Raises:
        OutOfBudget: the new runs or calls do not fit, or something is used up.
        """
        if self.max_runs is not None and spent["runs"] + num_new_runs > self.max_runs:
            raise OutOfBudget(
                f"max_runs={self.max_runs}: {spent['runs']:.0f} are done or promised, {num_new_runs} more were asked for"
            )
        for name, limit, new in (
            ("device_s", self.max_device_s, 0.0),
            ("tokens", self.max_tokens, new_tokens),
            ("cost_usd", self.max_cost_usd, new_cost_usd),
        ):
            if limit is not None and (spent[name] >= limit or spent[name] + new > limit):
                raise OutOfBudget(f"max_{name}={limit:g}: {spent[name]:g} are spent, a call may need {new:g}")


class Devices:
    """A table of leases. CPU runs get their own cores; nothing is leased twice at a time."""

    def __init__(self, available: dict[str, Sequence[int]]):
        self._free = {kind: list(ids) for kind, ids in available.items()}
        self._total = {kind: len(ids) for kind, ids in available.items()}
        self._changed = threading.Condition()

    @classmethod
    def of_this_host(cls, accelerators: Sequence[Resource] = ()) -> "Devices":
        """The cores that this process may use, and the accelerators that the caller says are there."""
        named = {resource.kind: range(resource.count) for resource in accelerators}
        return cls({"CPU": sorted(os.sched_getaffinity(0)), **named})

    def check(self, resource: Resource) -> None:
        """Raises:
        ConfigError: this host never has that much.
        """
        if self._total.get(resource.kind, 0) < resource.count:
            have = ", ".join(f"{count}x{kind}" for kind, count in self._total.items())
            raise ConfigError(
                f"resource {resource} does not fit this host, which has {have}; ask for less or list devices"
            )

    def parallel(self, resource: Resource) -> int:
        """How many such runs fit at once."""
        return self._total[resource.kind] // resource.count

    @contextlib.contextmanager
    def lease(self, resource: Resource) -> Iterator[tuple[int, ...]]:
        """Wait for free devices and hold them."""
        self.check(resource)
        with self._changed:
            while len(self._free[resource.kind]) < resource.count:
                self._changed.wait()
            taken = tuple(self._free[resource.kind].pop(0) for _ in range(resource.count))
        try:
            yield taken
        finally:
            with self._changed:
                self._free[resource.kind] = sorted(self._free[resource.kind] + list(taken))
                self._changed.notify_all()


def run_all(
    keys: Sequence[tuple[str, int]],
    run_one: Callable[[str, tuple[int, ...]], Result],
    ledger: Ledger,
    devices: Devices,
    resource: Resource,
    on_done: Callable[[str, Result], None] = lambda key, result: None,
) -> None:
    """Run every queued key (with its priority, low first) to a recorded result, in parallel as leases allow.

    `run_one(key, device ids)` returns a result; INFRA_ERROR and PREEMPTED are retried, then recorded as INFRA_ERROR.
    """

    def work(key: str) -> None:
        while True:
            with devices.lease(resource) as taken:
                attempt = ledger.start(key)
                result = run_one(key, taken)
            if _settle(ledger, key, result, attempt, on_done):
                return

    ordered = [key for key, _ in sorted(keys, key=lambda item: item[1])]
    with concurrent.futures.ThreadPoolExecutor(max(1, devices.parallel(resource))) as pool:
        futures = [pool.submit(work, key) for key in ordered]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def run_all_on(
    jobs: Jobs,
    keys: Sequence[tuple[str, int]],
    make_spec: Callable[[str], JobSpec],
    ledger: Ledger,
    resource: Resource,
    task: Task,
    on_done: Callable[[str, Result], None] = lambda key, result: None,
) -> None:
    """`run_all` on a runner of jobs (processes, Ray, SLURM), which finds the machines. All files are on a disk they share.

    What a machine or a queue took away is PREEMPTED, what else ends without a result is the host's fault; both are repeated
    as in `run_all`. This process alone writes the ledger: seals of the machines are found on the shared disk.
    """
    is_cpu = resource.kind == "CPU"
    needs = Resources(
        num_cpus=resource.count,
        num_devices=0 if is_cpu else resource.count,
        memory_bytes=task.limits.memory_bytes + task.judge_limits.memory_bytes,
        # The build, the run and the judge have their own limits; this ends what those did not.
        timeout_s=2 * task.limits.wall_s + task.judge_limits.wall_s + GRACE_S,
    )
    waiting = [key for key, _ in sorted(keys, key=lambda item: item[1])]
    while waiting:
        attempts = {key: ledger.start(key) for key in waiting}
        specs = {f"{key}-{attempts[key]}": make_spec(key) for key in waiting}
        batch = [
            Job(name=name, function=run_spec, arguments=(spec.to_json(),), resources=needs)
            for name, spec in specs.items()
        ]
        waiting = []
        for outcome in jobs.run(batch):
            spec = specs[outcome.name]
            if isinstance(outcome, Done):
                result = Result.from_json(outcome.value)
            else:
                result = Result(
                    status=Status.PREEMPTED if isinstance(outcome, Lost) else Status.INFRA_ERROR,
                    reason=f"{outcome.reason()} {outcome.log_tail[-500:]}".strip(), seed=spec.seed, rung=spec.rung,
                    run_key=spec.run_key, isolation=spec.label, higher_is_better=task.higher_is_better,
                )  # fmt: skip
            if not _settle(ledger, spec.run_key, result, attempts[spec.run_key], on_done):
                waiting.append(spec.run_key)


def _settle(
    ledger: Ledger, key: str, result: Result, attempt: int, on_done: Callable[[str, Result], None]
) -> bool:
    """Record a result, or put the run back into the queue; whether it is settled."""
    if not result.status.is_sample and attempt < MAX_ATTEMPTS:
        ledger.requeue(key, result.reason)
        return False
    if result.status is Status.PREEMPTED:
        result = dataclasses.replace(result, status=Status.INFRA_ERROR, reason=f"preempted {attempt} times")
    ledger.finish(key, result)
    on_done(key, result)
    return True
