"""Pick the level of isolation, and prove it: a level counts only when the attempted attacks fail on this host."""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, local
from research_env.records import Limits, Status
from research_env.sandbox import bwrap, cgroup
from research_env.sandbox.jail import Jail, Mount, python_mounts
from research_env.sandbox.run import LEVELS, Job, Outcome, Scratch, scratch_root


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Which level candidates run at. `auto` takes the highest that passes; `require` is a floor and fails closed."""

    level: str = local("auto")
    require: str = "landlock"

    def __post_init__(self) -> None:
        if self.level not in ("auto", *LEVELS):
            raise ConfigError(f"sandbox.level must be auto or one of {', '.join(LEVELS)}, got {self.level!r}")
        if self.require not in LEVELS:
            raise ConfigError(f"sandbox.require must be one of {', '.join(LEVELS)}, got {self.require!r}")


@dataclasses.dataclass(frozen=True)
class Check:
    """One attempted act and what came of it."""

    name: str
    is_held: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Isolation:
    """A level that was tried on this host, with what it holds and what it lacks."""

    level: str
    checks: tuple[Check, ...]
    hierarchies: cgroup.Hierarchies

    @property
    def is_held(self) -> bool:
        """Whether every attack failed."""
        return all(check.is_held for check in self.checks)

    @property
    def label(self) -> str:
        """What results carry: the level, and what this host could not give it."""
        lacks = [
            name
            for name, has in (("memory", self.hierarchies.has_memory), ("pids", self.hierarchies.has_pids))
            if not has
        ]
        return self.level + (f" (polled: {', '.join(lacks)})" if lacks else "")


def choose_level(config: SandboxConfig) -> Isolation:
    """The level to use, proven by a probe.

    Raises:
      ConfigError: no level at or above the floor passes; says what each one failed.
    """
    floor = LEVELS.index(config.require)
    wanted = LEVELS[:-1] if config.level == "auto" else (config.level,)
    faults = []
    for level in wanted:
        if LEVELS.index(level) > floor:
            faults.append(f"{level}: below sandbox.require={config.require}")
            continue
        if level == "none":
            return Isolation("none", (), cgroup.find_hierarchies())
        isolation = probe(level)
        if isolation.is_held:
            return isolation
        failed = [f"{check.name} ({check.detail})" for check in isolation.checks if not check.is_held]
        faults.append(f"{level}: {', '.join(failed)}")
    raise ConfigError(
        "no sandbox level at or above sandbox.require passes its self-test on this host: " + "; ".join(faults)
        + "; install bubblewrap (make sandbox), or ask for less by sandbox.require"
    )  # fmt: skip


def probe(level: str) -> Isolation:
    """Attempt every forbidden act at this level. About 0.2 s.

    A level that cannot start is reported by one failed check called "starts".
    """
    hierarchies = cgroup.find_hierarchies()
    if level == "bwrap" and bwrap.find() is None:
        return Isolation(level, (Check("starts", False, "bubblewrap is not installed"),), hierarchies)
    with _bait() as orders:
        name = f"autodidact-probe-{os.getpid()}-{time.monotonic_ns()}"
        scratch = Scratch(scratch_root(), name, 64 << 20)
        try:
            jail = Jail(
                level=level,
                name=name,
                stage=str(scratch.stage),
                mounts=(
                    *python_mounts(),
                    Mount(host=str(scratch.folder("ws")), name="ws", writable=True),
                    Mount(host=str(Path(__file__).parent / "attack.py"), name="attack.py"),
                ),
                cwd="ws",
                environment={},
                limits=Limits(wall_s=20, memory_bytes=512 << 20, disk_bytes=64 << 20),
            )
            argv = [sys.executable, "-I", "{attack.py}", json.dumps(orders.values)]
            job = Job(jail, argv, hierarchies, scratch=scratch)
            outcome = job.wait()
            checks = _read_report(outcome, orders)
        finally:
            scratch.remove()
    return Isolation(level, tuple(checks), hierarchies)


def start_job(
    level: str, argv: Sequence[str], hierarchies: cgroup.Hierarchies, limits: Limits | None = None
) -> tuple[Job, Scratch]:
    """A job with an empty workspace, for measurements; the caller waits for it and removes the scratch."""
    limits = limits or Limits(wall_s=20, memory_bytes=512 << 20, disk_bytes=16 << 20)
    name = f"autodidact-probe-{os.getpid()}-{time.monotonic_ns()}"
    scratch = Scratch(scratch_root(), name, limits.disk_bytes)
    jail = Jail(
        level=level,
        name=name,
        stage=str(scratch.stage),
        mounts=(*python_mounts(), Mount(host=str(scratch.folder("ws")), name="ws", writable=True)),
        cwd="ws",
        environment={},
        limits=limits,
    )
    try:
        return Job(jail, argv, hierarchies, scratch=scratch), scratch
    except BaseException:
        scratch.remove()
        raise


def measure_launch_s(level: str, num_runs: int = 30) -> list[float]:
    """Seconds from nothing to nothing of an empty job, cleaning included, for each of `num_runs`."""
    hierarchies = cgroup.find_hierarchies()
    seconds = []
    for _ in range(num_runs):
        start = time.monotonic()
        job, scratch = start_job(level, ["/bin/true"], hierarchies)
        outcome = job.wait()
        scratch.remove()
        seconds.append(time.monotonic() - start)
        assert outcome.status is Status.OK, outcome.reason
    return seconds


def measure_kill_s(level: str, num_processes: int = 50) -> float:
    """Seconds from the kill to the empty tree, for a job of that many processes in sessions of their own."""
    code = f"""
