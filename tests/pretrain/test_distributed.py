"""Laws of several processes: they find each other, one writes, any number goes on where any other stopped."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.distributed import DistributedConfig, Membership, first_host, membership

ROOT = Path(__file__).parents[2]


def variables(**values):
    return {name.upper(): str(value) for name, value in values.items()}


def test_explicit_settings_are_taken_as_they_are():
    config = DistributedConfig(cluster="explicit", coordinator="a:1", num_processes=2, process_id=1)
    assert membership(config, {}) == Membership(coordinator="a:1", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    ("tasks", "nodes", "device"),
    [(2, 2, None), (16, 2, 3)],
    ids=["one task a host takes all devices", "several take one each"],
)
def test_slurm_says_who_we_are(tasks, nodes, device):
    environment = variables(
        slurm_step_nodelist="gpu[07-09,12]", slurm_step_num_tasks=tasks, slurm_step_num_nodes=nodes,
        slurm_procid=1, slurm_localid=3,
    )  # fmt: skip
    found = membership(DistributedConfig(cluster="slurm"), environment)
    assert found == Membership(
        coordinator="gpu07:12321", num_processes=tasks, process_id=1, local_device=device
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[07-09,12],x", "gpu07"),
        ("a,b", "a"),
        ("rack[1,3]-n", "rack1-n"),
        ("n1.site.org", "n1.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_torchrun_says_who_we_are():
    environment = variables(master_addr="host0", master_port=99, world_size=4, rank=3)
    config = DistributedConfig(cluster="torchrun")
    found = membership(config, environment)
    assert found == Membership(coordinator="host0:99", num_processes=4, process_id=3)
    several = membership(config, environment | variables(local_world_size=2, local_rank=1))
    assert several == dataclasses.replace(found, local_device=1)


RAY_TRAIN = variables(
    master_addr="host0", master_port=99, world_size=4, rank=3, local_world_size=2, local_rank=1, node_rank=1
)


@pytest.mark.parametrize(
    ("visible", "device"),
    [(None, None), ("5", None), ("0,1", 1), ("0,1,2,3", None)],
    ids=["no GPUs", "its own", "one of those of its node", "several each"],
)
def test_ray_train_says_who_we_are(visible, device):
    environment = RAY_TRAIN if visible is None else RAY_TRAIN | {"CUDA_VISIBLE_DEVICES": visible}
    found = membership(DistributedConfig(cluster="ray"), environment)
    assert found == Membership(coordinator="host0:99", num_processes=4, process_id=3, local_device=device)


def test_what_a_driver_of_ray_passes_comes_before_the_variables():
    passed = {"coordinator": "driver:7", "num_processes": 2, "process_id": 0}
    config = DistributedConfig(cluster="ray", **passed)
    assert membership(config, {}) == membership(config, RAY_TRAIN) == Membership(**passed)
    part = DistributedConfig(cluster="ray", coordinator="driver:7")
    assert membership(part, RAY_TRAIN) == Membership(coordinator="driver:7", num_processes=4, process_id=3)


@pytest.mark.parametrize(
    ("cluster", "environment", "words"),
    [
        ("ray", {}, "cluster=ray reads MASTER_ADDR, which is not set"),
        ("ray", {k: v for k, v in RAY_TRAIN.items() if k != "RANK"}, "reads RANK, which is not set"),
        ("slurm", {}, "SLURM_STEP_NODELIST, which is not set"),
        ("torchrun", variables(master_addr="a"), "MASTER_PORT, which is not set"),
        (
            "torchrun",
            variables(master_addr="a", master_port=1, world_size="two", rank=0),
            "WORLD_SIZE must be a number",
        ),
    ],
)
def test_missing_variables_are_one_clear_line(cluster, environment, words):
    with pytest.raises(ConfigError, match=words):
        membership(DistributedConfig(cluster=cluster), environment)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cluster": "mpi"}, "cluster must be one of"),
        ({"cluster": "explicit"}, "needs coordinator, num_processes, process_id as well"),
        ({"num_processes": 2}, "num_processes belongs to cluster=explicit"),
        ({"cluster": "slurm", "coordinator": "host"}, "coordinator must be host:port"),
        ({"cluster": "ray", "coordinator": "123"}, "coordinator must be host:port"),
        (
            {"cluster": "explicit", "coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "process_id must lie in",
        ),
        ({"heartbeat_timeout_s": 0}, "heartbeat_timeout_s must be at least 1"),
        ({"end_timeout_s": 0}, "end_timeout_s must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DistributedConfig(**settings)


# --- real processes ----------------------------------------------------------------------------------

CONFIG = """
import dataclasses
from pretrain.config import load_config

