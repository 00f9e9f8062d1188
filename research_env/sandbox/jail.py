"""What a job may see and use, as a value; each level turns it into a command line.

Paths inside the jail are the same at levels `bwrap` and `unshare` (/ws, /out, ...). Levels without a mount namespace see
the host's paths, so commands reach folders through environment variables: a value "{ws}" is replaced by the path that
this level has for the mount called "ws".
"""

import dataclasses
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from research_env.records import Limits

NOBODY = 65534  # the uid and gid that jobs run as when the supervisor is root
WITH_MOUNTS = ("bwrap", "unshare")  # levels whose jobs see other files than the host has
DEVICES = ("null", "zero", "full", "random", "urandom")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/openssl.cnf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mount:
    """A host path that the job sees at `/<name>`, or at its own path when `name` is empty."""

    host: str
    name: str = ""
    writable: bool = False

    @property
    def inside(self) -> str:
        """Where it appears at levels that have a mount namespace."""
        return f"/{self.name}" if self.name else self.host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jail:
    """The whole of a job's world."""

    level: str
    name: str  # unique, so that a sweep finds what belongs to it
    stage: str  # an empty folder of the harness, used as scaffolding for mounts
    mounts: tuple[Mount, ...]
    cwd: str  # name of the mount that the job starts in
    environment: dict[str, str]
    limits: Limits
    cpus: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()  # device files of leased accelerators
    refuses_locks: bool = False  # of files, which would be a wire to whoever has the same files

    def path(self, name: str) -> str:
        """The path that the job has for the mount `name`."""
        mount = next(mount for mount in self.mounts if mount.name == name)
        return mount.inside if self.level in WITH_MOUNTS else mount.host

    def expand(self, value: str) -> str:
        """Replace {name} by the path of that mount."""
        for mount in self.mounts:
            if mount.name:
                value = value.replace("{" + mount.name + "}", self.path(mount.name))
        return value

    def full_environment(self) -> dict[str, str]:
        """The job's complete environment: nothing is inherited."""
        return {
            "HOME": "/tmp",
            "TMPDIR": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "PYTHON": sys.executable,
            **{key: self.expand(value) for key, value in self.environment.items()},
        }


def python_mounts() -> tuple[Mount, ...]:
    """The running Python's folders, as far as the system folders do not hold them already."""
    folders = {os.path.realpath(sys.base_prefix), sys.prefix, os.path.realpath(sys.prefix)}
    outside = sorted(f for f in folders if not any(f == s or f.startswith(s + "/") for s in SYSTEM))
    top = [f for f in outside if not any(f != g and f.startswith(g + "/") for g in outside)]
    return tuple(Mount(host=folder) for folder in top)


def hidden_mounts(packages: Sequence[str], empty: str) -> tuple[Mount, ...]:
    """The folder `empty` in place of these packages, in every Python that a job sees; levels without mounts cannot do it."""
    roots = {"/usr", "/usr/local", os.path.realpath(sys.base_prefix)}
    found = {
        path for root in roots for name in packages for path in glob.glob(f"{root}/lib*/python3*/{name}")
    }
    return tuple(Mount(host=empty, name=path.lstrip("/")) for path in sorted(found) if os.path.isdir(path))


def is_reachable(path: str, uid: int, gid: int) -> bool:
    """Whether a process of `uid` can walk to `path`: every folder above it must let it pass."""
    for folder in Path(os.path.realpath(path)).parents:
        status = os.stat(folder)
        bit = 0o100 if status.st_uid == uid else 0o010 if status.st_gid == gid else 0o001
        if not status.st_mode & bit:
            return False
    return True
