"""The processes of one run: how they find each other, which of them writes, and what happens when one is lost.

Every process runs the same program on its own devices; process 0 coordinates and is the only one that writes files.
Who is who comes from SLURM, from a TPU's own metadata, from Ray, from the variables that torchrun-like launchers set, or
from the config. A process whose peer is gone ends with code 7 and one line, for its launcher to start the run again.
"""

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from pretrain.compat import wait_at_barrier
from pretrain.config import ConfigError, local

EXIT_PEER_LOST = 7
_SAY_EVERY_S = 30.0
_CLUSTERS = ("none", "slurm", "tpu", "ray", "torchrun", "explicit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of a run find each other; `none` is one process alone."""

    cluster: Literal["none", "slurm", "tpu", "ray", "torchrun", "explicit"] = local("none")
    # host:port on which process 0 listens; for slurm its port alone will do, 12321 by default. A driver of Ray may pass
    # this and the next two, and what it leaves out comes from the variables that Ray Train sets.
    coordinator: str = local("")
    num_processes: int | None = local(None)
    process_id: int | None = local(None)
    join_timeout_s: int = local(300)
    heartbeat_timeout_s: int = local(30)  # a process that is silent for so long is lost
    # How long a process that is done waits for the others, who may still judge, hash and write.
    end_timeout_s: int = local(7200)

    def __post_init__(self):
        faults = []
        if self.cluster not in _CLUSTERS:
            faults.append(f"cluster must be one of {', '.join(_CLUSTERS)}, got {self.cluster!r}")
        given = {
            "coordinator": self.coordinator or None,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        if self.cluster == "explicit":
            missing = [name for name, value in given.items() if value is None]
            if missing:
                faults.append(f"cluster=explicit needs {', '.join(missing)} as well")
        elif self.cluster not in ("slurm", "ray") and any(value is not None for value in given.values()):
            named = next(name for name, value in given.items() if value is not None)
            faults.append(f"{named} belongs to cluster=explicit or ray, got cluster={self.cluster}")
        if self.num_processes is not None and self.num_processes < 1:
            faults.append(f"num_processes must be at least 1, got {self.num_processes}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 1 << 30):
            faults.append(
                f"process_id must lie in [0, num_processes={self.num_processes}), got {self.process_id}"
            )
        address = r"(\S+:)?\d+" if self.cluster == "slurm" else r"\S+:\d+"
        if self.coordinator and not re.fullmatch(address, self.coordinator):
            faults.append(f"coordinator must be host:port, got {self.coordinator!r}")
        for name in ("join_timeout_s", "heartbeat_timeout_s", "end_timeout_s"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """This process among those of the run."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int
    local_device: int | None = None  # the one device of its host that it takes; None takes all


def membership(config: DistributedConfig, environment: Mapping[str, str]) -> Membership | None:
    """Who this process is; None when a TPU's own metadata will tell.

    Raises:
      ConfigError: the launcher's variables are not there.
    """
    match config.cluster:
        case "explicit":
            assert config.num_processes is not None  # checked by the config
            assert config.process_id is not None
            return Membership(
                coordinator=config.coordinator,
                num_processes=config.num_processes,
                process_id=config.process_id,
            )
        case "slurm":
            return _of_slurm(config, _Variables(environment, "slurm", "srun"))
        case "ray":
            return _of_ray(
                config, _Variables(environment, "ray", "Ray Train's torch backend or tools.ray_pod")
            )
        case "torchrun":
            return _of_torchrun(_Variables(environment, "torchrun", "torchrun, or a launcher like it"))
        case _:
            return None


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Be one of the processes of a run inside the block; a block that ends without an error waits for the others.

    Only the main thread may enter it. When another process is lost, or is not done `end_timeout_s` after this one, this one says so and ends with code 7
    (see `leave_if_lost`).

    Raises:
      ConfigError: the launcher's variables are not there, or the processes do not come together in time.
    """
    if config.cluster == "none":
        yield
        return
    _join(config, membership(config, os.environ))
    with contextlib.ExitStack() as stack:
        stack.push(leave_if_lost)
        yield
        _end_together(config.end_timeout_s)


def leave_if_lost(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
    """End this process at once if `error` says that another one is gone; an exit function for an ExitStack.

    Push it last, so that it runs before whatever waits for all processes (closing a checkpoint, saying farewell).
    """
    if error is not None and _says_lost(error):
        sys.stdout.flush()
        line = " ".join(str(error).split())[:300]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost another one and ends; start all "
            f"processes again, they resume from the last checkpoint ({line})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_PEER_LOST)
    return False


def is_writer() -> bool:
    """This process writes the files of the run."""
    return jax.process_index() == 0


def same_everywhere(numbers: list[int]) -> list[int]:
    """The first process's list; file systems may show other processes something else."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(numbers))))
    padded = np.resize(np.asarray(numbers or [0], np.int64), count) if count else np.zeros(0, np.int64)
    return [int(n) for n in multihost_utils.broadcast_one_to_all(padded)]


def text_of_first(text: str) -> str:
    """The first process's text, of any length."""
    return bytes(same_everywhere(list(text.encode()))).decode()


def texts_of_all(text: str) -> list[str]:
    """What each process says, cut to 400 bytes, by process."""
    if jax.process_count() == 1:
        return [text]
    padded = np.zeros(400, np.uint8)
    data = text.encode()[: padded.size]
    padded[: len(data)] = list(data)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def wait_for_all(what: str) -> None:
    """Go on when every process has come here; `what` must be the same text in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _end_together(timeout_s: int) -> None:
    """Wait until every process has come to its end, saying so twice a minute; a SIGTERM meanwhile is only answered.

    jax's own farewell has the time limit by which a lost process is noticed, and whoever stays longer than that over
    the summary would take all others down with it. So would whoever leaves at a SIGTERM: the others are still saving.
    """
    if jax.process_count() == 1:
        return
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            wait_at_barrier("all processes are done", timeout_s)
        except BaseException as error:  # raised below, in the thread that owns the run
            failures.append(error)

    def answer(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nSIGTERM: this process is done and waits for the others, which may still save\n")

    began = time.monotonic()
    former = signal.signal(signal.SIGTERM, answer)
    # In a thread of its own: the main one speaks, and hears Ctrl-C.
    waiting = threading.Thread(target=wait, name="end", daemon=True)
    waiting.start()
    try:
        while waiting.is_alive():
            waiting.join(_SAY_EVERY_S)
            if waiting.is_alive():
                print(
                    f"process {jax.process_index()} of {jax.process_count()} is done and waits for the others, "
                    f"{time.monotonic() - began:.0f} s of at most distributed.end_timeout_s={timeout_s}",
                    flush=True,
                )
    finally:
        signal.signal(signal.SIGTERM, former)
    if failures:
        raise failures[0]


def _join(config: DistributedConfig, member: Membership | None) -> None:
    settings = {} if member is None else _settings(member)
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=config.join_timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s,
            shutdown_timeout_seconds=config.heartbeat_timeout_s,
        )
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        where = "a TPU's metadata" if member is None else member.coordinator
        line = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the processes of a run must meet within distributed.join_timeout_s={config.join_timeout_s}, and this one "
            f"found no meeting by way of {where}: {line}"
        ) from error


def _settings(member: Membership) -> dict[str, object]:
    return {
        "coordinator_address": member.coordinator,
        "num_processes": member.num_processes,
        "process_id": member.process_id,
        "local_device_ids": None if member.local_device is None else [member.local_device],
        "cluster_detection_method": "deactivate",
    }


# What jaxlib, Gloo and NCCL say when a process or its connection is gone.
_LOST = re.compile(
    r"connection (closed|reset|refused)|gloo|heartbeat|coordination service|peer|socket closed|broken pipe|"
    r"nccl.*(abort|remote)|task.*(died|unhealthy|disconnected)|timed out",
    re.IGNORECASE,
)


def _says_lost(error: BaseException) -> bool:
    if isinstance(error, ConfigError) or not isinstance(
        error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError)
    ):
        return False
    return jax.process_count() > 1 and bool(_LOST.search(str(error)))


class _Variables:
    """The variables of a launcher, read with a clear word when they are missing."""

    def __init__(self, environment: Mapping[str, str], cluster: str, launcher: str):
        self._environment, self._cluster, self._launcher = environment, cluster, launcher

    def text(self, *names: str) -> str:
        for name in names:
            if name in self._environment:
                return self._environment[name]
        raise ConfigError(
            f"distributed.cluster={self._cluster} reads {names[0]}, which is not set; start the processes with "
            f"{self._launcher}, or use cluster=explicit"
        )

    def number(self, *names: str) -> int:
        text = self.text(*names)
        if not text.isdigit():
            raise ConfigError(f"{names[0]} must be a number, got {text!r}")
        return int(text)

    def text_or(self, default: str, name: str) -> str:
        return self._environment.get(name, default)

    def number_or(self, default: int, *names: str) -> int:
        return self.number(*names) if any(name in self._environment for name in names) else default


def _of_slurm(config: DistributedConfig, variables: _Variables) -> Membership:
    port = config.coordinator.rpartition(":")[2] or "12321"
    host = config.coordinator.rpartition(":")[0] or first_host(
        variables.text("SLURM_STEP_NODELIST", "SLURM_NODELIST")
    )
    num_processes = variables.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    num_hosts = variables.number_or(1, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    return Membership(
        coordinator=f"{host}:{port}",
        num_processes=num_processes,
        process_id=variables.number("SLURM_PROCID"),
        # One task a host takes all of its devices; several share them out.
        local_device=variables.number("SLURM_LOCALID") if num_processes > num_hosts else None,
    )


def _of_ray(config: DistributedConfig, variables: _Variables) -> Membership:
    """What a driver passed, and for the rest the variables of Ray Train's torch backend (ray/train/torch/config.py).

    That backend shows every worker all GPUs that the workers of its node hold together; any other worker of Ray sees
    its own only, all of which it takes. A worker starts `pretrain.main` as a program, as tools.ray_pod does: signals
    reach the main thread alone, and Ray Train calls its function in another.
    """
    coordinator = config.coordinator or f"{variables.text('MASTER_ADDR')}:{variables.number('MASTER_PORT')}"
    num_local = variables.number_or(1, "LOCAL_WORLD_SIZE")
    num_visible = len(variables.text_or("", "CUDA_VISIBLE_DEVICES").replace(",", " ").split())
    shared = 1 < num_local == num_visible
    return Membership(
        coordinator=coordinator,
        num_processes=variables.number("WORLD_SIZE")
        if config.num_processes is None
        else config.num_processes,
        process_id=variables.number("RANK") if config.process_id is None else config.process_id,
        local_device=variables.number("LOCAL_RANK") if shared else None,
    )


def _of_torchrun(variables: _Variables) -> Membership:
    several = variables.number_or(1, "LOCAL_WORLD_SIZE") > 1
    return Membership(
        coordinator=f"{variables.text('MASTER_ADDR')}:{variables.text('MASTER_PORT')}",
        num_processes=variables.number("WORLD_SIZE"),
        process_id=variables.number("RANK"),
        local_device=variables.number("LOCAL_RANK") if several else None,
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[07-09,12],login` begins with gpu07."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ConfigError(f"a SLURM node list must name a host, got {nodes!r}")
    return found[1] + (found[2] or "") + (found[3] or "")
