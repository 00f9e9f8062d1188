"""Jobs on a Ray cluster (`[ray]` extra): Ray finds the machine, `pool.run_one` runs the job on it.

Ray's own retries are off, because the caller knows what a repetition costs. What remains of Ray's errors is
a machine or worker that went away: `Lost`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pretrain.config import ConfigError, local
from pretrain.jobs.api import Job, Lost, Outcome, check_names
from pretrain.jobs.pool import run_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayJobsConfig:
    """A Ray cluster. Where jobs run is not part of a run's identity.

    Attributes:
      address: of a running cluster, e.g. "auto"; None starts one on this machine for the time of `run`.
      num_cpus: of the cluster that None starts; None is all of this machine.
      grace_s: after SIGTERM, time to save and leave before SIGKILL.
    """

    address: str | None = local(None)
    num_cpus: int | None = local(None)
    grace_s: float = local(10.0)

    def __post_init__(self) -> None:
        if self.address is not None and self.num_cpus is not None:
            raise ConfigError(
                f"num_cpus is for a cluster started here, got num_cpus={self.num_cpus} and "
                f"address={self.address!r}; set one of them"
            )

    def build(self, folder: Path) -> "RayJobs":
        return RayJobs(self, folder)


class RayJobs:
    """See `RayJobsConfig`. `folder` must be on a disk that all machines of the cluster share."""

    def __init__(self, config: RayJobsConfig, folder: Path):
        self._config = config
        self._folder = Path(folder).absolute()

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Outcomes in the order in which the jobs end.

        Raises:
          ConfigError: two jobs share a name, or one asks for more than the cluster started here has.
        """
        jobs = list(jobs)
        check_names(jobs)
        return self._run(jobs)

    def _run(self, jobs: list[Job]) -> Iterator[Outcome]:
        starts_cluster = not ray.is_initialized()
        if starts_cluster:
            ray.init(
                address=self._config.address or "local",
                num_cpus=self._config.num_cpus,
                include_dashboard=False if self._config.address is None else None,
                log_to_driver=False,
            )
        pending: dict[Any, Job] = {}
        try:
            if self._config.address is None:
                _check_fits(jobs)
            for job in jobs:
                pending[self._submit(job)] = job
            while pending:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
                job = pending.pop(ended)
                try:
                    outcome = ray.get(ended)
                except RayTaskError:
                    raise  # `run_one` itself failed: a promise of ours, or a disk that is not shared
                except RayError as error:
                    outcome = Lost(name=job.name, wall_s=0.0, cause=str(error).partition("\n")[0])
                yield outcome
        finally:
            for reference in pending:
                # The job's own process ends with the worker: its life line closes.
                ray.cancel(reference, force=True)
            if starts_cluster:
                ray.shutdown()

    def _submit(self, job: Job) -> Any:
        needs = job.resources
        remote = ray.remote(run_one).options(
            name=job.name,
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_devices or None,
            memory=needs.memory_bytes,
            max_retries=0,
        )
        return remote.remote(job, self._folder, self._config.grace_s)


def _check_fits(jobs: list[Job]) -> None:
    """A request that no machine can meet would wait for ever."""
    there = ray.cluster_resources()
    for job in jobs:
        for what, asked, ray_name in (
            ("num_cpus", job.resources.num_cpus, "CPU"),
            ("num_devices", job.resources.num_devices, "GPU"),
            ("memory_bytes", job.resources.memory_bytes or 0, "memory"),
        ):
            if asked > there.get(ray_name, 0):
                raise ConfigError(
                    f"job {job.name} asks for {what}={asked}, the cluster has {there.get(ray_name, 0):g}; "
                    "lower the request or name a larger cluster"
                )
