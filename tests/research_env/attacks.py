"""Attacks as data: pieces of Python that set `won` to evidence when they succeed; an exception or nothing means it was held.

They run inside one jail, each in a process of its own. `orders` holds what the host put out: paths, ports, process ids.
"""

import json
import sys

SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    done = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done
"""
# Numbers of x86_64; the arguments are what a successful escape would pass.
_SYSCALLS = {
    "mount tmpfs": "165, b'none', b'/tmp', b'tmpfs', 0, 0",
    "mount proc": "165, b'proc', b'/tmp', b'proc', 0, 0",
    "bind mount": "165, b'/', b'/tmp', b'', 4096, 0",
    "remount root": "165, b'none', b'/', b'', 32 | 4096, 0",
    "unmount proc": "166, b'/proc', 2",
    "pivot root": "155, b'/tmp', b'/tmp'",
    "change root": "161, b'/tmp'",
    "swap on": "167, b'/tmp/x', 0",
    "reboot": "169, 0xfee1dead, 672274793, 0x1234567, 0",
    "set host name": "170, b'owned', 5",
    "load module": "175, b'x', 1, b''",
    "load module by file": "313, 0, b'', 0",
    "load kernel": "246, 0, 0, 0, 0",
    "load kernel by file": "320, 0, 0, 0, b'', 0",
    "user namespace": "272, 0x10000000",
    "mount namespace": "272, 0x20000",
    "network namespace": "272, 0x40000000",
    "process namespace": "272, 0x20000000",
    "time namespace": "272, 0x80",
    "control group namespace": "272, 0x2000000",
    "clone with user namespace": "56, 0x10000000 | 17, 0, 0, 0, 0",
    "clone with mount namespace": "56, 0x20000 | 17, 0, 0, 0, 0",
    "clone3": "435, ctypes.create_string_buffer((0x10000000).to_bytes(8, 'little') + bytes(80)), 88",
    "enter namespace": "308, os.open('/proc/self/ns/net', 0), 0",
    "trace parent": "101, 16, os.getppid(), 0, 0",
    "trace process one": "101, 16, 1, 0, 0",
    "trace me": "101, 0, 0, 0, 0",
    "read foreign memory": "310, 1, 0, 0, 0, 0, 0",
    "write foreign memory": "311, 1, 0, 0, 0, 0, 0",
    "take a foreign descriptor": "438, call(434, os.getppid(), 0), 0, 0",
    "bpf": "321, 0, ctypes.create_string_buffer(120), 120",
    "performance counters": "298, ctypes.create_string_buffer(b'\\0' * 4 + b'\\x70' + b'\\0' * 120), 0, -1, -1, 0",
    "user fault handler": "323, 0",
    "io ring": "425, 4, ctypes.create_string_buffer(120)",
    "key ring": "250, 0, -3, 0",
    "add key": "248, b'user', b'x', b'y', 1, -3",
    "request key": "249, b'user', b'x', 0, -3",
    "set clock": "227, 0, ctypes.create_string_buffer(16)",
    "set time of day": "164, ctypes.create_string_buffer(16), 0",
    "tune clock": "159, ctypes.create_string_buffer(b'\\1' + bytes(300))",
    "port permissions": "173, 0, 1, 1",
    "port level": "172, 3",
    "kernel log": "103, 3, ctypes.create_string_buffer(100), 100",
    "accounting": "163, b'/tmp/x'",
    "quota": "179, 0x800007, 0, 0, 0",
    "personality without randomness": "135, 0x0040000",
    "open by handle": "304, -100, ctypes.create_string_buffer(b'\\x08\\0\\0\\0\\1\\0\\0\\0' + bytes(16)), 0",
    "watch files": "253,",
    "watch files too": "294, 0",
    "watch the disk": "300, 0x200, 0",
    "what is cached": "27, call(9, 0, 4096, 1, 2, os.open('/usr/bin/env', 0), 0), 4096, ctypes.create_string_buffer(1)",
    "what is cached of a file": "451, os.open('/usr/bin/env', 0), ctypes.create_string_buffer(16), ctypes.create_string_buffer(48), 0",
    "read what is cached": "327, os.open('/usr/bin/env', 0), ctypes.create_string_buffer(16), 0, 0, 0, 8",
    "new mount call": "430, b'tmpfs', 0",
    "open tree": "428, -100, b'/', 1",
    "move mount": "429, -100, b'/', -100, b'/tmp', 0",
    "mount attributes": "442, -100, b'/', 0, ctypes.create_string_buffer(32), 32",
    "foreign architecture": "0x40000000 + 39",
}  # fmt: skip

_READS = {
    "shadow file": "/etc/shadow", "root's history": "/root/.bash_history", "root's ssh": "/root/.ssh/id_rsa",
    "git credentials": "/root/.git-credentials", "cloud credentials": "/root/.aws/credentials", "machine id": "/etc/machine-id",
    "kernel memory": "/proc/kcore", "physical memory": "/dev/mem", "kernel messages": "/dev/kmsg", "disk": "/dev/vda",
    "second disk": "/dev/sda", "host root by process one": "/proc/1/root/etc/shadow", "memory of process one": "/proc/1/mem",
    "secret beside the job": "{secret}", "the harness's source": "{source}", "the campaign's ledger": "{ledger}",
    "the judge's data": "/locked/validation.bin", "the evaluator": "/locked/evaluate.py", "the judge": "/judge/judge.py",
    "docker socket": "/var/run/docker.sock", "tun device": "/dev/net/tun", "fuse device": "/dev/fuse", "kvm": "/dev/kvm",
    "another job's folder": "{job}",
}  # fmt: skip

_WRITES = {
    "system program": "/usr/bin/python", "password file": "/etc/passwd", "preload": "/etc/ld.so.preload", "cron": "/etc/cron.d/x",
    "root's shell": "/root/.bashrc", "home": "/home/x", "var": "/var/tmp/x", "root folder": "/x", "dev": "/dev/x",
    "core pattern": "/proc/sys/kernel/core_pattern", "system request": "/proc/sysrq-trigger", "user helper": "/proc/sys/kernel/modprobe",
    "uevent helper": "/sys/kernel/uevent_helper", "own control group": "/sys/fs/cgroup/cgroup.procs",
    "release agent": "/sys/fs/cgroup/memory/release_agent", "interpreter": "{python}", "library": "{library}",
    "bait folder": "{outside}/x", "read-only mount": "/data/x", "uid map": "/proc/self/uid_map", "memory of parent": "/proc/{parent}/mem",
}  # fmt: skip

_OTHER = {
    "less likely to be killed": "import os; won = os.write(os.open('/proc/self/oom_score_adj', 1), b'-1000')",
    "hard link to a program": "import os; os.link('/usr/bin/env', '/ws/env'); won = True",
    "link and write through": "import os; os.symlink(orders['outside'], '/ws/l'); open('/ws/l/x', 'w'); won = True",
    "move a system file": "import os; os.rename('/usr/bin/env', '/ws/env'); won = True",
    "change a mode": "import os; os.chmod('/usr/bin/env', 0o777); won = True",
    "set times": "import os; os.utime('/usr/bin/env'); won = True",
    "cut a system file": "import os; os.truncate('/etc/ld.so.cache', 0); won = True",
    "block device": "import os, stat; os.mknod('/ws/d', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); won = True",
    "character device": "import os, stat; os.mknod('/ws/c', 0o600 | stat.S_IFCHR, os.makedev(1, 1)); won = True",
    "set uid program": "import os, shutil, subprocess; shutil.copy('/usr/bin/env', '/ws/s'); os.chmod('/ws/s', 0o4755); won = os.stat('/ws/s').st_uid == 0",
    "become root": "import os; os.setuid(0); won = open('/proc/self/uid_map').read().split()[1] == '0'",
    "become another group": "import os; os.setgroups([0]); won = True",
    "real, effective, saved": "import os; os.setresuid(1, 1, 1); won = True",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (10**6, 10**6)); won = True",
    "core dumps on": "import resource as r; r.setrlimit(r.RLIMIT_CORE, (10**9, 10**9)); won = True",
    "raise priority": "import os; os.nice(-5); won = True",
    "real time": "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)); won = True",
    "signal the harness": "import os; os.kill(orders['host_pid'], 0); won = os.readlink('/proc/self/ns/pid') == orders['pid_namespace']",
    "inspect the harness": "won = orders['marker'] in open(f\"/proc/{orders['host_pid']}/cmdline\").read()",
    "foreign processes": "import os; won = len([p for p in os.listdir('/proc') if p.isdigit()]) > 8",
    "capabilities": "won = [l for l in open('/proc/self/status') if l.startswith(('CapEff', 'CapPrm', 'CapAmb')) and int(l.split()[1], 16)]",
    "capabilities to come": "won = 'NoNewPrivs:\\t1' not in open('/proc/self/status').read()",
    "no filter": "won = 'Seccomp:\\t2' not in open('/proc/self/status').read()",
    "descriptors": "import os; won = [n for n in os.listdir('/proc/self/fd') if int(n) > 20]",
    "environment": "import os; won = [k for k in os.environ if 'KEY' in k or 'TOKEN' in k or 'CANARY' in k]",
    "environment of others": "import os\nwon = []\nfor p in os.listdir('/proc'):\n  try: won += [p] if p.isdigit() and b'CANARY' in open(f'/proc/{p}/environ', 'rb').read() else []\n  except OSError: pass",
    "home folder": "import os; won = [d for d in os.listdir('/root') if '/root/' + d not in orders['python']]",
    "other jobs": "import os; won = [d for d in os.listdir('/tmp') if 'autodidact' in d or 'bait' in d]",
    "terminal injection": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); won = True",
    "terminal": "open('/dev/tty', 'w').write('x'); won = True",
    "tcp to the host": "import socket; socket.create_connection(('127.0.0.1', orders['tcp_port']), 1); won = True",
    "tcp out": "import socket; socket.create_connection(('1.1.1.1', 80), 1); won = True",
    "tcp to the metadata service": "import socket; socket.create_connection(('169.254.169.254', 80), 1); won = True",
    "tcp version six": "import socket; socket.create_connection(('2606:4700::1111', 80), 1); won = True",
    "name lookup": "import socket; socket.getaddrinfo('example.org', 80); won = True",
    "datagram out": "import socket; socket.socket(2, 2).sendto(b'x', ('1.1.1.1', 53)); won = True",
    "datagram to the host": "import socket; socket.socket(2, 2).sendto(b'escape', ('127.0.0.1', orders['udp_port']))",
    "multicast": "import socket; socket.socket(2, 2).sendto(b'x', ('224.0.0.1', 9)); won = True",
    "ping": "import socket; socket.socket(2, 2, 1).sendto(b'\\x08\\0\\xf7\\xff\\0\\0\\0\\0', ('1.1.1.1', 0)); won = True",
    "raw socket": "import socket; socket.socket(2, 3, 1); won = True",
    "packet socket": "import socket; socket.socket(17, 3, 0); won = True",
    "vsock": "import socket; socket.socket(40, 1); won = True",
    "kernel crypto socket": "import socket; socket.socket(38, 5, 0); won = True",
    "bluetooth": "import socket; socket.socket(31, 3, 1); won = True",
    "abstract socket": "import socket; socket.socket(1).connect('\\0' + orders['abstract']); won = True",
    "route": "import socket, struct; s = socket.socket(16, 3, 0); s.bind((0, 0)); s.send(struct.pack('IHHII', 28, 20, 0x501, 1, 0) + struct.pack('BBBBI', 2, 8, 0, 0, 1) + b'\\0' * 4); won = struct.unpack_from('i', s.recv(99), 16)[0] == 0",
}  # fmt: skip

ATTACKS = {
    **{
        f"system call: {name}": f"{SYSCALL}\nwon = (call({arguments}),)"
        for name, arguments in _SYSCALLS.items()
    },
    **{
        f"read: {name}": f"won = open({path!r}.format(**orders), 'rb').read(1)"
        for name, path in _READS.items()
    },
    **{
        f"write: {name}": f"import os; won = os.write(os.open({path!r}.format(**orders), os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'x')"
        for name, path in _WRITES.items()
    },
    **_OTHER,
}


def run_all() -> None:
    """Inside the jail: every attack in a child, five seconds each; one line of JSON {name: evidence or ""} at the end."""
    import os
    import select
    import signal

    orders = {**json.loads(sys.argv[1]), "parent": os.getppid()}
    report = {}
    for name, code in ATTACKS.items():
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                scope = {"orders": orders, "won": ""}
                exec(code, scope)
                os.write(write, repr(scope["won"] or "")[:200].encode())
            except BaseException:
                os.write(write, b"''")
            os._exit(0)
        os.close(write)
        ready, _, _ = select.select([read], [], [], 5)
        report[name] = os.read(read, 500).decode() if ready else ""
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(
        "REPORT " + json.dumps({name: found for name, found in report.items() if found not in ("", "''")}),
        len(report),
    )


if __name__ == "__main__":
    run_all()
