"""Acts that must be impossible in a jail, attempted from inside it. Runs alone: `python -I attack.py orders.json`.

Prints one JSON object {act: "denied" | "done" | detail}. An act that the kernel does not offer at all counts as denied.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time


def main() -> None:
    """Attempt everything and report."""
    orders = json.loads(sys.argv[1])
    report = {}
    for name, act in ACTS.items():
        try:
            found = act(orders)
        except OSError as error:
            report[name] = f"denied: {errno.errorcode.get(error.errno or 0, error)}"
        else:
            report[name] = f"done: {found}" if found else "denied: nothing found"
    print("ATTACK " + json.dumps(report))


def write_outside(orders: dict) -> str:
    """Create a file where only the host may."""
    done = []
    for folder in (
        orders["outside"],
        "/",
        "/usr",
        "/etc",
        "/dev",
        "/proc/sys/kernel",
        "/sys",
        "/root",
        "/home",
    ):
        path = f"{folder}/autodidact-escape"
        try:
            with open(path, "w") as file:
                file.write("x")
            done.append(path)
        except OSError:
            continue
    return " ".join(done)


def read_secret(orders: dict) -> str:
    """Read a file of the host."""
    with open(orders["secret"]) as file:
        return file.read()


def read_environment(orders: dict) -> str:
    """See a variable of the harness, in this process or any visible one."""
    found = [os.environ["AUTODIDACT_CANARY"]] if "AUTODIDACT_CANARY" in os.environ else []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if b"AUTODIDACT_CANARY" in file.read():
                        found.append(f"process {name}")
            except OSError:
                continue
    return " ".join(found)


def inherit_descriptors(orders: dict) -> str:
    """Find an open descriptor beyond the standard three."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if int(name) > 2 and not target.startswith("/proc/"):
            found.append(f"{name}={target}")
    return " ".join(found)


def see_host_process(orders: dict) -> str:
    """Signal or inspect the supervisor."""
    with open(f"/proc/{orders['host_pid']}/cmdline", "rb") as file:
        return str(orders["marker"].encode() in file.read() or "")


def signal_host(orders: dict) -> str:
    """Send a signal to a process outside."""
    os.kill(orders["host_pid"], 0)
    return "" if _is_own_pid_namespace(orders) else "signal sent"


def _is_own_pid_namespace(orders: dict) -> bool:
    return os.readlink("/proc/self/ns/pid") != orders["pid_namespace"]


def connect_tcp(orders: dict) -> str:
    """Reach a listener of the host."""
    with socket.create_connection(("127.0.0.1", orders["tcp_port"]), timeout=1):
        return "connected"


def send_udp(orders: dict) -> str:
    """Send a datagram to the host; the host looks whether it came."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for address in ("127.0.0.1", "8.8.8.8"):
            try:
                sender.sendto(b"escape", (address, orders["udp_port"]))
            except OSError:
                continue
    return ""


def open_vsock(orders: dict) -> str:
    """Open the socket family that leads from a virtual machine to its host."""
    with socket.socket(40, socket.SOCK_STREAM):
        return "opened"


def connect_abstract(orders: dict) -> str:
    """Reach a host's abstract Unix socket, which no file permission guards."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect("\0" + orders["abstract"])
        return "connected"


def _call(name: str, *arguments: object) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)
    return name


def mount_tmpfs(orders: dict) -> str:
    """Mount something."""
    return _call("mount", b"none", b"/tmp", b"tmpfs", 0, None)


def nest_user_namespace(orders: dict) -> str:
    """Gain a fresh set of capabilities in a new user namespace."""
    return _call("unshare", 0x10000000)


def clone_user_namespace(orders: dict) -> str:
    """The same by clone, which a filter on unshare misses."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = 56 if os.uname().machine == "x86_64" else 220
    pid = libc.syscall(number, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    os.waitpid(pid, 0)
    return "cloned"


def trace_parent(orders: dict) -> str:
    """Attach to process 1 of the jail, or to the parent."""
    done = []
    for pid in {1, os.getppid()}:
        try:
            done.append(_call("ptrace", 16, pid, None, None) + str(pid))
        except OSError:
            continue
    return " ".join(done)


def become_root(orders: dict) -> str:
    """Get uid 0."""
    os.setuid(0)
    return "uid 0 " + open("/proc/self/uid_map").read() if orders["is_root"] else ""


def gain_capability(orders: dict) -> str:
    """Hold any capability."""
    with open("/proc/self/status") as file:
        sets = [line.split()[1] for line in file if line.startswith(("CapEff", "CapPrm", "CapAmb"))]
    return " ".join(sets) if any(int(value, 16) for value in sets) else ""


def use_io_uring(orders: dict) -> str:
    """Open a ring, through which system calls pass unfiltered."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(120)
    fd = libc.syscall(425, 4, buffer)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    return "opened"


def read_kernel_log(orders: dict) -> str:
    """Read the kernel's messages."""
    with open("/dev/kmsg", "rb") as file:
        return str(len(file.read(10)))


def open_block_device(orders: dict) -> str:
    """Open a disk or the memory of the machine."""
    found = [
        name
        for name in ("/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/mem", "/dev/fuse")
        if os.path.exists(name)
    ]
    return " ".join(name for name in found if os.access(name, os.R_OK))


def write_cgroup(orders: dict) -> str:
    """Lift the limits by writing to the control groups."""
    found = []
    for folder, _, names in os.walk("/sys/fs/cgroup"):
        found += [f"{folder}/{name}" for name in names if os.access(f"{folder}/{name}", os.W_OK)][:1]
        if found:
            break
    return " ".join(found)


def outlive(orders: dict) -> str:
    """Leave a daemon behind that touches a file of the workspace; the harness looks for it afterwards."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3):
                os.close(fd)
            while True:
                time.sleep(0.05)
        os._exit(0)
    return ""


ACTS = {
    act.__name__: act
    for act in (
        write_outside, read_secret, read_environment, inherit_descriptors, see_host_process, signal_host, connect_tcp, send_udp,
        open_vsock, connect_abstract, mount_tmpfs, nest_user_namespace, clone_user_namespace, trace_parent, become_root,
        gain_capability, use_io_uring, read_kernel_log, open_block_device, write_cgroup, outlive,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