def get_config():
    config = load_config({smoke!r})
    model = dataclasses.replace(
        config.model, num_layers=1, width=32, num_heads=4, num_kv_heads=2, head_width=8, hidden_width=64, dtype="float32",
    )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, batch_rows=8, row_length=64),
        run=dataclasses.replace(config.run, num_steps={steps}, log_every_steps=1, eval_every_steps=None, writers=()),
    )
"""

# The run itself, then the batches of all steps as this set of processes would make them.
PROGRAM = """
import hashlib, json, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from pathlib import Path
from pretrain.config import apply_overrides, load_config
from pretrain.data.loader import RowBatches
from pretrain.data.tables import prepare_tables
from pretrain.distributed import joined
from pretrain.sharding import make_mesh
from pretrain.train import train

path, report, *overrides = sys.argv[1:]
config = apply_overrides(load_config(path), overrides)
with joined(config.distributed):
    result = train(config, name="pod")
    data = prepare_tables(config.data, Path(config.run.workdir), config.run.seed)
    batches = RowBatches(data, config.data, seed=config.run.seed, mesh=make_mesh(config.mesh))
    hashes = []
    for step in range(config.run.num_steps):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(batches.batch_at(step)):
            if jax.process_count() > 1:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
            digest.update(np.asarray(leaf).tobytes())
        hashes.append(digest.hexdigest()[:16])
    Path(report).write_text(json.dumps({"hashes": hashes, "code": result.exit_code, "devices": jax.device_count()}))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]):
    """The processes, none of which outlives the block."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Pod:
    """Starts the processes of runs of one small config and reads what they left."""

    def __init__(self, folder: Path, num_steps: int):
        self.folder = folder
        self.config = folder / "pod.py"
        self.config.write_text(CONFIG.format(smoke=str(ROOT / "configs/pretrain/smoke.py"), steps=num_steps))

    def start(self, num_processes: int, devices_each: int, *overrides: str, program: list[str] | None = None):
        """The processes, each with its own report and log."""
        port = free_port()
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}"}
        started = []
        for i in range(num_processes):
            distributed = [
                "distributed.cluster=explicit", f"distributed.coordinator=127.0.0.1:{port}",
                f"distributed.num_processes={num_processes}", f"distributed.process_id={i}",
            ] if num_processes > 1 else []  # fmt: skip
            command = program or ["-c", PROGRAM, str(self.config), str(self.folder / f"report{i}.json")]
            log = open(self.folder / f"log{i}.txt", "w")
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, f"run.workdir={self.folder / 'runs'}", *distributed, *overrides],
                    cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
            log.close()
        return started

    def run(self, num_processes: int, devices_each: int, *overrides: str) -> list[dict]:
        """Run to the end and return the reports of all processes."""
        with ended(self.start(num_processes, devices_each, *overrides)) as processes:
            codes = [process.wait(timeout=300) for process in processes]
            assert codes == [0] * num_processes, "\n".join(self.log(i) for i in range(num_processes))
        return [json.loads((self.folder / f"report{i}.json").read_text()) for i in range(num_processes)]

    def log(self, process: int) -> str:
        return (self.folder / f"log{process}.txt").read_text()

    @property
    def root(self) -> Path:
        (root,) = (self.folder / "runs" / "pod").iterdir()
        return root

    def losses(self) -> dict[int, float]:
        lines = [json.loads(line) for line in (self.root / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process on one device, never interrupted."""
    pod = Pod(tmp_path_factory.mktemp("alone"), num_steps=6)
    (report,) = pod.run(1, 1)
    return report, pod.losses()


def same(alone, pod, reports):
    expected, losses = alone
    for report in reports:
        assert report["hashes"] == expected["hashes"]
    got = pod.losses()
    assert got.keys() == losses.keys()
    for step, loss in losses.items():
        assert got[step] == pytest.approx(loss, rel=1e-6), step


@pytest.mark.slow
def test_two_processes_go_on_as_one(alone, tmp_path):
    """Two processes of two devices train, save and end; one process with other devices finishes the run."""
    pod = Pod(tmp_path, num_steps=6)
    reports = pod.run(2, 2, "run.stop_step=3")
    assert [r["devices"] for r in reports] == [4, 4]
    reports += pod.run(1, 1)
    same(alone, pod, reports)


@pytest.mark.slow
def test_four_two_one_processes(alone, tmp_path):
    pod = Pod(tmp_path, num_steps=6)
    reports = pod.run(4, 2, "run.stop_step=2")
    reports += pod.run(2, 2, "run.stop_step=4")
    reports += pod.run(1, 2)
    same(alone, pod, reports)