import os, sys, time
for _ in range({num_processes - 1}):
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""
    job, scratch = start_job(level, [sys.executable, "-I", "-S", "-c", code], cgroup.find_hierarchies())
    try:
        while b"ready" not in job.tail:
            job.drain()
            time.sleep(0.01)
        return job.close().kill_s
    finally:
        job.close()
        scratch.remove()


def _read_report(outcome: Outcome, orders: "_Bait") -> list[Check]:
    lines = [line for line in outcome.output_tail.splitlines() if line.startswith("ATTACK ")]
    if outcome.status is not Status.OK or not lines:
        return [Check("starts", False, outcome.reason or outcome.output_tail[-200:].strip() or "no report")]
    checks = [Check("starts", True, f"{outcome.wall_s * 1000:.0f} ms")]
    for act, found in json.loads(lines[-1].removeprefix("ATTACK ")).items():
        checks.append(Check(act, found.startswith("denied"), found))
    arrived = orders.datagrams()
    checks.append(
        Check(
            "udp_arrived",
            not arrived,
            f"{arrived} datagrams reached the host" if arrived else "denied: none came",
        )
    )
    checks.append(Check("whole_tree_killed", outcome.kill_s < 5.0, f"{outcome.kill_s * 1000:.1f} ms"))
    return checks


@dataclasses.dataclass
class _Bait:
    """What the host puts out for the attack to find."""

    values: dict[str, Any]
    udp: socket.socket

    def datagrams(self) -> int:
        """How many came."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.udp.recv(100, socket.MSG_DONTWAIT)
                count += 1
        return count


@contextlib.contextmanager
def _bait() -> Iterator[_Bait]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autodidact-bait-")))
        folder.chmod(0o777)
        secret = folder / "secret.txt"
        secret.write_text("the secret")
        secret.chmod(0o644)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        address = f"autodidact-{os.getpid()}-{time.monotonic_ns()}"
        abstract.bind("\0" + address)
        abstract.listen()
        os.environ["AUTODIDACT_CANARY"] = "a secret of the harness"
        stack.callback(os.environ.pop, "AUTODIDACT_CANARY")
        yield _Bait(
            {
                "outside": str(folder),
                "secret": str(secret),
                "host_pid": os.getpid(),
                "pid_namespace": os.readlink("/proc/self/ns/pid"),
                "marker": Path(sys.argv[0] or "python").name,
                "tcp_port": tcp.getsockname()[1],
                "udp_port": udp.getsockname()[1],
                "abstract": address,
                "is_root": os.geteuid() == 0,
            },
            udp,
        )
