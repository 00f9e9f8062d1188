"""The adversarial suite: programs that try every category, at every level that this host offers.

Each one must end with the status that names its fault, within its limit, and leave nothing behind on the host.
"""

import hashlib
import json
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from research_env.evaluate.seal import NoArtifact, seal_artifact
from research_env.records import Limits, Status
from research_env.sandbox import cgroup
from research_env.sandbox.jail import NOBODY
from research_env.sandbox.ladder import measure_kill_s, probe, start_job
from research_env.sandbox.run import Scratch, scratch_root

ATTACKS_FILE = Path(__file__).with_name("attacks.py")
ATTACKS = runpy.run_path(str(ATTACKS_FILE))["ATTACKS"]
LIMITS = Limits(wall_s=2, memory_bytes=96 << 20, pids=24, disk_bytes=8 << 20, output_bytes=200_000)
LEVELS = {level: probe(level) for level in ("bwrap", "unshare")}


@pytest.fixture(params=list(LEVELS))
def level(request):
    """A level that holds here, or a skip with what it lacks."""
    found = LEVELS[request.param]
    if not found.is_held:
        pytest.skip(f"{request.param} does not hold here: {[c for c in found.checks if not c.is_held]}")
    return request.param


def manifest(folder: Path) -> dict[str, str]:
    """Path, mode and hash of everything below a folder."""
    return {
        str(
            path
        ): f"{path.lstat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ''}"
        for path in sorted(folder.rglob("*"))
    }


def run_program(level: str, code: str) -> object:
    """Run Python source in a jail and return the outcome."""
    job, scratch = start_job(
        level, [sys.executable, "-I", "-S", "-c", code], cgroup.find_hierarchies(), LIMITS
    )
    try:
        return job.wait()
    finally:
        scratch.remove()
        assert not scratch.root.exists()


SPIN = "\nwhile True: pass"
CASES = {
    # resource: the limit holds, and the status names it
    "busy loop": (SPIN, Status.RUN_TIMEOUT),
    "sleep": ("import time; time.sleep(99)", Status.RUN_TIMEOUT),
    "ignores signals": ("import signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)" + SPIN, Status.RUN_TIMEOUT),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", Status.RUN_TIMEOUT),
    "memory hog": ("x = []\nwhile True: x.append(bytearray(1 << 20))", Status.OOM_HOST),
    "memory by a child": ("import os\nif os.fork(): raise SystemExit(1 if os.wait()[1] else 0)\nx = []\nwhile True: x.append(bytearray(1 << 20))", Status.OOM_HOST),
    "memory in shm": ("f = open('/dev/shm/x', 'wb')\nwhile True: f.write(b'x' * 65536); f.flush()", None),
    "fork bomb": ("import os\nwhile True: os.fork()", None),
    "many threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()", Status.PIDS_LIMIT),
    "children that wait": ("import os, time\nfor _ in range(99):\n  if os.fork() == 0: time.sleep(99)", Status.PIDS_LIMIT),
    "disk hog": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 65536)", Status.DISK_LIMIT),
    "many small files": ("for i in range(10**6):\n  with open(f'f{i}', 'w') as f: f.write('x' * 5000)", Status.DISK_LIMIT),
    "sparse file": ("open('s', 'wb').truncate(1 << 40)", Status.RUN_CRASH),
    "disk hog in tmp": ("f = open('/tmp/big', 'wb')\nwhile True: f.write(b'x' * 65536)", None),
    "output flood": ("while True: print('x' * 1000)", Status.OUTPUT_LIMIT),
    "error flood": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", Status.OUTPUT_LIMIT),
    "exit code": ("raise SystemExit(7)", Status.RUN_CRASH),
    "segfault": ("import ctypes; ctypes.string_at(0)", Status.RUN_CRASH),
    "abort": ("import os; os.abort()", Status.RUN_CRASH),
    "kills its group": ("import os; os.killpg(0, 9)", Status.RUN_CRASH),
    "kills everything it sees": ("import os; os.kill(-1, 9)", None),
    "deep recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
    "closes its streams": ("import os\nos.close(1); os.close(2)", Status.OK),
    "closes and spins": ("import os\nos.close(0); os.close(1); os.close(2)" + SPIN, Status.RUN_TIMEOUT),
    # escape: nothing outlives the job
    "daemon": ("import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(99)", Status.OK),
    "daemon that ignores all": ("import os, signal, time\nif os.fork() == 0:\n  os.setsid()\n  signal.signal(15, signal.SIG_IGN)\n  os.closerange(0, 99)\n  time.sleep(99)", Status.OK),
    # log injection
    "terminal codes": ("print('\\x1b[2J\\x1b]0;owned\\x07'); raise SystemExit(1)", Status.RUN_CRASH),
    "forged status": ("print('status: ok metric: 0.0'); raise SystemExit(1)", Status.RUN_CRASH),
    "broken text": ("import os; os.write(1, bytes(range(256)))", Status.OK),
}  # fmt: skip


