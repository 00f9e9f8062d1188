"""Launch a job in its jail, watch its limits, kill its whole tree, and say in one word how it ended.

Deadlines and limits are held here, by the supervisor, never by the job. Output is drained up to a bound, so that a flood
cannot fill memory. Nothing is read from a job's workspace before its last process is gone.
"""

import ctypes
import dataclasses
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import ConfigError
from research_env.records import Status
from research_env.sandbox import bwrap, cgroup, seccomp, unshare
from research_env.sandbox.jail import NOBODY, Jail

TAIL_BYTES = 16_000
POLL_S = 0.25
SUSPENDED_S = 2.0  # no look for that long means that this process was suspended or starved
LEVELS = ("bwrap", "unshare", "landlock", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended and what it used."""

    status: Status
    reason: str = ""
    returncode: int = 0
    wall_s: float = 0.0
    kill_s: float = 0.0  # from the kill to the empty tree
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    num_output_bytes: int = 0
    output_tail: str = ""


class Scratch:
    """A job's folder on the host: `path/<name>` are its writable mounts, on a disk of limited size where root can make one.

    As root it is a sized tmpfs, so a full disk is the job's own problem. Without root the watcher measures it.
    """

    def __init__(self, parent: Path, name: str, disk_bytes: int):
        self.root = parent / name
        self.root.mkdir(mode=0o711)
        self.path = self.root / "disk"
        self.stage = self.root / "stage"
        self.path.mkdir(mode=0o711)
        self.stage.mkdir(mode=0o711)
        self.is_capped = os.geteuid() == 0
        self.disk_bytes = disk_bytes
        if self.is_capped:
            _mount_tmpfs(self.path, disk_bytes)

    def folder(self, name: str) -> Path:
        """A new writable folder that the job's uid owns."""
        folder = self.path / name
        folder.mkdir(mode=0o700)
        if self.is_capped:
            os.chown(folder, NOBODY, NOBODY)
        return folder

    def used_bytes(self) -> int:
        """Bytes on the scratch disk."""
        if self.is_capped:
            disk = os.statvfs(self.path)
            return (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
        return total

    def is_full(self) -> bool:
        """Whether a write would have failed for lack of space (or of file entries)."""
        if not self.is_capped:
            return self.used_bytes() >= self.disk_bytes
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize < 65_536 or disk.f_ffree == 0

    def remove(self) -> None:
        """Unmount and delete; the folder's contents are the job's, so nothing in it is followed."""
        remove_scratch(self.root)


def remove_scratch(root: Path) -> None:
    """Delete a job's folder, unmounting its disk first."""
    if os.path.ismount(root / "disk"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(str(root / "disk").encode(), 2) != 0:  # MNT_DETACH
            raise OSError(ctypes.get_errno(), f"umount {root / 'disk'}")
    for folder, names, _ in os.walk(
        root
    ):  # a folder may be unreadable, and is opened after it was listed here
        for path in (os.path.join(folder, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(root)


def _mount_tmpfs(target: Path, num_bytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={num_bytes},nr_inodes=65536,mode=711".encode()
    flags = ctypes.c_ulong(2 | 4)  # MS_NOSUID | MS_NODEV
    if libc.mount(b"autodidact", str(target).encode(), b"tmpfs", flags, options) != 0:
        raise OSError(ctypes.get_errno(), f"mount tmpfs at {target}: {os.strerror(ctypes.get_errno())}")


class Job:
    """A started job. `wait` watches it to its end; `close` kills, measures and cleans, whatever happened before."""

    def __init__(
        self,
        jail: Jail,
        argv: Sequence[str],
        hierarchies: cgroup.Hierarchies,
        *,
        scratch: Scratch | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        keep_fds: tuple[int, ...] = (),
    ):
        self._jail = jail
        self._scratch = scratch
        self._limits = jail.limits
        self._tail = bytearray()
        self._num_output_bytes = 0
        self._outcome: Outcome | None = None
        self._verdict: tuple[Status, str] | None = None
        self._group = cgroup.Group(hierarchies, jail.name, jail.limits, jail.cpus)
        self._has_memory, self._has_pids = hierarchies.has_memory, hierarchies.has_pids
        status_read, status_write = os.pipe()
        helper_fd = os.memfd_create("jail", 0)
        self._status_fd = status_read
        try:
            self._start = time.monotonic()
            argv = [jail.expand(word) for word in argv]
            join_files = self._group.join_files
            if jail.level == "bwrap":
                os.write(
                    helper_fd,
                    seccomp.filter_program(seccomp.IN_NETWORK_NAMESPACE, refuses_locks=jail.refuses_locks),
                )
                os.lseek(helper_fd, 0, os.SEEK_SET)
                command = bwrap.command(jail, argv, join_files, helper_fd, status_write)
            elif jail.level in ("unshare", "landlock"):
                command = unshare.command(jail, argv, join_files, helper_fd, status_write)
            elif jail.level == "none":
                joined = "".join(f"echo $$ > {file} && " for file in join_files)
                command = ["/bin/sh", "-c", joined + 'exec "$@"', "sh", *argv]
            else:
                raise ConfigError(f"sandbox.level must be one of {', '.join(LEVELS)}, got {jail.level!r}")
            is_plain = jail.level == "none"
            self._process = subprocess.Popen(
                command,
                env=jail.full_environment() if is_plain else {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
                cwd=jail.path(jail.cwd) if is_plain else "/",
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE if stdout != subprocess.PIPE else subprocess.STDOUT,
                pass_fds=keep_fds if is_plain else (helper_fd, status_write, *keep_fds),
                start_new_session=True,
            )
        except BaseException:
            os.close(status_read)
            self._group.remove()
            raise
        finally:
            os.close(status_write)
            os.close(helper_fd)
        stream = self._process.stderr if stdout != subprocess.PIPE else self._process.stdout
        assert stream is not None
        self._stream = stream
        os.set_blocking(stream.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        return self._process.pid

    @property
    def tail(self) -> bytes:
        """The last output that was drained."""
        return bytes(self._tail)

    def wait(self, should_stop: threading.Event | None = None) -> Outcome:
        """Watch until the job ends or meets a limit, then `close`."""
        deadline = self._start + self._limits.wall_s
        last_look = time.monotonic()
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(self._stream.fileno(), select.POLLIN)
        next_look = self._start + POLL_S
        try:
            while True:
                now = time.monotonic()
                if (
                    now - last_look > SUSPENDED_S
                ):  # this process was stopped, as its jobs then are: nobody's fault
                    deadline += now - last_look
                last_look = now
                if now >= deadline:
                    self._verdict = (Status.RUN_TIMEOUT, f"ran longer than {self._limits.wall_s:g} s")
                    break
                if should_stop is not None and should_stop.is_set():
                    self._verdict = (Status.PREEMPTED, "stopped by the supervisor")
                    break
                events = dict(poller.poll(max(1, int(min(deadline - now, POLL_S) * 1000))))
                if self._stream.fileno() in events and not self.drain():
                    poller.unregister(self._stream.fileno())
                if self._num_output_bytes > self._limits.output_bytes:
                    limit = self._limits.output_bytes
                    self._verdict = (Status.OUTPUT_LIMIT, f"wrote more than {limit} bytes of output")
                    break
                if self._pidfd in events:
                    break
                if now >= next_look:
                    next_look = now + POLL_S
                    self._verdict = self._measure()
                    if self._verdict is not None:
                        break
        finally:
            self.close()
        assert self._outcome is not None
        return self._outcome

    def drain(self) -> bool:
        """Read what is there, once; False at the end of the stream."""
        try:
            data = os.read(self._stream.fileno(), 65_536)
        except BlockingIOError:
            return True
        self._num_output_bytes += len(data)
        self._tail += data
        if len(self._tail) > 4 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        return bool(data)

    def _measure(self) -> tuple[Status, str] | None:
        """What control groups and a sized disk would hold, checked by looking, where the host lacks them."""
        if self._scratch is not None and not self._scratch.is_capped and self._scratch.is_full():
            return Status.DISK_LIMIT, f"used more than {self._limits.disk_bytes} bytes of disk"
        used = self._group.cpu_s()
        if self._limits.cpu_s is not None and used is not None and used > self._limits.cpu_s:
            return Status.RUN_TIMEOUT, f"used more than the budget of {self._limits.cpu_s:g} cpu-seconds"
        if self._has_memory and self._has_pids:
            return None
        tree = _descendants(self._process.pid)
        if not self._has_pids and len(tree) > self._limits.pids:
            return Status.PIDS_LIMIT, f"more than {self._limits.pids} processes"
        if not self._has_memory and sum(tree.values()) > self._limits.memory_bytes:
            return Status.OOM_HOST, f"used more than {self._limits.memory_bytes} bytes of memory"
        return None

    def close(self) -> Outcome:
        """Kill whatever is left, collect the numbers, remove the groups. Idempotent."""
        if self._outcome is not None:
            return self._outcome
        wall_s = time.monotonic() - self._start
        kill_start = time.monotonic()
        if not self._group.join_files:
            _kill_tree(self._process.pid)
        self._group.kill()
        kill_s = time.monotonic() - kill_start
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        before = -1  # read what the pipe still holds; a pipe's capacity bounds it, now that no writer lives
        while before != self._num_output_bytes:
            before = self._num_output_bytes
            self.drain()
        reported = _read_all(self._status_fd)
        os.close(self._status_fd)
        os.close(self._pidfd)
        self._stream.close()
        # bubblewrap does not wait for its child, so the usage of children is only right where groups count it.
        counted = self._group.cpu_s()
        cpu_s = usage.ru_utime + usage.ru_stime if counted is None else counted
        verdict, reason = self._judge(reported, cpu_s)
        # The group's peak counts files in memory, which is what the limit counts.
        peak = self._group.peak_memory_bytes() or usage.ru_maxrss * 1024
        self._group.remove()
        self._outcome = Outcome(
            status=verdict,
            reason=reason,
            returncode=self._process.returncode,
            wall_s=wall_s,
            kill_s=kill_s,
            cpu_s=cpu_s,
            peak_memory_bytes=peak,
            num_output_bytes=self._num_output_bytes,
            output_tail=self._tail[-TAIL_BYTES:].decode("utf-8", "replace"),
        )
        return self._outcome

    def _judge(self, reported: bytes, cpu_s: float) -> tuple[Status, str]:
        code = self._process.returncode
        if self._verdict is not None:
            return self._verdict
        if self._jail.level == "bwrap" and b"child-pid" not in reported:
            return Status.INFRA_ERROR, f"bubblewrap did not start the job: {self._last_line()}"
        if self._jail.level in ("unshare", "landlock") and b"started" not in reported:
            return Status.INFRA_ERROR, f"the jail did not start the job: {self._last_line()}"
        if self._group.num_oom_kills() > 0 and code != 0:
            return Status.OOM_HOST, f"used more than {self._limits.memory_bytes} bytes of memory"
        if self._limits.cpu_s is not None and cpu_s > self._limits.cpu_s:
            return Status.RUN_TIMEOUT, f"used more than the budget of {self._limits.cpu_s:g} cpu-seconds"
        if code == 0:
            return Status.OK, ""
        if code in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ) or (
            self._scratch is not None and self._scratch.is_full()
        ):
            return Status.DISK_LIMIT, f"used more than {self._limits.disk_bytes} bytes of disk"
        if self._group.num_refused_forks() > 0:
            return Status.PIDS_LIMIT, f"more than {self._limits.pids} processes"
        return Status.RUN_CRASH, f"exit code {code}"

    def _last_line(self) -> str:
        lines = self._tail[-500:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def _read_all(fd: int) -> bytes:
    """What is in a pipe now; a job that kept the other end open cannot make this wait."""
    os.set_blocking(fd, False)
    data = b""
    while True:
        try:
            more = os.read(fd, 65_536)
        except BlockingIOError:
            return data
        if not more or len(data) > 1 << 20:
            return data
        data += more


def _descendants(root: int) -> dict[int, int]:
    """Process id -> resident bytes, of everything below `root` (which keeps orphans, being their reaper)."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(name)] = int(fields[1])
        resident[int(name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    return {pid: resident[pid] for pid in tree if pid in resident}


def _kill_tree(root: int, timeout_s: float = 10.0) -> None:
    """Without control groups: kill below the reaper until nothing is left, then the reaper."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        below = [pid for pid in _descendants(root) if pid != root and not _is_zombie(pid)]
        if not below:
            break
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.001)
    try:
        os.kill(root, signal.SIGKILL)
    except ProcessLookupError:
        return


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def scratch_root() -> Path:
    """The folder under which this host's jobs live: short-lived, so on the host's temporary disk."""
    root = Path(tempfile.gettempdir()) / f"autodidact-jobs-{os.geteuid()}"
    root.mkdir(mode=0o711, exist_ok=True)
    if root.stat().st_uid != os.geteuid() or root.is_symlink():
        raise ConfigError(f"{root} belongs to another user; remove it or set TMPDIR")
    return root
