"""Jobs as processes of this machine, each in a process group of its own.

A fresh interpreter for each job: nothing of the parent (device handles, locks, threads) is shared, a crash
takes one job, and everything a job started can be ended with it. The price is an interpreter start, so a job
should be seconds of work or more.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pretrain.config import ConfigError, local
from pretrain.jobs.api import Crashed, Failure, Job, Outcome, Resources, TimedOut, check_names
from pretrain.jobs.call import dump_call, load_outcome

_POLL_S = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Local processes. `devices` are lent to jobs that ask for them, one holder at a time.

    None of this changes what a job computes, so none of it is part of a run's identity.

    Attributes:
      num_cpus: how many CPUs the running jobs may ask for together; None is all of this machine.
      memory_bytes: the same for memory; None does not count it.
      devices: accelerators by their index, as in CUDA_VISIBLE_DEVICES.
      grace_s: after SIGTERM, time to save and leave before SIGKILL.
    """

    num_cpus: int | None = local(None)
    memory_bytes: int | None = local(None)
    devices: tuple[int, ...] = local(())
    grace_s: float = local(10.0)

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ConfigError(f"num_cpus must be at least 1, got {self.num_cpus}; use none for all CPUs")
        if len(set(self.devices)) < len(self.devices):
            raise ConfigError(f"devices must be different, got {self.devices}; list each index once")
        if self.grace_s < 0:
            raise ConfigError(f"grace_s must not be negative, got {self.grace_s}; use 0 to kill at once")

    def build(self, folder: Path) -> "Pool":
        return Pool(self, folder)


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    outcome_path: Path
    log: IO[bytes]
    devices: tuple[int, ...]
    started_s: float
    asked_s: float | None = None  # when SIGTERM was sent


