"""Jobs on a SLURM cluster (`[slurm]` extra): submitit submits arrays, `pool.run_one` runs each job.

Jobs with the same resources form one array. SLURM's time limit is a little longer than ours, so that ours
ends the job first and says so; what SLURM ends by itself is told by the state of the job. A job that SLURM
preempts and queues again is called again from its start.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import UncompletedJobError

from pretrain.config import ConfigError, local
from pretrain.jobs.api import Crashed, Job, Lost, Outcome, Resources, TimedOut, check_names
from pretrain.jobs.pool import run_one

# Beyond our own limit and grace: submitit is signaled 90 s before SLURM's limit, and Python has to start.
_MARGIN_S = 150.0
# Preempted jobs are queued again, unless the cluster cancels them instead; then the state just stays.
_PREEMPTED_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmJobsConfig:
    """A SLURM cluster. Where jobs run is not part of a run's identity.

    Attributes:
      cluster: "slurm", or "local" for submitit's processes on this machine (to try a pipeline out).
      max_running: how many jobs of an array run at a time.
      default_timeout_s: the limit of jobs without one of their own (SLURM knows no job without a limit).
      options: further sbatch options, e.g. {"account": "abc", "constraint": "a100"}.
      poll_s: how often the state of the jobs is asked for.
      grace_s: after SIGTERM, time to save and leave before SIGKILL.
    """

    cluster: Literal["slurm", "local"] = local("slurm")
    partition: str | None = local(None)
    max_running: int = local(256)
    default_timeout_s: float = local(24 * 3600.0)
    options: dict[str, str] = local(factory=dict)
    poll_s: float = local(5.0)
    grace_s: float = local(30.0)

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be positive, got {value}; raise it"
            for name in ("max_running", "default_timeout_s", "poll_s")
            if (value := getattr(self, name)) <= 0
        ]
        if faults:
            raise ConfigError(*faults)

    def build(self, folder: Path) -> "SlurmJobs":
        return SlurmJobs(self, folder)


class SlurmJobs:
    """See `SlurmJobsConfig`. `folder` must be on a disk that all nodes share."""

    def __init__(self, config: SlurmJobsConfig, folder: Path):
        self._config = config
        self._folder = Path(folder).absolute()

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Outcomes in the order in which the jobs end.

        Raises:
          ConfigError: two jobs share a name, or this machine cannot submit to SLURM.
        """
        jobs = list(jobs)
        check_names(jobs)
        return self._run(jobs)

    def _run(self, jobs: list[Job]) -> Iterator[Outcome]:
        pending: list[_Submitted] = []
        try:
            groups: dict[Resources, list[Job]] = {}
            for job in jobs:
                groups.setdefault(job.resources, []).append(job)
            for resources, group in groups.items():
                pending += self._submit(resources, group)
            while pending:
                ended = [submitted for submitted in pending if submitted.has_ended()]
                for submitted in ended:
                    pending.remove(submitted)
                    yield submitted.outcome()
                if not ended:
                    time.sleep(self._config.poll_s)
        finally:
            for submitted in pending:
                submitted.handle.cancel(check=False)

    def _submit(self, resources: Resources, group: list[Job]) -> list["_Submitted"]:
        try:
            executor = submitit.AutoExecutor(self._folder / "slurm", cluster=self._config.cluster)
        except RuntimeError as error:
            raise ConfigError(
                f"jobs on SLURM must be started where sbatch and srun are, got: {error}; "
                "log in to a submit node, or use PoolConfig"
            ) from error
        timeout_s = resources.timeout_s or self._config.default_timeout_s
        parameters: dict[str, Any] = {
            "name": "autodidact",
            "cpus_per_task": resources.num_cpus,
            "timeout_min": math.ceil((timeout_s + self._config.grace_s + _MARGIN_S) / 60),
            "slurm_array_parallelism": self._config.max_running,
            "slurm_additional_parameters": self._config.options,
        }
        if self._config.partition is not None:
            parameters["slurm_partition"] = self._config.partition
        if resources.num_devices:
            parameters["gpus_per_node"] = resources.num_devices
        if resources.memory_bytes is not None:
            parameters["mem_gb"] = math.ceil(resources.memory_bytes / 2**30)
        executor.update_parameters(**parameters)
        limited = dataclasses.replace(resources, timeout_s=timeout_s)
        calls = [dataclasses.replace(job, resources=limited) for job in group]
        with _interruptible_children(), executor.batch():
            handles = [executor.submit(run_one, job, self._folder, self._config.grace_s) for job in calls]
        return [_Submitted(job=job, handle=handle) for job, handle in zip(calls, handles, strict=True)]


@contextlib.contextmanager
def _interruptible_children() -> Iterator[None]:
    """submitit cancels its local jobs by SIGINT, which they would ignore as this process does behind a shell's `&`."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclasses.dataclass
class _Submitted:
    job: Job
    handle: submitit.Job
    preempted_s: float | None = None  # when it was first seen preempted

    def has_ended(self) -> bool:
        if self.handle.done():
            self.preempted_s = None
            return True
        if self._state() != "PREEMPTED":
            self.preempted_s = None
            return False
        self.preempted_s = self.preempted_s or time.monotonic()
        return time.monotonic() - self.preempted_s > _PREEMPTED_S

    def outcome(self) -> Outcome:
        """What `run_one` returned, or what SLURM's state says when it did not return."""
        lost = {"name": self.job.name, "wall_s": 0.0, "log_tail": (self.handle.stderr() or "")[-4000:]}
        state = self._state()
        if self.preempted_s is not None:
            return Lost(**lost, cause="SLURM preempted it and did not queue it again")
        try:
            return self.handle.result()
        except UncompletedJobError as error:
            if state in ("TIMEOUT", "DEADLINE"):
                return TimedOut(**lost, timeout_s=self.job.resources.timeout_s or math.inf)
            if state == "OUT_OF_MEMORY":
                return Crashed(**lost, exit_code=-9)
            return Lost(**lost, cause=f"SLURM says {state}: {str(error).partition(chr(10))[0]}")

    def _state(self) -> str:
        # `CANCELLED by 1000` and the like: the first word is the state.
        return self.handle.state.partition(" ")[0].rstrip("+")
