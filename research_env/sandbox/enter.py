"""Become a jailed job: namespaces and a private root, a lower uid, Landlock, seccomp, then exec.

Run by `unshare.command` in a bare interpreter, before anything of the candidate. It imports little, because its start is
paid by every run at levels `unshare` and `landlock` (the latter skips the namespaces and needs no privilege).

Three processes: the launcher waits; its child is process 1 of the new pid namespace (it reaps orphans, and with it
everything dies); the grandchild becomes the job.
"""

import _socket  # the package around it costs 8 ms and brings nothing that is needed here
import ctypes
import fcntl
import marshal
import os
import resource
import struct
from binascii import a2b_base64

from research_env.sandbox import landlock

_SIGKILL, _SIGPIPE = 9, 13
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18


def enter(orders_fd: int) -> None:
    """Become the job that the orders describe; never returns."""
    with os.fdopen(orders_fd, "rb") as file:
        orders = marshal.load(file)
    _prctl(1, _SIGKILL)  # PR_SET_PDEATHSIG: the supervisor's death is ours
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: at level landlock, orphans stay in our tree
    for name in orders["join_files"]:
        _write(name, str(os.getpid()))
    os.set_inheritable(orders["status_fd"], False)
    if orders["level"] == "unshare":
        _unshare_all(orders["nobody"])
    pid = os.fork()
    if pid == 0:
        _prctl(1, _SIGKILL)
        if orders["level"] == "unshare":
            _private_root(orders)
        _lower(orders)
        if orders["level"] == "unshare":
            job = os.fork()
            if job != 0:
                _reap(job)
        _become(orders)
    _reap(pid)


def _unshare_all(nobody: int) -> None:
    flags = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        flags |= _NEWUSER
    _check(_libc().unshare(flags), "unshare")
    if uid != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{nobody} {uid} 1")
        _write("/proc/self/gid_map", f"{nobody} {gid} 1")


def _private_root(orders: dict) -> None:
    """A new root of a few kilobytes that holds read-only binds, sized scratch space and the job's mounts."""
    root, disk = orders["stage"], orders["disk_bytes"]
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("none", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for name in ("proc", "dev", "tmp", "etc", "old"):
        os.mkdir(f"{root}/{name}")
    for folder in orders["system"]:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder):
            _bind(folder, root + folder, writable=False)
    for file in orders["system_files"]:
        if os.path.exists(file):
            _bind(file, root + file, writable=False)
    for device in orders["devices"]:
        _bind(device, root + device, writable=True, devices=True)
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
    _socket.sethostname("jail")
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(
        control.fileno(), 0x8914, struct.pack("16sH14x", b"lo", 0x49)
    )  # loopback up, as bubblewrap does
    control.close()


def _lower(orders: dict) -> None:
    """Limits and uid, for process 1 as well as for the job."""
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_FSIZE, orders["disk_bytes"]),
    ):
        resource.setrlimit(kind, (value, value))
    if os.geteuid() == 0:
        nobody = orders["nobody"]
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        _prctl(1, _SIGKILL)  # changing the uid cleared it


def _become(orders: dict) -> None:
    os.setsid()
    if orders["level"] == "unshare":
        read = [path for path in ("/usr", "/etc", "/proc", "/dev", *orders["system"]) if os.path.exists(path)]
        write = ["/tmp", "/dev/shm", *orders["devices"]]
        inside = [(path, writable) for _, path, writable in orders["mounts"]]
    else:
        read = [
            path for path in (*orders["system"], *orders["system_files"], "/proc") if os.path.exists(path)
        ]
        write = list(orders["devices"])
        inside = [(host, writable) for host, _, writable in orders["mounts"]]
    read += [path for path, writable in inside if not writable]
    write += [path for path, writable in inside if writable]
    os.chdir(orders["cwd"])
    landlock.restrict(read, write, deny_tcp=orders["level"] == "landlock")
    _load_filter(a2b_base64(orders["filter"]))
    _libc().signal(_SIGPIPE, None)  # SIG_DFL; the interpreter ignores it, and exec would keep that
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


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _load_filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    structure = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    _check(_libc().prctl(22, 2, ctypes.byref(structure), 0, 0), "seccomp")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


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
