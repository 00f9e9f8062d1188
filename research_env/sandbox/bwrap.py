"""Level `bwrap`: bubblewrap with every namespace, a capped scratch disk, no capabilities and the seccomp filter.

Facts behind the options (bubblewrap 0.8): with --cap-drop ALL alone nested user namespaces are still allowed, hence
--disable-userns; `/`, `/dev` and `/dev/shm` are writable tmpfs of half the memory unless sized and remounted; the
environment and descriptors of the launcher leak unless cleared before.
"""

import os
import shlex
import shutil
from collections.abc import Sequence

from research_env.sandbox.jail import NOBODY, SYSTEM, SYSTEM_FILES, Jail, is_reachable


def find() -> str | None:
    """The path of the program, or None."""
    return shutil.which("bwrap", path="/usr/bin:/bin:/usr/local/bin")


def command(
    jail: Jail, argv: Sequence[str], join_files: Sequence[str], seccomp_fd: int, status_fd: int
) -> list[str]:
    """The launcher's command line: join the groups, lower limits and uid, then bubblewrap."""
    program = find()
    assert program is not None, "the ladder picked bwrap, so it was there"
    as_root = os.geteuid() == 0
    bound = [(mount.host, mount.inside, mount.writable) for mount in jail.mounts]
    script = [f"echo $$ > {shlex.quote(file)}" for file in join_files]
    # dash counts files in blocks of 512 bytes
    script.append(f"ulimit -c 0 && ulimit -n 1024 && ulimit -f {jail.limits.disk_bytes // 512 + 1}")
    staged = [] if not as_root else [host for host, _, _ in bound if not is_reachable(host, NOBODY, NOBODY)]
    if staged:
        # As uid 65534 bubblewrap could not walk to these (say, under /root), so root binds them inside a mount
        # namespace of this job alone; they vanish with it.
        script.append(f"mount -t tmpfs -o mode=755,size=64k none {shlex.quote(jail.stage)}")
        for index, host in enumerate(staged):
            target = shlex.quote(f"{jail.stage}/{index}")
            script.append(f"mkdir {target} && mount --bind {shlex.quote(host)} {target}")
    renamed = {host: f"{jail.stage}/{index}" for index, host in enumerate(staged)}
    options = [
        *(
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
        ),
        *("--hostname", "jail", "--proc", "/proc", "--dev", "/dev"),
        *("--size", str(jail.limits.disk_bytes), "--perms", "1777", "--tmpfs", "/tmp"),
        *("--size", str(jail.limits.disk_bytes), "--perms", "1777", "--tmpfs", "/dev/shm"),
    ]
    for folder in SYSTEM:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for file in SYSTEM_FILES:
        options += ["--ro-bind-try", file, file]
    for host, inside, writable in bound:
        options += ["--bind" if writable else "--ro-bind", renamed.get(host, host), inside]
    for device in jail.devices:
        options += ["--dev-bind", device, device]
    for key, value in jail.full_environment().items():
        options += ["--setenv", key, value]
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--cap-drop", "ALL"]
    options += [
        "--seccomp",
        str(seccomp_fd),
        "--json-status-fd",
        str(status_fd),
        "--chdir",
        jail.path(jail.cwd),
    ]
    lower = ["setpriv", "--pdeathsig", "KILL"]
    if as_root:
        lower += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    script.append("exec " + shlex.join([*lower, program, *options, "--", *argv]))
    shell = ["/bin/sh", "-c", " && ".join(script)]
    return ["/usr/bin/unshare", "-m", "--propagation", "private", *shell] if staged else shell
