"""Who runs when: a queue by priority, leases of devices, budgets that are checked before the spend, retries of host faults."""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from pretrain.config import ConfigError
from research_env.ledger import Ledger
from research_env.records import Resource, Result, Status

MAX_ATTEMPTS = 3
PRIORITIES = {"baseline": 0, "confirm": 1, "final": 1, "repair": 2, "rung": 3, "screen": 3}


class OutOfBudget(Exception):
    """The next act would spend more than the campaign may; says which budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a campaign may spend; None is no limit."""

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
                f"max_runs={self.max_runs}: {spent['runs']:.0f} are done, {num_new_runs} more were asked for"
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
            if result.status.is_sample or attempt >= MAX_ATTEMPTS:
                if result.status is Status.PREEMPTED:
                    result = dataclasses.replace(
                        result, status=Status.INFRA_ERROR, reason=f"preempted {attempt} times"
                    )
                ledger.finish(key, result)
                on_done(key, result)
                return
            ledger.requeue(key, result.reason)

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
