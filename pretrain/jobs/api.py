"""Jobs: calls that run elsewhere. Each ends as exactly one outcome: a value, or a failure with a type.

A failure is a result and not an exception, because one bad shard among a hundred should not take the other
99 with it. `Lost` alone is nobody's fault (a node went away, a queue took the slot): repeating it is right.
Implementations: `pool` (processes of this machine, the default), `on_ray`, `on_slurm`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,120}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job needs. A runner starts it only where this is free; `timeout_s` None never ends it."""

    num_cpus: int = 1
    num_devices: int = 0
    memory_bytes: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.num_cpus < 1:
            faults.append(f"num_cpus must be at least 1, got {self.num_cpus}; a job needs somewhere to run")
        if self.num_devices < 0:
            faults.append(f"num_devices must be at least 0, got {self.num_devices}; use 0 for none")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            faults.append(f"memory_bytes must be positive, got {self.memory_bytes}; use none for no request")
        if self.timeout_s is not None and self.timeout_s <= 0:
            faults.append(f"timeout_s must be positive, got {self.timeout_s}; use none for no limit")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """`function(*arguments)` under a name that is unique among the jobs run together.

    The function is pickled by reference: it must be importable (not a lambda, not defined in a config file or
    in a program's main module), as must the classes of its arguments and of what it returns or raises.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"a job's name must be letters, digits and _.=+- (it names files), got {self.name!r}; rename it"
            )
        if getattr(self.function, "__module__", None) == "__main__":
            raise ConfigError(
                f"a job's function must be importable, got {self.function!r} of the main module; "
                "move it to a module"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    name: str
    value: Any
    wall_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job has no value. `log_tail` is the end of what it printed."""

    name: str
    wall_s: float
    log_tail: str = ""

    def reason(self) -> str:
        """One line for a person."""
        return "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raised(Failure):
    """The function raised. `faults` are the lines of a ConfigError, else empty."""

    exception: str
    message: str
    traceback: str
    faults: tuple[str, ...] = ()

    def reason(self) -> str:
        return f"raised {self.exception}: {self.message}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crashed(Failure):
    """The process ended without an outcome: a signal (`exit_code` negative) or an exit of its own."""

    exit_code: int

    def reason(self) -> str:
        return f"ended by signal {-self.exit_code}" if self.exit_code < 0 else f"exited with {self.exit_code}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedOut(Failure):
    timeout_s: float

    def reason(self) -> str:
        return f"ran longer than {self.timeout_s:g} s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost(Failure):
    """The machine or the queue took the job away; it says nothing about the job itself."""

    cause: str

    def reason(self) -> str:
        return f"was lost: {self.cause}"


Outcome = Done | Failure


class Jobs(Protocol):
    """A runner."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """The outcome of each job, in the order in which they end.

        Closing the iterator, or an exception in it, ends the jobs that still run.
        """
        ...


class JobsConfig(Protocol):
    """The choice of a runner, named by a config. `folder` takes logs, calls and outcomes."""

    def build(self, folder: Path) -> Jobs: ...


class JobsFailed(RuntimeError):
    """Some jobs of a set that is only useful whole have failed."""

    def __init__(self, failures: Sequence[Failure], num_jobs: int):
        self.failures = tuple(failures)
        lines = [f"{failure.name} {failure.reason()}" for failure in failures[:10]]
        if len(failures) > 10:
            lines.append(f"and {len(failures) - 10} more")
        super().__init__(f"{len(failures)} of {num_jobs} jobs failed: " + "; ".join(lines))


def values(runner: Jobs, jobs: Sequence[Job]) -> list[Any]:
    """What the jobs returned, in the order of `jobs`.

    Raises:
      ConfigError: a job raised one: bad input stays bad input, with its own words.
      JobsFailed: other failures; all jobs have ended before it is raised.
    """
    found: dict[str, Any] = {}
    failures: list[Failure] = []
    for outcome in runner.run(jobs):
        if isinstance(outcome, Done):
            found[outcome.name] = outcome.value
        else:
            failures.append(outcome)
    order = [job.name for job in jobs]
    failures.sort(key=lambda failure: order.index(failure.name))
    faults = [fault for failure in failures if isinstance(failure, Raised) for fault in failure.faults]
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    if failures:
        raise JobsFailed(failures, len(jobs))
    return [found[name] for name in order]


def check_names(jobs: Sequence[Job]) -> None:
    """Raise ConfigError when two jobs share a name: their files would."""
    seen: set[str] = set()
    twice = dict.fromkeys(job.name for job in jobs if job.name in seen or seen.add(job.name))
    if twice:
        raise ConfigError(
            f"jobs that run together must have different names, got {', '.join(twice)} twice; rename"
        )