@pytest.mark.slow
def test_eight_then_four_by_two_then_two_by_two_by_two(alone, tmp_path):
    pod = Pod(tmp_path, num_steps=6)
    reports = pod.run(1, 8, "run.stop_step=2")
    reports += pod.run(1, 8, "run.stop_step=4", "mesh.fsdp=4", "mesh.tensor=2")
    reports += pod.run(1, 8, "mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2")
    same(alone, pod, reports)


def wait_for_step(pod: Pod, step: int, processes, timeout_s: float = 300) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        assert all(p.poll() is None for p in processes), "\n".join(pod.log(i) for i in range(len(processes)))
        if list(pod.folder.glob("runs/pod/*/metrics.jsonl")) and max(pod.losses(), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0], ids=["the second", "the first, which coordinates"])
def test_a_lost_process_ends_the_other_within_a_minute_with_a_clear_line(victim, tmp_path):
    """Whoever notices first says it: a collective of ours (code 7), or the runtime's heartbeat, which aborts.

    The heartbeat comes first where the process waits for the other in a barrier, as it does while it saves, and for
    whoever loses the coordinator.
    """
    pod = Pod(tmp_path, num_steps=100_000)
    main = ["-m", "pretrain.main", "--config", str(pod.config)]
    with ended(pod.start(2, 2, "checkpoint.every_steps=2", program=main)) as processes:
        wait_for_step(pod, 4, processes)
        processes[victim].send_signal(signal.SIGKILL)
        code = processes[1 - victim].wait(timeout=60)
    log = pod.log(1 - victim)
    assert code in (7, -signal.SIGABRT), log
    if code == 7:
        (line,) = (line for line in log.splitlines() if line.startswith("error: "))
        assert "lost another" in line
        assert "resume" in line
    else:
        assert "indicates that another task died" in log


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    pod = Pod(tmp_path, num_steps=100_000)
    with ended(pod.start(2, 2, program=["-m", "pretrain.main", "--config", str(pod.config)])) as processes:
        wait_for_step(pod, 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [p.wait(timeout=120) for p in processes] == [75, 75], pod.log(0) + pod.log(1)
    assert list((pod.root / "checkpoints").glob("*/manifest.json"))


# The second process dawdles between steps, where no phase of the clock is open.
DAWDLE = """
import sys, time
import jax
from pretrain.config import apply_overrides, load_config
from pretrain.data.loader import RowBatches
from pretrain.distributed import joined
from pretrain.train import train

path, *overrides = sys.argv[1:]
config = apply_overrides(load_config(path), overrides)
with joined(config.distributed):
    if jax.process_index() == 1:
        at_once = RowBatches.report
        def report(self):
            time.sleep(0.4)
            return at_once(self)
        RowBatches.report = report
    train(config, name="pod")
"""


@pytest.mark.slow
def test_the_rate_is_that_of_the_slowest_process(tmp_path):
    pod = Pod(tmp_path, num_steps=8)
    with ended(pod.start(2, 2, program=["-c", DAWDLE, str(pod.config)])) as processes:
        assert [p.wait(timeout=200) for p in processes] == [0, 0], pod.log(0) + pod.log(1)
    summary = json.loads((pod.root / "summary.json").read_text())
    assert summary["tokens_per_second"] <= 8 * 64 / 0.4
    assert summary["seconds_by_phase"]["step"] >= 7 * 0.4


# Parameters that no process holds whole, hashed in small blocks and by the process alone.
HASH = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pretrain import distributed
from pretrain.checkpoint import params_sha256
from pretrain.sharding import MeshConfig, make_mesh

port, process = map(int, sys.argv[1:])
config = distributed.DistributedConfig(
    cluster="explicit", coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=process
)
with distributed.joined(config):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    leaves = {
        "a": (np.arange(3 * 8 * 16, dtype=np.float32).reshape(3, 8, 16) - 99.5, P(None, "fsdp", "tensor")),
        "b": (np.linspace(-1, 1, 64, dtype=np.float32).astype(jax.numpy.bfloat16).reshape(8, 8), P(("fsdp", "tensor"))),
        "c": (np.full((8, 2), -0.0, np.float32), P("tensor", "fsdp")),
    }
    whole = {name: leaf for name, (leaf, _) in leaves.items()}
    laid = {
        name: jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index, leaf=leaf: leaf[index])
        for name, (leaf, spec) in leaves.items()
    }
    assert not laid["a"].is_fully_addressable
    wanted = params_sha256(whole)
    assert [params_sha256(laid, block_bytes=n) for n in (8, 100, 1 << 20)] == [wanted] * 3
