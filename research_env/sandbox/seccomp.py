"""A seccomp filter as bytes, written by hand so that no library is needed.

It takes away what a training program never needs and an escape often does: tracing, mounting, namespaces, kernel
rings, and every socket family but the named ones. AF_VSOCK matters: a network namespace does not cover it, so inside
a virtual machine it would reach the host.

Files that two jails share read-only (the interpreter, the artifact) are a wire between them: who opens them can be watched
(inotify), what is cached can be asked (mincore, preadv2), and a lock on a byte is seen by everyone. The first two are refused in
every jail; locks too where a model is served, because there one process must not learn what the other was asked.

The facts about BPF are those of linux/seccomp.h, linux/filter.h and linux/audit.h.
"""

import platform
import struct

from pretrain.config import ConfigError

_X86 = {
    "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "swapon": 167, "swapoff": 168,
    "reboot": 169, "sethostname": 170, "setdomainname": 171, "init_module": 175, "delete_module": 176, "quotactl": 179,
    "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "finit_module": 313,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kexec_load": 246,
    "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "acct": 163, "settimeofday": 164, "adjtimex": 159,
    "clock_settime": 227, "clock_adjtime": 305, "iopl": 172, "ioperm": 173, "personality": 135, "syslog": 103,
    "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300, "mincore": 27, "preadv2": 327, "flock": 73,
    "clone": 56, "socket": 41, "ioctl": 16, "fcntl": 72,
}  # fmt: skip
_ARM = {
    "ptrace": 117, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "swapon": 224, "swapoff": 225,
    "reboot": 142, "sethostname": 161, "setdomainname": 162, "init_module": 105, "delete_module": 106, "quotactl": 60,
    "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "finit_module": 273,
    "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kexec_load": 104,
    "kexec_file_load": 294, "bpf": 280, "userfaultfd": 282, "acct": 89, "settimeofday": 170, "adjtimex": 171,
    "clock_settime": 112, "clock_adjtime": 266, "personality": 92, "syslog": 116,
    "inotify_init1": 26, "fanotify_init": 262, "mincore": 232, "preadv2": 286, "flock": 32,
    "clone": 220, "socket": 198, "ioctl": 29, "fcntl": 25,
}  # fmt: skip
# Numbers above 424 are the same on every architecture.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
    "quotactl_fd": 443, "cachestat": 451,
}  # fmt: skip
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# F_GETLK, F_SETLK, F_SETLKW, the same on open file descriptions, F_SETLEASE, F_NOTIFY
_LOCKS = (5, 6, 7, 36, 37, 38, 1024, 1026)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
IN_NETWORK_NAMESPACE = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
WITHOUT_NETWORK_NAMESPACE = (AF_UNIX,)


def filter_program(
    families: tuple[int, ...], machine: str = platform.machine(), *, refuses_locks: bool = False
) -> bytes:
    """The BPF program that allows everything but the list above and sockets outside `families`; locks of files unless refused.

    Raises:
      ConfigError: an architecture whose system call numbers are not in the table.
    """
    if machine not in ("x86_64", "aarch64"):
        raise ConfigError(f"seccomp filters are written for x86_64 and aarch64, got {machine!r}")
    numbers, arch = (_X86, 0xC000003E) if machine == "x86_64" else (_ARM, 0xC00000B7)
    special = ("clone", "socket", "ioctl", "fcntl", "flock")
    refused = [number for name, number in {**numbers, **_COMMON}.items() if name not in special]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 interface would bypass the numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for number in refused:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # clone3 passes its flags by pointer, which a filter cannot read; the C library falls back to clone.
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    program += [
        (_EQUAL, 0, 3, numbers["clone"]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 4, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]
    program += [
        (_EQUAL, 0, 5, numbers["ioctl"]),
        (_LOAD, 0, 0, 24),
        (_EQUAL, 1, 0, _TIOCSTI),
        (_EQUAL, 0, 1, _TIOCLINUX),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    if refuses_locks:  # "not implemented", on which programs fall back to lock files
        program += [(_EQUAL, 0, 1, numbers["flock"]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
        program += [(_EQUAL, 0, len(_LOCKS) + 3, numbers["fcntl"]), (_LOAD, 0, 0, 24)]
        program += [(_EQUAL, len(_LOCKS) - i, 0, command) for i, command in enumerate(_LOCKS)]
        program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    program += [(_EQUAL, 0, 2 + len(families), numbers["socket"]), (_LOAD, 0, 0, 16)]
    program += [(_EQUAL, len(families) - i, 0, family) for i, family in enumerate(families)]
    program += [(_RETURN, 0, 0, _ERRNO | _EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