class Pool:
    """See `PoolConfig`. Writes `<name>.call`, `<name>.outcome` and `<name>.log` into `folder`."""

    def __init__(self, config: PoolConfig, folder: Path):
        self._config = config
        self._folder = Path(folder)
        self._num_cpus = config.num_cpus or os.cpu_count() or 1

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Outcomes in the order in which the jobs end; jobs start in the order given.

        Raises:
          ConfigError: two jobs share a name, or one asks for more than the pool has; nothing has run then.
        """
        waiting = list(jobs)
        check_names(waiting)
        for job in waiting:
            self._check_fits(job)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._run(waiting)

    def _run(self, waiting: list[Job]) -> Iterator[Outcome]:
        running: list[_Running] = []
        try:
            while waiting or running:
                # First come, first served: a large job is not passed by small ones until it starves.
                while waiting and self._free_for(waiting[0].resources, running):
                    running.append(self._start(waiting.pop(0), running))
                ended = [r for r in running if _has_ended(r.process)]
                for r in ended:
                    running.remove(r)
                    yield self._outcome(r)
                for r in running:
                    self._enforce_timeout(r)
                if not ended:
                    time.sleep(_POLL_S)
        finally:
            self._end_all(running)

    def _check_fits(self, job: Job) -> None:
        needs = job.resources
        for what, asked, there in (
            ("num_cpus", needs.num_cpus, self._num_cpus),
            ("num_devices", needs.num_devices, len(self._config.devices)),
            ("memory_bytes", needs.memory_bytes or 0, self._config.memory_bytes),
        ):
            if there is not None and asked > there:
                raise ConfigError(
                    f"job {job.name} asks for {what}={asked}, the pool has {there}; "
                    f"lower the request or give the pool more"
                )

    def _free_for(self, needs: Resources, running: list[_Running]) -> bool:
        held = [r.job.resources for r in running]
        memory_bytes = sum(r.memory_bytes or 0 for r in (*held, needs))
        return (
            sum(r.num_cpus for r in (*held, needs)) <= self._num_cpus
            and sum(r.num_devices for r in (*held, needs)) <= len(self._config.devices)
            and (self._config.memory_bytes is None or memory_bytes <= self._config.memory_bytes)
        )

    def _start(self, job: Job, running: list[_Running]) -> _Running:
        call_path, outcome_path, log_path = (
            self._folder / f"{job.name}.{suffix}" for suffix in ("call", "outcome", "log")
        )
        outcome_path.unlink(missing_ok=True)
        dump_call(call_path, job)
        lent = {device for r in running for device in r.devices}
        devices = tuple(d for d in self._config.devices if d not in lent)[: job.resources.num_devices]
        environment = dict(os.environ)
        if self._config.devices:
            # Also for jobs without a device: JAX would otherwise reserve memory on every one it sees.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        # The child must find this package before it reads the parent's sys.path from the call.
        package_root = str(Path(__file__).parent.parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            p for p in (package_root, environment.get("PYTHONPATH")) if p
        )
        log = open(log_path, "w+b")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pretrain.jobs.call",
                str(call_path.absolute()),
                str(outcome_path.absolute()),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        return _Running(
            job=job,
            process=process,
            outcome_path=outcome_path,
            log=log,
            devices=devices,
            started_s=time.monotonic(),
        )

    def _enforce_timeout(self, r: _Running) -> None:
        timeout_s, now = r.job.resources.timeout_s, time.monotonic()
        if r.asked_s is None:
            if timeout_s is not None and now - r.started_s > timeout_s:
                r.asked_s = now
                _signal_tree(r.process.pid, signal.SIGTERM)
        elif now - r.asked_s > self._config.grace_s:
            _signal_tree(r.process.pid, signal.SIGKILL)

    def _outcome(self, r: _Running) -> Outcome:
        _sweep(r)
        wall_s = time.monotonic() - r.started_s
        timeout_s = r.job.resources.timeout_s
        if r.asked_s is not None and timeout_s is not None:
            return TimedOut(name=r.job.name, wall_s=wall_s, log_tail=_tail(r.log), timeout_s=timeout_s)
        if not r.outcome_path.exists():
            return Crashed(
                name=r.job.name, wall_s=wall_s, log_tail=_tail(r.log), exit_code=r.process.returncode
            )
        outcome = load_outcome(r.outcome_path)
        if isinstance(outcome, Failure):
            outcome = dataclasses.replace(outcome, log_tail=_tail(r.log))
        r.log.close()
        return outcome

    def _end_all(self, running: list[_Running]) -> None:
        """Nobody waits for these any more: ask, wait for `grace_s` at most, kill."""
        for r in running:
            _signal_tree(r.process.pid, signal.SIGTERM)
        deadline_s = time.monotonic() + self._config.grace_s
        while time.monotonic() < deadline_s and not all(_has_ended(r.process) for r in running):
            time.sleep(_POLL_S)
        for r in running:
            _sweep(r)
            r.log.close()


def run_one(job: Job, folder: Path, grace_s: float) -> Outcome:
    """One job in a process of this machine, for a runner that has found the machine and holds its resources.

    Timeouts, crashes, logs and leftovers are then the same everywhere.
    """
    held = dataclasses.replace(job.resources, num_cpus=1, num_devices=0, memory_bytes=None)
    pool = PoolConfig(num_cpus=1, grace_s=grace_s).build(folder)
    (outcome,) = pool.run([dataclasses.replace(job, resources=held)])
    return outcome


def _has_ended(process: subprocess.Popen) -> bool:
    """Whether it has ended, without reaping it: until it is reaped its group id cannot be taken by others."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _sweep(r: _Running) -> None:
    """Kill what is left of a job and reap it."""
    _signal_tree(r.process.pid, signal.SIGKILL)
    r.process.wait()
    assert r.process.stdin is not None
    r.process.stdin.close()


def _signal_tree(leader: int, number: int) -> None:
    """Signal a group and the descendants that left it for a session of their own."""
    for pid in _descendants(leader):
        _signal(os.kill, pid, number)
    _signal(os.killpg, leader, number)


def _signal(send, target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        return  # ended in the meantime


def _descendants(leader: int) -> list[int]:
    """Children of children of `leader` as Linux lists them; elsewhere the group has to do."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent ...; the name may hold anything, also parentheses.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended while we looked
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, queue = [], [leader]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _tail(log: IO[bytes], num_bytes: int = 4000) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - num_bytes))
    text = log.read().decode(errors="replace")
    log.close()
    return text