"""


def two_processes(tmp_path: Path, program: str, *arguments: object, devices_each: int = 1):
    """Exit codes and logs of two processes of a small program, which gets a port, its place and the arguments."""
    port, started = free_port(), []
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}"}
    for i in range(2):
        with open(tmp_path / f"log{i}.txt", "w") as log:
            command = [sys.executable, "-c", program, str(port), str(i), *map(str, arguments)]
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    with ended(started):
        codes = [process.wait(timeout=120) for process in started]
    return codes, [(tmp_path / f"log{i}.txt").read_text() for i in range(2)]


@pytest.mark.slow
def test_two_processes_hash_the_parameters_as_one(tmp_path):
    codes, logs = two_processes(tmp_path, HASH, devices_each=2)
    assert codes == [0, 0], "\n".join(logs)


# Three steps are saved; the newest one is not to be read by the second process, in a way of its own.
UNREADABLE = """
import errno, os, pathlib, sys
sys.path.insert(0, "tests/pretrain")
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pretrain import checkpoint, distributed
from pretrain.sharding import MeshConfig, make_mesh
from test_checkpoint import make_state, open_folder

port, process, folder, way = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
config = distributed.DistributedConfig(
    cluster="explicit", coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=process
)

def refuse(function, kind, number):
    def refuses(*arguments):
        if any("/2" in str(a) for a in arguments):
            raise kind(*([number] if kind is OSError else []), f"cannot: {os.strerror(number)}")
        return function(*arguments)
    return refuses

with distributed.joined(config):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))

    def laid(seed):
        def one(x):
            spec = P(None, "fsdp", "tensor") if x.ndim == 3 else P()
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
        return jax.tree.map(one, make_state(seed))

    writer = open_folder(folder)
    for step in (1, 2):
        writer.save(laid(step), step)
    writer.wait()
    distributed.wait_for_all("saved")
    if process == 1:
        if way == "arrays":
            handler = checkpoint.ocp.CompositeCheckpointHandler
            handler.restore = refuse(handler.restore, ValueError, errno.EIO)
        else:
            number = errno.EIO if way == "json" else errno.EMFILE
            pathlib.Path.read_text = refuse(pathlib.Path.read_text, OSError, number)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), laid(0))
    try:
        state, step, ledger = writer.restore_latest(shapes)
        for entry in ledger.entries:
            print("quarantined", entry["step"], entry["reason"])
        print("restored", step)
    except checkpoint.Unreadable as error:
        print("stopped:", error)
    distributed.wait_for_all("compared")
    print("left:", *sorted(os.listdir(folder)))
    writer.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["json", "arrays", "machine"])
def test_a_step_that_one_process_cannot_read_is_judged_alike_by_all(way, tmp_path):
    codes, logs = two_processes(tmp_path, UNREADABLE, tmp_path / "steps", way, devices_each=2)
    assert codes == [0, 0], "\n".join(logs)
    for log in logs:
        if way == "machine":
            assert "process 1 cannot read" in log
            assert "Too many open files" in log
            assert "left: 1 2\n" in log
        else:
            assert "restored 1" in log
            assert "quarantined 2" in log
            assert "Input/output error" in log
            assert "left: 1 2.bad\n" in log


# The first process stays over its summary for longer than a lost process is waited for.
LATE = """
import sys, time
from pretrain import distributed

port, process, end_timeout_s = map(int, sys.argv[1:])
distributed._SAY_EVERY_S = 2.0
config = distributed.DistributedConfig(
    cluster="explicit", coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=process,
    heartbeat_timeout_s=5, end_timeout_s=end_timeout_s,
)
with distributed.joined(config):
    distributed.wait_for_all("begun")
    if distributed.is_writer():
        time.sleep(15)
"""


@pytest.mark.slow
def test_all_wait_for_a_process_that_is_late_at_the_end(tmp_path):
    codes, logs = two_processes(tmp_path, LATE, 100)
    assert codes == [0, 0], "\n".join(logs)
    assert "process 1 of 2 is done and waits for the others" in logs[1]


@pytest.mark.slow
def test_a_sigterm_at_the_end_is_answered_and_nobody_leaves_early(tmp_path):
    program = LATE.replace("    if distributed.is_writer():", """
    if not distributed.is_writer():
        import os, signal, threading
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:""")  # fmt: skip
    codes, logs = two_processes(tmp_path, program, 100)
    assert codes == [0, 0], "\n".join(logs)
    assert "SIGTERM: this process is done and waits for the others" in logs[1]


@pytest.mark.slow
def test_a_process_that_is_too_late_at_the_end_is_lost(tmp_path):
    codes, logs = two_processes(tmp_path, LATE, 3)
    assert codes[1] == 7, logs[1]
    assert "process 1 of 2 lost another one" in logs[1]