# One of each kind by default; all of them, at both levels, take minutes.
SAMPLE = ("fork bomb", "memory hog", "disk hog", "output flood", "daemon that ignores all", "forged status")


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_program_gets_one_status_and_leaves_nothing(name, level, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_API_KEY", "secret")
    code, expected = CASES[name]
    (tmp_path / "host.txt").write_text("untouched")
    before = manifest(tmp_path)
    groups = cgroup.find_hierarchies()
    outcome = run_program(level, code)
    assert outcome.status is expected if expected is not None else outcome.status is not Status.INFRA_ERROR, (
        outcome
    )
    assert outcome.wall_s < LIMITS.wall_s + 2
    assert manifest(tmp_path) == before
    for parent in (*groups.v1.values(), groups.v2):
        assert parent is None or not [
            g for g in os.listdir(parent) if g.startswith(f"autodidact-probe-{os.getpid()}-")
        ]


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])
def test_without_root_a_locked_folder_is_the_jobs_fault_and_is_removed(mode):
    if os.geteuid() != 0:
        pytest.skip("becomes another user for a moment")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        os.seteuid(NOBODY)
        try:
            scratch = Scratch(folder, "job", 1 << 20)
            inner = scratch.folder("out") / "inner"
            (inner / "deep").mkdir(parents=True)
            (inner / "file").write_text("x")
            (inner / "link").symlink_to(folder)
            (inner / "deep").chmod(0)
            inner.chmod(mode)
            with pytest.raises(NoArtifact, match="cannot be read"):
                seal_artifact(scratch.path / "out", folder / "sealed", ["*"], 100)
            scratch.remove()
        finally:
            os.seteuid(0)
        assert not list(folder.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o777, "a link was followed"


def test_a_tree_of_fifty_processes_is_gone_within_200_ms(level):
    assert min(measure_kill_s(level) for _ in range(3)) < 0.2


def test_no_attack_succeeds(level, tmp_path, monkeypatch):
    """All of attacks.py in one jail; the host looks at what it put out."""
    monkeypatch.setenv("CANARY_API_KEY", "secret")
    tmp_path.chmod(0o755)
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    (outside / "secret.txt").write_text("the secret")
    before = manifest(tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0autodidact-test-{os.getpid()}")
        abstract.listen()
        orders = {
            "secret": str(outside / "secret.txt"),
            "source": str(ATTACKS_FILE.resolve()),
            "ledger": str(outside / "ledger.sqlite"),
            "job": str(scratch_root()),
            "outside": str(outside),
            "python": os.path.realpath(sys.executable),
            "library": os.__file__,
            "host_pid": os.getpid(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
            "marker": "pytest",
            "tcp_port": tcp.getsockname()[1],
            "udp_port": udp.getsockname()[1],
            "abstract": f"autodidact-test-{os.getpid()}",
        }
        code = ATTACKS_FILE.read_text()
        argv = [sys.executable, "-I", "-c", code, json.dumps(orders)]
        limits = Limits(wall_s=120, memory_bytes=256 << 20, pids=24, disk_bytes=8 << 20)
        job, scratch = start_job(level, argv, cgroup.find_hierarchies(), limits)
        try:
            outcome = job.wait()
        finally:
            scratch.remove()
        udp.setblocking(False)
        with pytest.raises(BlockingIOError):
            udp.recv(10)
    assert outcome.status is Status.OK, outcome
    lines = [line for line in outcome.output_tail.splitlines() if line.startswith("REPORT ")]
    found, num_run = lines[-1].removeprefix("REPORT ").rsplit(" ", 1)
    assert json.loads(found) == {}
    assert int(num_run) == len(ATTACKS) >= 100
    assert manifest(tmp_path) == before
