"""Levels `unshare` and `landlock`: a jail made by system calls alone, no program needed.

`python -I -S unshare.py` (see `command`) reads its orders from a descriptor, makes namespaces and a private root, drops
the uid, loads Landlock and seccomp, and becomes the job. Level `landlock` skips the namespaces and needs no privilege.

Three processes: the launcher waits; its child is process 1 of the new pid namespace (it reaps orphans, and with it
everything dies); the grandchild becomes the job.
"""

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from research_env.sandbox import landlock, seccomp
from research_env.sandbox.jail import NOBODY, SYSTEM, SYSTEM_FILES, Jail

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DEVICES = ("null", "zero", "full", "random", "urandom")


def command(
    jail: Jail, argv: Sequence[str], join_files: Sequence[str], orders_fd: int, status_fd: int
) -> list[str]:
    """The launcher's command line; writes the orders to `orders_fd`, which the caller passes on."""
    orders = {
        "level": jail.level,
        "join_files": list(join_files),
        "stage": jail.stage,
        "mounts": [[mount.host, mount.inside, mount.writable] for mount in jail.mounts],
        "cwd": jail.path(jail.cwd),
        "environment": jail.full_environment(),
        "disk_bytes": jail.limits.disk_bytes,
        "memory_bytes": jail.limits.memory_bytes,
        "argv": list(argv),
        "status_fd": status_fd,
    }
    os.write(orders_fd, json.dumps(orders).encode())
    os.lseek(orders_fd, 0, os.SEEK_SET)
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from research_env.sandbox import unshare; unshare.enter({orders_fd})"
    return [sys.executable, "-I", "-S", "-c", code]


def enter(orders_fd: int) -> None:
    """Become the job that the orders describe; never returns."""
    with os.fdopen(orders_fd) as file:
        orders = json.load(file)
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the supervisor's death is ours
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: at level landlock, orphans stay in our tree
    for name in orders["join_files"]:
        Path(name).write_text(str(os.getpid()))
    os.set_inheritable(orders["status_fd"], False)
    if orders["level"] == "unshare":
        _unshare_all()
    pid = os.fork()
    if pid == 0:
        _prctl(1, signal.SIGKILL)
        if orders["level"] == "unshare":
            _private_root(orders)
        _lower(orders)
        if orders["level"] == "unshare":
            job = os.fork()
            if job != 0:
                _reap(job)
        _become(orders)
    _reap(pid)


def _unshare_all() -> None:
    flags = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        flags |= _NEWUSER
    _check(_libc().unshare(flags), "unshare")
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")


def _private_root(orders: dict) -> None:
    """A new root of a few kilobytes that holds read-only binds, sized scratch space and the job's mounts."""
    root, disk = orders["stage"], orders["disk_bytes"]
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("none", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for name in ("proc", "dev", "tmp", "etc", "old"):
        os.mkdir(f"{root}/{name}")
    for folder in SYSTEM:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder):
            _bind(folder, root + folder, writable=False)
    for file in SYSTEM_FILES:
        if os.path.exists(file):
            _bind(file, root + file, writable=False)
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}", writable=True, devices=True)
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    os.mkdir(f"{root}/dev/shm")
    for name in ("tmp", "dev/shm"):
        _mount("none", f"{root}/{name}", "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={disk}")
    for host, inside, writable in orders["mounts"]:
        _bind(host, root + inside, writable=writable)
    _mount("none", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.chdir(root)
    _check(_libc().pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc().umount2(b"/old", 2), "umount the old root")  # MNT_DETACH
    os.rmdir("/old")
    _mount("none", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    socket.sethostname("jail")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # loopback up, as bubblewrap does
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 0x49))


def _lower(orders: dict) -> None:
    """Limits and uid, for process 1 as well as for the job."""
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_FSIZE, orders["disk_bytes"]),
    ):
        resource.setrlimit(kind, (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _prctl(1, signal.SIGKILL)  # changing the uid cleared it


def _become(orders: dict) -> None:
    os.setsid()
    if orders["level"] == "unshare":
        read = [path for path in ("/usr", "/etc", "/proc", "/dev", *SYSTEM) if os.path.exists(path)]
        write = ["/tmp", "/dev/shm", *(f"/dev/{name}" for name in _DEVICES)]
        inside = [(path, writable) for _, path, writable in orders["mounts"]]
    else:
        read = [path for path in (*SYSTEM, *SYSTEM_FILES, "/proc") if os.path.exists(path)]
        write = [f"/dev/{name}" for name in _DEVICES]
        inside = [(host, writable) for host, _, writable in orders["mounts"]]
    read += [path for path, writable in inside if not writable]
    write += [path for path, writable in inside if writable]
    os.chdir(orders["cwd"])
    if orders["level"] == "unshare":
        families = seccomp.IN_NETWORK_NAMESPACE
    else:
        families = seccomp.WITHOUT_NETWORK_NAMESPACE
    landlock.restrict(read, write, deny_tcp=orders["level"] == "landlock")
    seccomp.install(seccomp.filter_program(families))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.write(orders["status_fd"], b"started")
    os.execve(orders["argv"][0], orders["argv"], orders["environment"])


def _reap(pid: int) -> None:
    """Wait for `pid` and for every orphan, then end the way it ended."""
    while True:
        done, status = os.wait()
        if done == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _bind(source: str, target: str, *, writable: bool, devices: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, "", _BIND | _REC)
    # A remount may not drop flags that the source's mount has, so they are added to ours.
    kept = os.statvfs(target).f_flag & (_NOSUID | _NODEV | _NOEXEC)
    flags = _REMOUNT | _BIND | _NOSUID | kept | (0 if devices else _NODEV) | (0 if writable else _RDONLY)
    _mount("none", target, "", flags)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc().mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _check(result, f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
