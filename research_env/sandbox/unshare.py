"""Levels `unshare` and `landlock`: a jail made by system calls alone, no program needed.

This is the supervisor's half: it writes the orders. `enter.py`, run by a bare interpreter, carries them out.
"""

import base64
import marshal
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from research_env.sandbox import seccomp
from research_env.sandbox.jail import DEVICES, NOBODY, SYSTEM, SYSTEM_FILES, Jail


def command(
    jail: Jail, argv: Sequence[str], join_files: Sequence[str], orders_fd: int, status_fd: int
) -> list[str]:
    """The launcher's command line; writes the orders to `orders_fd`, which the caller passes on."""
    has_network_namespace = jail.level == "unshare"
    families = seccomp.IN_NETWORK_NAMESPACE if has_network_namespace else seccomp.WITHOUT_NETWORK_NAMESPACE
    orders = {
        "level": jail.level,
        "join_files": list(join_files),
        "stage": jail.stage,
        "mounts": [[mount.host, mount.inside, mount.writable] for mount in jail.mounts],
        "devices": ["/dev/" + name for name in DEVICES] + list(jail.devices),
        "cwd": jail.path(jail.cwd),
        "environment": jail.full_environment(),
        "disk_bytes": jail.limits.disk_bytes,
        "memory_bytes": jail.limits.memory_bytes,
        "argv": list(argv),
        "status_fd": status_fd,
        "nobody": NOBODY,
        "system": SYSTEM,
        "system_files": SYSTEM_FILES,
        "filter": base64.b64encode(
            seccomp.filter_program(families, refuses_locks=jail.refuses_locks)
        ).decode(),
    }
    os.write(orders_fd, marshal.dumps(orders))
    os.lseek(orders_fd, 0, os.SEEK_SET)
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from research_env.sandbox import enter; enter.enter({orders_fd})"
    return [sys.executable, "-I", "-S", "-c", code]
