"""One job, start to end: run, kill, seal, judge, one result.

A bad program is a result, never an exception; a fault of the host is INFRA_ERROR, which the scheduler retries.
"""

import base64
import dataclasses
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import stable_seed
from pretrain.rundir import write_json_atomic
from research_env.evaluate.seal import NoArtifact, digest_artifact, seal_artifact
from research_env.records import Result, Status, tree_digest
from research_env.sandbox import cgroup
from research_env.sandbox.jail import NOBODY, WITH_MOUNTS, Jail, Mount, hidden_mounts, python_mounts
from research_env.sandbox.ladder import probe
from research_env.sandbox.run import Job, Outcome, Scratch, scratch_root
from research_env.task import FINAL, Task, read_task

LOG_TAIL_CHARACTERS = 4000
_CURVE_LINE = re.compile(r"^step (\d{1,9}) loss (\d{1,9}(?:\.\d{1,12})?)\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a worker needs; everything is plain data, so that it can cross to another host."""

    run_key: str
    name: str  # prefix of every process group and folder of this job, so that a sweep finds them
    task_folder: str
    task_digest: str  # of the task as the supervisor read it
    tree: Mapping[str, bytes]
    env_digest: str
    diff_digest: str
    seed: int
    rung: float
    level: str
    label: str  # what the result says about isolation
    workdir: str  # where sealed artifacts and the judge's files are
    split: str = "search"  # which data the judge scores on: search, final
    cpus: tuple[int, ...] = ()
    num_devices: int = 1
    devices: tuple[int, ...] = ()  # leased accelerators, empty for cores
    device_kind: str = "CPU"
    cache: str = ""  # compile cache on the host, read-only to candidates
    fills_cache: bool = False  # the harness's own baseline, whose compiles become the cache

    def to_json(self) -> dict[str, Any]:
        """JSON values; the tree is base64."""
        tree = {path: base64.b64encode(data).decode() for path, data in self.tree.items()}
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "tree": tree,
            "cpus": list(self.cpus),
            "devices": list(self.devices),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "JobSpec":
        """The spec of `to_json`."""
        tree = {path: base64.b64decode(data) for path, data in fields["tree"].items()}
        return cls(
            **{**fields, "tree": tree, "cpus": tuple(fields["cpus"]), "devices": tuple(fields["devices"])}
        )


def sealed_folder(workdir: str | Path, run_key: str) -> Path:
    """Where the artifact of a run is kept between seal and result."""
    return Path(workdir) / "sealed" / run_key


def lay_out_judge(task: Task, workdir: str | Path, split: str = "search") -> Path:
    """Write the private files and the judge's and server's code once; the folder's name is their digest.

    The final split's files exist only in the folder of split "final".
    """
    library = Path(__file__).parent / "evaluate"
    files = {
        f"locked/{path}": data
        for path, data in task.private.items()
        if split == "final" or not path.startswith(FINAL)
    }
    files |= {
        "judge/judge.py": (library / "judge.py").read_bytes(),
        "server/server.py": (library / "server.py").read_bytes(),
    }
    folder = Path(workdir) / "judges" / tree_digest(files)
    if not folder.is_dir():
        building = folder.with_name(f".{folder.name}-{os.getpid()}-{threading.get_ident()}")
        write_tree(building, files, owner=None)
        try:
            building.rename(folder)
        except OSError:  # another worker was first
            shutil.rmtree(building)
    return folder


def write_tree(folder: Path, tree: Mapping[str, bytes], owner: int | None) -> None:
    """Write a tree into a new folder that nobody else can reach yet; paths were checked when the tree was made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {folder}
    for path, data in sorted(tree.items()):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        made |= {parent for parent in target.parents if parent.is_relative_to(folder)}
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        if owner is not None:
            os.chown(target, owner, owner)
    for parent in made:
        parent.chmod(0o755)
        if owner is not None:
            os.chown(parent, owner, owner)


def digest_folder(folder: Path) -> str:
    """The tree digest of a folder of plain files."""
    files = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
        elif not stat.S_ISDIR(mode):
            raise AssertionError(f"{path} appeared among locked files")
    return tree_digest(files)


def run_job(
    spec: JobSpec, task: Task, *, on_sealed: Any = None, should_stop: threading.Event | None = None
) -> Result:
    """Run and judge; a sealed artifact that a killed supervisor left is judged again, not trained again.

    `on_sealed(digest)` is called between the two, for the ledger.
    """
    hierarchies = cgroup.find_hierarchies()
    scratch = Scratch(scratch_root(), spec.name, task.limits.disk_bytes + (4 << 20))
    try:
        judge_files = lay_out_judge(task, spec.workdir, spec.split)
        assert digest_folder(judge_files) == judge_files.name, (
            f"locked files in {judge_files} were changed; delete the folder"
        )
        sealed = sealed_folder(spec.workdir, spec.run_key)
        common: dict[str, Any] = {
            "higher_is_better": task.higher_is_better,
            "seed": spec.seed,
            "rung": spec.rung,
            "isolation": spec.label,
            "tree_digest": tree_digest(spec.tree),
            "env_digest": spec.env_digest,
            "diff_digest": spec.diff_digest,
            "run_key": spec.run_key,
        }
        note = sealed.with_suffix(".json")
        if sealed.is_dir() and note.is_file():
            common |= json.loads(note.read_text())
        else:
            shutil.rmtree(sealed, ignore_errors=True)
            outcome = _train(spec, task, hierarchies, scratch, should_stop)
            common |= {
                "wall_s": outcome.wall_s,
                "device_s": outcome.wall_s * spec.num_devices,
                "cpu_s": outcome.cpu_s,
                "peak_memory_bytes": outcome.peak_memory_bytes,
                "log_tail": clean_log(outcome.output_tail),
                "curve": tuple((int(a), float(b)) for a, b in _CURVE_LINE.findall(outcome.output_tail)),
            }
            if outcome.status is not Status.OK:
                return Result(status=outcome.status, reason=outcome.reason, **common)
            sealed.parent.mkdir(parents=True, exist_ok=True)
            building = sealed.with_name(sealed.name + ".part")
            shutil.rmtree(building, ignore_errors=True)
            try:
                found = seal_artifact(scratch.path / "out", building, task.artifact, task.max_artifact_bytes)
            except NoArtifact as error:
                shutil.rmtree(building, ignore_errors=True)
                return Result(status=Status.NO_ARTIFACT, reason=str(error), **common)
            common["artifact_digest"] = found
            write_json_atomic(note, common)
            building.rename(sealed)
            if on_sealed is not None:
                on_sealed(found)
        if digest_artifact(sealed) != common["artifact_digest"]:
            shutil.rmtree(sealed)
            return Result(status=Status.INFRA_ERROR, reason="the sealed artifact changed on disk", **common)
        start = time.monotonic()
        status, reason, metric, extra = _judge(
            spec, task, hierarchies, scratch, judge_files, sealed, should_stop
        )
        assert digest_folder(judge_files) == judge_files.name, (
            f"locked files in {judge_files} were changed; delete the folder"
        )
        common["judge_s"] = time.monotonic() - start
        if spec.fills_cache and status is Status.OK:
            _keep_cache(spec, scratch)
        return Result(status=status, reason=reason, metric=metric, extra=extra, **common)
    finally:
        scratch.remove()


def _train(
    spec: JobSpec, task: Task, hierarchies: Any, scratch: Scratch, should_stop: threading.Event | None
) -> Outcome:
    owner = NOBODY if scratch.is_capped else None
    write_tree(scratch.folder("ws"), spec.tree, owner)
    scratch.folder("out")
    mounts = [
        *_python(spec, task, scratch),
        Mount(host=str(scratch.path / "ws"), name="ws", writable=True),
        Mount(host=str(scratch.path / "out"), name="out", writable=True),
    ]
    environment = {"OUT": "{out}", "SEED": str(spec.seed), "RUNG": repr(spec.rung), **_shares(spec)}
    if task.data:
        mounts.append(Mount(host=os.path.abspath(task.data), name="data"))
        environment["DATA"] = "{data}"
    mounts += _cache_mounts(spec, scratch)
    environment |= _cache_environment(spec)
    changed = [
        path for path, data in spec.tree.items() if path.endswith(".py") and task.baseline.get(path) != data
    ]
    if changed:
        # Compiled inside the jail, because a parser is no place to trust strange input either.
        code = (
            "import sys; [compile(open(p, 'rb').read(), p, 'exec', dont_inherit=True) for p in sys.argv[1:]]"
        )
        jail = _jail(spec, task, scratch, mounts, "ws", environment, suffix="build")
        outcome = Job(
            jail, [sys.executable, "-I", "-S", "-c", code, *changed], hierarchies, scratch=scratch
        ).wait(should_stop)
        if outcome.status is Status.RUN_CRASH:
            return dataclasses.replace(
                outcome, status=Status.BUILD_FAILED, reason="a changed file does not compile"
            )
        if outcome.status is not Status.OK:
            return outcome
    jail = _jail(spec, task, scratch, mounts, "ws", environment, suffix="run")
    outcome = Job(jail, ["/bin/sh", "run.sh"], hierarchies, scratch=scratch).wait(should_stop)
    if outcome.status is Status.RUN_CRASH and "RESOURCE_EXHAUSTED" in outcome.output_tail:
        # Taken from the log, hence forgeable; it is repaired and rewarded exactly as the crash it refines.
        return dataclasses.replace(outcome, status=Status.OOM_DEVICE)
    return outcome


def _python(spec: JobSpec, task: Task, scratch: Scratch) -> tuple[Mount, ...]:
    """What candidates see of the interpreter."""
    if not task.hides or spec.level not in WITH_MOUNTS:
        return python_mounts()
    if not (scratch.path / "hidden").is_dir():
        scratch.folder("hidden")
    return (*python_mounts(), *hidden_mounts(task.hides, str(scratch.path / "hidden")))


CACHE_SETTINGS = {
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # makes the key independent of the folder's path
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def _cache_mounts(spec: JobSpec, scratch: Scratch) -> list[Mount]:
    """The compile cache: whoever writes it can run code in its readers, so only the baseline's own run may."""
    if not spec.cache:
        return []
    if not spec.fills_cache:
        return [Mount(host=os.path.abspath(spec.cache), name="cache")]
    if not (scratch.path / "cache").is_dir():
        scratch.folder("cache")
    return [Mount(host=str(scratch.path / "cache"), name="cache", writable=True)]


def _cache_environment(spec: JobSpec) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": "{cache}", **CACHE_SETTINGS} if spec.cache else {}


def _keep_cache(spec: JobSpec, scratch: Scratch) -> None:
    """Copy what the baseline compiled to where later jobs read it; plain files only, all or nothing."""
    building = Path(spec.cache).with_name(f".{Path(spec.cache).name}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    try:
        seal_artifact(scratch.path / "cache", building, ["*"], scratch.disk_bytes)
    except NoArtifact:
        building.mkdir(exist_ok=True)  # it compiled nothing: an empty cache is a cache
    shutil.rmtree(spec.cache, ignore_errors=True)
    building.rename(spec.cache)


def _shares(spec: JobSpec) -> dict[str, str]:
    """What a job is told about its lease: as many threads as cores, and its own accelerators only."""
    # Unpinned cores are those of a job on a cluster, which gives it as many as the resource says.
    count = str(len(spec.cpus) or (spec.num_devices if spec.device_kind == "CPU" else 1))
    shares = {name: count for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if spec.devices:
        name = "TPU_VISIBLE_DEVICES" if spec.device_kind.upper().startswith("TPU") else "CUDA_VISIBLE_DEVICES"
        shares[name] = ",".join(map(str, spec.devices))
    else:
        # Where jax's TPU package is installed it would look for chips first, and abort in a jail without /sys.
        shares["JAX_PLATFORMS"] = "cpu"
    return shares


def _device_nodes(spec: JobSpec) -> tuple[str, ...]:
    """The host's device files of a lease; a jail has no others. (Never run on an accelerator so far.)"""
    if not spec.devices:
        return ()
    names = [
        "/dev/nvidiactl",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
        *(f"/dev/nvidia{i}" for i in spec.devices),
    ]
    names += [f"/dev/accel{i}" for i in spec.devices]
    return tuple(name for name in names if os.path.exists(name))


def _jail(
    spec: JobSpec,
    task: Task,
    scratch: Scratch,
    mounts: list[Mount],
    cwd: str,
    environment: dict[str, str],
    *,
    suffix: str,
    is_judge: bool = False,
) -> Jail:
    stage = scratch.stage / suffix
    stage.mkdir(mode=0o711)
    return Jail(
        level=spec.level,
        name=f"{spec.name}-{suffix}",
        stage=str(stage),
        mounts=tuple(mounts),
        cwd=cwd,
        environment=environment,
        limits=task.judge_limits if is_judge else task.limits,
        cpus=spec.cpus,
        devices=() if is_judge else _device_nodes(spec),
    )


def _judge(
    spec: JobSpec,
    task: Task,
    hierarchies: Any,
    scratch: Scratch,
    judge_files: Path,
    sealed: Path,
    should_stop: threading.Event | None,
) -> tuple[Status, str, float | None, dict[str, float]]:
    result_folder = scratch.folder("result")
    artifact = Mount(host=os.path.abspath(sealed), name="artifact")
    mounts = [
        *python_mounts(),
        artifact,
        Mount(host=os.path.abspath(judge_files / "locked"), name="locked"),
        Mount(host=os.path.abspath(judge_files / "judge"), name="judge"),
        Mount(host=str(result_folder), name="result", writable=True),
    ]
    environment = {
        "ARTIFACT": "{artifact}",
        "JUDGE": "{judge}",
        "RESULT": "{result}/result.json",
        "SPLIT": spec.split,
        "SEED": str(spec.seed),
        # Drawn after the run has ended, so that nothing trained could know which positions are tested.
        "JUDGE_SEED": str(int.from_bytes(os.urandom(4))),
        **_shares(spec),
    }
    jobs: list[Job] = []
    threads: list[threading.Thread] = []
    stop = threading.Event()
    judge_fds: list[int] = []
    try:
        server_mounts: list[Mount] = []
        server_environment: dict[str, str] = {}
        if task.num_servers:
            tree = scratch.path / "tree"
            write_tree(tree, spec.tree, owner=None)
            server_mounts = [
                *_python(spec, task, scratch),
                artifact,
                Mount(host=str(tree), name="ws"),
                Mount(host=os.path.abspath(judge_files / "server"), name="server"),
                *_cache_mounts(spec, scratch),
            ]
            server_environment = {**_shares(spec), **_cache_environment(spec)}
        for index in range(task.num_servers):
            to_server, from_judge = os.pipe()
            to_judge, from_server = os.pipe()
            judge_fds += [to_judge, from_judge]
            jail = _jail(
                spec, task, scratch, server_mounts, "ws", server_environment, suffix=f"server{index}"
            )
            limits = dataclasses.replace(task.limits, wall_s=task.judge_limits.wall_s + 5)
            argv = [sys.executable, "-I", "{server}/server.py", task.serve_module, "{artifact}"]
            try:
                jobs.append(
                    Job(
                        dataclasses.replace(jail, limits=limits, refuses_locks=True),
                        argv,
                        hierarchies,
                        stdin=to_server,
                        stdout=from_server,
                    )
                )
            finally:
                os.close(to_server)
                os.close(from_server)
            threads.append(threading.Thread(target=jobs[-1].wait, args=(stop,)))
            threads[-1].start()
        pairs = zip(judge_fds[::2], judge_fds[1::2], strict=True)
        environment["SERVERS"] = ",".join(f"{read}:{write}" for read, write in pairs)
        jail = _jail(spec, task, scratch, mounts, "locked", environment, suffix="judge", is_judge=True)
        job = Job(jail, ["/bin/sh", "eval.sh"], hierarchies, scratch=scratch, keep_fds=tuple(judge_fds))
        outcome = job.wait(should_stop)
    finally:
        stop.set()
        for fd in judge_fds:
            os.close(fd)
        for thread in threads:
            thread.join()
    for server in jobs:
        if server.close().status is Status.INFRA_ERROR:
            return Status.INFRA_ERROR, server.close().reason, None, {}
    if outcome.status in (Status.INFRA_ERROR, Status.PREEMPTED):
        return outcome.status, outcome.reason, None, {}
    if outcome.status is Status.RUN_TIMEOUT:
        return Status.EVAL_TIMEOUT, f"judging took longer than {task.judge_limits.wall_s:g} s", None, {}
    if outcome.status is not Status.OK:
        # The judge's own log stays with the harness: from it the ideator learns the status only.
        return (
            Status.EVAL_CRASH,
            f"the evaluator ended with {outcome.status.value}: {clean_log(outcome.output_tail[-400:])}",
            None,
            {},
        )
    return read_metric(result_folder / "result.json", task)


def read_metric(file: Path, task: Task) -> tuple[Status, str, float | None, dict[str, float]]:
    """The judge's document: a finite number in the task's declared range, or METRIC_INVALID."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return Status.EVAL_CRASH, "the evaluator wrote no result to $RESULT", None, {}
    with os.fdopen(fd, "rb") as stream:
        data = stream.read(65_537)
    try:
        fields = json.loads(data, object_pairs_hook=_without_twins) if len(data) <= 65_536 else None
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, (int, float)):
        fields = {"metric": fields}
    if not isinstance(fields, dict):
        return Status.METRIC_INVALID, "the evaluator's result is not a JSON object", None, {}
    if "invalid" in fields:
        return Status.METRIC_INVALID, clean_log(str(fields["invalid"]))[:300], None, {}
    metric = fields.get("metric", fields.get(task.metric))
    if isinstance(metric, bool) or not isinstance(metric, (int, float)):
        return Status.METRIC_INVALID, f"the metric must be a number, got {type(metric).__name__}", None, {}
    low, high = task.metric_range
    if not low <= metric <= high:  # also false for NaN
        shown = str(metric)[:24]  # not as a float: JSON has whole numbers that are too large for one
        return Status.METRIC_INVALID, f"the metric must lie in [{low:g}, {high:g}], got {shown}", None, {}
    extra = fields.get("extra", {})
    extra = extra if isinstance(extra, dict) else {}
    largest = sys.float_info.max
    return (
        Status.OK,
        "",
        float(metric),
        {
            str(k)[:64]: float(v)
            for k, v in extra.items()
            if isinstance(v, (int, float)) and -largest <= v <= largest
        },
    )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An evaluator that pastes a candidate's text into its document could be given a second "metric"."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice")
    return fields


def clean_log(text: str) -> str:
    """Printable text of bounded length: what a log may contain when it reaches a prompt, a page or a terminal."""
    kept = "".join(
        c if c == "\n" or c == "\t" or c.isprintable() else " " for c in text[-2 * LOG_TAIL_CHARACTERS :]
    )
    return kept[-LOG_TAIL_CHARACTERS:]


def job_name(workdir: str | Path, run_key: str) -> str:
    """Prefix of all that a job leaves on the host; the first part is the campaign's, for sweeping."""
    return f"{campaign_prefix(workdir)}{run_key[:12]}-{os.getpid()}-{time.monotonic_ns()}"


def campaign_prefix(workdir: str | Path) -> str:
    """What every job name of this campaign folder starts with."""
    return f"autodidact-{stable_seed('campaign', os.path.realpath(workdir)):016x}-"


def run_spec(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A job on a host of a cluster: `JobSpec.to_json` in, `Result.to_json` out.

    The level was proved where the supervisor is, which says nothing about this host: it is tried here again, and where it does
    not hold nothing runs. Accelerators are those that the cluster lent to this process.
    """
    spec = JobSpec.from_json(fields)
    if spec.device_kind != "CPU":
        lent = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        spec = dataclasses.replace(spec, devices=tuple(int(index) for index in lent.split(",") if index))
    try:
        lacks = [] if spec.level == "none" else [c.name for c in probe(spec.level).checks if not c.is_held]
        if lacks:
            reason = f"{spec.level} does not hold on {os.uname().nodename}: {', '.join(lacks)}"
        elif spec.device_kind != "CPU" and len(spec.devices) != spec.num_devices:
            reason = f"the cluster lent devices {spec.devices}, {spec.num_devices} were asked for"
        else:
            task = read_task(spec.task_folder)
            if task.digest == spec.task_digest:
                return run_job(spec, task).to_json()
            reason = (
                f"{spec.task_folder} is not what the supervisor read: it changed, or the disk is another one"
            )
    except (OSError, TimeoutError) as error:
        reason = f"{type(error).__name__}: {error}"
    return Result(
        status=Status.INFRA_ERROR, reason=reason, seed=spec.seed, rung=spec.rung, run_key=spec.run_key, isolation=spec.label
    ).to_json()  # fmt: skip
