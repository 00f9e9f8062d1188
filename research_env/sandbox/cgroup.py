"""Control groups of either version: limits, counts of what met them, and the kill that misses nobody.

A job's group is made before the job and joined by the launcher before anything of the candidate runs. Version 1
(memory, pids, cpuset) gives the limits where the host still has it; version 2 beside it gives the atomic kill. On a pure
version 2 host one group does all.
"""

import dataclasses
import os
import time
from pathlib import Path

from research_env.records import Limits

ROOT = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Hierarchies:
    """Where this process may make groups; a missing controller is absent from `v1` and from `v2_controllers`."""

    v1: dict[str, Path]
    v2: Path | None
    v2_controllers: frozenset[str]

    @property
    def has_memory(self) -> bool:
        """Whether memory can be limited."""
        return "memory" in self.v1 or "memory" in self.v2_controllers

    @property
    def has_cpu(self) -> bool:
        """Whether processor time is counted."""
        return self.v2 is not None or "cpuacct" in self.v1

    @property
    def has_pids(self) -> bool:
        """Whether the number of processes can be limited."""
        return "pids" in self.v1 or "pids" in self.v2_controllers


def find_hierarchies() -> Hierarchies:
    """Look at the mounts and try to make a group in each: a version number proves nothing."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            own[name] = path
    v1, v2, v2_controllers = {}, None, frozenset[str]()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, point, kind, options, *_ in mounts:
        if kind == "cgroup":
            for name in ("memory", "pids", "cpuset", "cpuacct"):
                if name in options.split(","):
                    folder = Path(point + own.get(name, "/"))
                    if _can_make_groups(folder):
                        v1[name] = folder
        elif kind == "cgroup2":
            folder = Path(point + own.get("", "/"))
            if _can_make_groups(folder):
                v2 = folder
                enabled = (folder / "cgroup.subtree_control").read_text().split()
                v2_controllers = frozenset(enabled) & {"memory", "pids", "cpuset"}
    return Hierarchies(v1, v2, v2_controllers)


def _can_make_groups(folder: Path) -> bool:
    probe = folder / f"autodidact-probe-{os.getpid()}-{time.monotonic_ns()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


class Group:
    """One job's groups. `join_files` are what the launcher writes its process id to."""

    def __init__(self, hierarchies: Hierarchies, name: str, limits: Limits, cpus: tuple[int, ...]):
        self._v1 = {kind: parent / name for kind, parent in hierarchies.v1.items()}
        self._v2 = None if hierarchies.v2 is None else hierarchies.v2 / name
        for folder in self._folders():
            folder.mkdir()
        memory, pids = self._folder("memory"), self._folder("pids")
        self._memory, self._pids = memory, pids
        self._memory_v1, self._pids_v1 = "memory" in self._v1, "pids" in self._v1
        cpu_list = ",".join(map(str, cpus))
        if self._memory_v1:
            _write(self._v1["memory"] / "memory.limit_in_bytes", limits.memory_bytes)
            swap = self._v1["memory"] / "memory.memsw.limit_in_bytes"
            if swap.exists():
                _write(swap, limits.memory_bytes)
        elif memory is not None:
            _write(memory / "memory.max", limits.memory_bytes)
            if (memory / "memory.swap.max").exists():
                _write(memory / "memory.swap.max", 0)
            _write(memory / "memory.oom.group", 1)
        if pids is not None:
            _write(pids / "pids.max", limits.pids)
        if "cpuset" in self._v1:
            parent = hierarchies.v1["cpuset"]
            _write(self._v1["cpuset"] / "cpuset.mems", (parent / "cpuset.mems").read_text().strip() or 0)
            _write(
                self._v1["cpuset"] / "cpuset.cpus", cpu_list or (parent / "cpuset.cpus").read_text().strip()
            )
        elif "cpuset" in hierarchies.v2_controllers and cpu_list:
            assert self._v2 is not None
            _write(self._v2 / "cpuset.cpus", cpu_list)

    def _folders(self) -> list[Path]:
        return list(dict.fromkeys([*self._v1.values(), *([self._v2] if self._v2 else [])]))

    def _folder(self, kind: str) -> Path | None:
        if kind in self._v1:
            return self._v1[kind]
        if self._v2 is not None and (self._v2 / f"{kind}.max").exists():
            return self._v2
        return None

    @property
    def join_files(self) -> list[str]:
        """Files that move the process whose id is written to them into this job's groups."""
        return [str(folder / "cgroup.procs") for folder in self._folders()]

    def num_oom_kills(self) -> int:
        """Processes that the kernel killed for memory."""
        if self._memory is None:
            return 0
        name = "memory.oom_control" if self._memory_v1 else "memory.events"
        return _count(self._memory / name, "oom_kill")

    def num_refused_forks(self) -> int:
        """Forks that the process limit refused."""
        return 0 if self._pids is None else _count(self._pids / "pids.events", "max")

    def peak_memory_bytes(self) -> int:
        """High-water mark of charged memory, files in memory included."""
        if self._memory is None:
            return 0
        file = self._memory / ("memory.max_usage_in_bytes" if self._memory_v1 else "memory.peak")
        return int(file.read_text()) if file.exists() else 0

    def cpu_s(self) -> float | None:
        """Processor seconds of all processes so far, the ended ones included; None where nothing counts them."""
        if self._v2 is not None and (self._v2 / "cpu.stat").exists():
            return _count(self._v2 / "cpu.stat", "usage_usec") / 1e6
        if "cpuacct" in self._v1:
            return int((self._v1["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
        return None

    def processes(self) -> set[int]:
        """Process ids of everything still in the job."""
        found: set[int] = set()
        for folder in self._folders():
            try:
                found.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
            except FileNotFoundError:
                continue
        return found

    def kill(self, timeout_s: float = 10.0) -> float:
        """Kill everything in the group; returns seconds until it was empty.

        Raises:
          TimeoutError: something did not die (a process in uninterruptible sleep).
        """
        start = time.monotonic()
        while True:
            if self._v2 is not None and (self._v2 / "cgroup.kill").exists():
                _write(self._v2 / "cgroup.kill", 1)
            else:
                for pid in self.processes():
                    try:
                        os.kill(pid, 9)
                    except ProcessLookupError:
                        continue
            if not (left := self.processes()):
                return time.monotonic() - start
            if time.monotonic() - start > timeout_s:
                raise TimeoutError(f"processes {sorted(left)} did not die within {timeout_s} s")
            time.sleep(0.001)

    def remove(self, timeout_s: float = 5.0) -> None:
        """Remove the groups. Busy for a moment after the last process ended, so this retries.

        Raises:
          OSError: still busy after the timeout.
        """
        end = time.monotonic() + timeout_s
        for folder in self._folders():
            while True:
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.002)


def sweep(hierarchies: Hierarchies, prefix: str) -> int:
    """Kill and remove groups whose name starts with `prefix`: what a killed supervisor left. Returns how many."""
    folders = [parent for parent in (*hierarchies.v1.values(), hierarchies.v2) if parent is not None]
    names = {child.name for parent in folders for child in parent.iterdir() if child.name.startswith(prefix)}
    for name in names:
        group = object.__new__(Group)
        group._v1 = {
            kind: parent / name for kind, parent in hierarchies.v1.items() if (parent / name).is_dir()
        }
        v2 = hierarchies.v2
        group._v2 = v2 / name if v2 is not None and (v2 / name).is_dir() else None
        group.kill()
        group.remove()
    return len(names)


def _write(file: Path, value: int | str) -> None:
    file.write_text(str(value))


def _count(file: Path, key: str) -> int:
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == key:
            return int(words[1])
    return 0
