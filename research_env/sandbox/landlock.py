"""Landlock by system call: after `restrict`, this process and its children reach the named paths and no other.

Needs no privilege. Every access right and scope that the running kernel knows is handled, so what is not allowed is
denied. See linux/landlock.h; the numbers below are its constants.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Rights of a file, as opposed to a folder.
_FILE = _EXECUTE | _WRITE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def abi() -> int:
    """The version the kernel offers; 0 when there is none."""
    try:
        return _syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def restrict(read: Sequence[str], write: Sequence[str], *, deny_tcp: bool) -> None:
    """Allow reading and executing under `read`, everything under `write`, nothing else; for good.

    Raises:
      OSError: no Landlock here, or a path is missing.
    """
    version = abi()
    if version < 1:
        raise OSError("this kernel has no Landlock")
    filesystem = (1 << 13) - 1  # version 1
    filesystem |= (1 << 13) if version >= 2 else 0  # refer: move between folders
    filesystem |= _TRUNCATE if version >= 3 else 0
    filesystem |= _IOCTL_DEVICE if version >= 5 else 0
    network = 0b11 if version >= 4 and deny_tcp else 0
    scopes = 0b11 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", filesystem, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _syscall(_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for paths, rights in ((read, _READ), (write, filesystem)):
            for path in paths:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    allowed = rights if os.path.isdir(path) else rights & _FILE
                    rule = struct.pack("=Qi", allowed & filesystem, fd)
                    _syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
                finally:
                    os.close(fd)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
            raise OSError(ctypes.get_errno(), "no_new_privs")
        _syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
