"""Ray and SLURM keep the promises of the local pool: the same outcomes, and a lost machine is called lost.

Ray and submitit are the real packages. SLURM's own commands are played by small scripts that follow their
documented output, since no test machine has a cluster; submitit's "local" cluster runs beside them.
"""

import importlib.util
import os
import signal
import stat
import sys
import textwrap
import time

import pytest

from pretrain.config import ConfigError
from pretrain.jobs.api import Crashed, Done, Job, Lost, Raised, Resources, TimedOut

pytestmark = [
    pytest.mark.slow,
    # submitit's local executor drops the handle of a canceled process before that one has ended.
    pytest.mark.filterwarnings("ignore:subprocess [0-9]+ is still running:ResourceWarning"),
    # Ray forks its servers and replaces them at once (exec); jax warns of any fork once another file has used it.
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the [ray] extra")
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs the [slurm] extra"
)

CALLS = '''
import os, signal, subprocess, sys, time
from pathlib import Path

def square(x): return x * x
def fail(): raise KeyError("gone")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)
def lose_the_machine(path, state):
    """Stand for a machine that goes away: kill what runs this job (twice removed: pool, then worker)."""
    Path(path).write_text(state)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(120)
'''


@pytest.fixture
def calls(tmp_path, monkeypatch):
    (tmp_path / "calls_of_the_cluster_test.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    # Workers of Ray and submitit are programs of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    import calls_of_the_cluster_test

    yield calls_of_the_cluster_test
    del sys.modules["calls_of_the_cluster_test"]


def ray_jobs(folder):
    from pretrain.jobs.on_ray import RayJobsConfig

    return RayJobsConfig(num_cpus=2, grace_s=0.5).build(folder)


def slurm_jobs(folder, cluster="local"):
    from pretrain.jobs.on_slurm import SlurmJobsConfig

    config = SlurmJobsConfig(
        cluster=cluster, poll_s=0.2, grace_s=0.5, partition="p", options={"account": "a b"}
    )
    return config.build(folder)


FAKE_SLURM = '''#!{python}
"""sbatch, srun, sacct and scancel with a folder as the cluster."""
import os, re, shlex, signal, subprocess, sys
from pathlib import Path

state = Path({state!r})
command, arguments = Path(sys.argv[0]).name, sys.argv[1:]

if command == "sbatch":
    script = Path(arguments[0]).read_text()
    job = str(1000 + len(list(state.glob("*.script"))))
    (state / f"{{job}}.script").write_text(script)
    array = re.search("--array=0-([0-9]+)", script)
    for index in range(int(array.group(1)) + 1) if array else [None]:
        name = job if index is None else f"{{job}}_{{index}}"
        environment = dict(os.environ, SLURM_JOB_ID=name.replace("_", "7"), SLURM_PROCID="0", SLURM_NTASKS="1")
        if index is not None:
            environment.update(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=str(index))
        (state / f"{{name}}.state").write_text("RUNNING")
        runner = f"bash {{shlex.quote(arguments[0])}} && echo COMPLETED || echo FAILED"
        ended = f"end=$({{runner}}); test -e {{name}}.forced && mv {{name}}.forced {{name}}.state || echo $end > {{name}}.state"
        child = subprocess.Popen(["bash", "-c", ended], env=environment, cwd=state, start_new_session=True,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (state / f"{{name}}.pid").write_text(str(child.pid))
    print(f"Submitted batch job {{job}}")
elif command == "srun":
    words = {{"%j": os.environ["SLURM_JOB_ID"], "%t": "0", "%A": os.environ.get("SLURM_ARRAY_JOB_ID", ""),
             "%a": os.environ.get("SLURM_ARRAY_TASK_ID", "")}}
    paths = []
    for option in ("--output", "--error"):
        path = arguments[arguments.index(option) + 1]
        for mark, word in words.items():
            path = path.replace(mark, word)
        paths.append(open(path, "ab"))
    start = next(i for i, a in enumerate(arguments) if "python" in a.rpartition("/")[2])
    sys.exit(subprocess.run(arguments[start:], stdout=paths[0], stderr=paths[1]).returncode)
elif command == "sacct":
    print("JobID|State|NodeList")
    for path in sorted(state.glob("*.state")):
        print(f"{{path.stem}}|{{path.read_text().strip()}}|node1")
        print(f"{{path.stem}}.batch|{{path.read_text().strip()}}|node1")
elif command == "scancel":
    os.killpg(int((state / f"{{arguments[0]}}.pid").read_text()), signal.SIGKILL)
    (state / f"{{arguments[0]}}.state").write_text("CANCELLED by 0")
'''


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """A folder of states; what a test finds in `<job>.forced` becomes the end of that job."""
    state, programs = tmp_path / "cluster", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel"):
        path = programs / name
        path.write_text(FAKE_SLURM.format(python=sys.executable, state=str(state)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return state


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, within_s=60.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(
    params=[
        pytest.param("ray", marks=needs_ray),
        pytest.param("local", marks=needs_submitit),
        pytest.param("slurm", marks=needs_submitit),
    ]
)
def cluster(request, tmp_path):
    if request.param == "slurm":
        request.getfixturevalue("fake_slurm")
    return (
        ray_jobs(tmp_path / "jobs")
        if request.param == "ray"
        else slurm_jobs(tmp_path / "jobs", request.param)
    )


def test_every_job_ends_as_one_outcome_of_its_type(calls, cluster, tmp_path):
    jobs = [
        Job(name="one", function=calls.square, arguments=(3,)),
        Job(name="two", function=calls.square, arguments=(4,)),
        Job(name="fail", function=calls.fail),
        Job(name="die", function=calls.die),
        Job(
            name="slow",
            function=calls.sleep,
            arguments=(str(tmp_path / "pid"),),
            resources=Resources(timeout_s=3.0, memory_bytes=2**20),
        ),
    ]
    outcomes = {outcome.name: outcome for outcome in cluster.run(jobs)}
    assert len(outcomes) == len(jobs)
    assert (type(outcomes["one"]), outcomes["one"].value, outcomes["two"].value) == (Done, 9, 16)
    assert (type(outcomes["fail"]), outcomes["fail"].exception) == (Raised, "KeyError")
    assert (type(outcomes["die"]), outcomes["die"].exit_code) == (Crashed, -signal.SIGKILL)
    assert (type(outcomes["slow"]), outcomes["slow"].timeout_s) == (TimedOut, 3.0)
    wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


@pytest.fixture(params=["heard", "ignored"])
def interrupts(request):
    """Behind a shell's `&` a program ignores SIGINT, and what it starts would too."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if request.param == "ignored" else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_closing_the_iterator_ends_what_runs(calls, cluster, tmp_path):
    jobs = [
        Job(name="fast", function=calls.square, arguments=(3,)),
        Job(name="slow", function=calls.sleep, arguments=(str(tmp_path / "pid"),)),
    ]
    running = cluster.run(jobs)
    assert next(running).name == "fast"
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    running.close()
    wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


@needs_ray
def test_a_ray_worker_that_goes_away_is_lost(calls, tmp_path):
    job = Job(name="x", function=calls.lose_the_machine, arguments=(str(tmp_path / "state"), ""))
    (outcome,) = ray_jobs(tmp_path / "jobs").run([job])
    assert isinstance(outcome, Lost)
    assert outcome.reason().startswith("was lost: ")


@needs_ray
def test_ray_refuses_what_no_machine_has(calls, tmp_path):
    job = Job(name="x", function=calls.square, resources=Resources(num_cpus=3))
    with pytest.raises(ConfigError, match="job x asks for num_cpus=3, the cluster has 2"):
        list(ray_jobs(tmp_path / "jobs").run([job]))


@needs_submitit
@pytest.mark.parametrize(
    ("state", "kind"),
    [("NODE_FAIL", Lost), ("CANCELLED by 1000", Lost), ("OUT_OF_MEMORY", Crashed), ("TIMEOUT", TimedOut)],
)
def test_what_slurm_ends_is_told_by_its_state(calls, fake_slurm, tmp_path, monkeypatch, state, kind):
    import submitit

    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # shared disks are slow, this one is not
    job = Job(name="x", function=calls.lose_the_machine, arguments=(str(fake_slurm / "1000.forced"), state))
    (outcome,) = slurm_jobs(tmp_path / "jobs", "slurm").run([job])
    assert type(outcome) is kind
    if kind is Lost:
        assert outcome.reason().startswith(f"was lost: SLURM says {state.split()[0]}")


@needs_submitit
def test_a_preempted_job_that_is_never_queued_again_is_lost(calls, fake_slurm, tmp_path, monkeypatch):
    from pretrain.jobs import on_slurm

    monkeypatch.setattr(on_slurm, "_PREEMPTED_S", 1.0)
    path = str(fake_slurm / "1000.forced")
    job = Job(name="x", function=calls.lose_the_machine, arguments=(path, "PREEMPTED"))
    (outcome,) = slurm_jobs(tmp_path / "jobs", "slurm").run([job])
    assert outcome.reason() == "was lost: SLURM preempted it and did not queue it again"


@needs_submitit
def test_the_sbatch_file_asks_for_what_the_job_needs(calls, fake_slurm, tmp_path):
    resources = Resources(num_cpus=3, num_devices=2, memory_bytes=5 * 2**30, timeout_s=3600)
    jobs = [Job(name=f"x{i}", function=calls.square, arguments=(i,), resources=resources) for i in range(2)]
    jobs += [Job(name="y", function=calls.square, arguments=(9,))]
    outcomes = {outcome.name: outcome.value for outcome in slurm_jobs(tmp_path / "jobs", "slurm").run(jobs)}
    assert outcomes == {"x0": 0, "x1": 1, "y": 81}
    array, single = ((fake_slurm / f"{job}.script").read_text() for job in (1000, 1001))
    for line in textwrap.dedent(
        """
        --account='a b'
        --array=0-1%2
        --cpus-per-task=3
        --gpus-per-node=2
        --mem=5GB
        --partition=p
        --time=63
        """
    ).split("\n")[1:-1]:
        assert f"#SBATCH {line}\n" in array
    assert "--array" not in single


@needs_submitit
def test_slurm_is_refused_where_there_is_none(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="jobs on SLURM must be started where sbatch and srun are"):
        list(
            slurm_jobs(tmp_path / "jobs", "slurm").run([Job(name="x", function=calls.square, arguments=(1,))])
        )


def test_bad_settings_are_refused():
    if importlib.util.find_spec("ray"):
        from pretrain.jobs.on_ray import RayJobsConfig

        with pytest.raises(ConfigError, match="num_cpus is for a cluster started here"):
            RayJobsConfig(address="auto", num_cpus=2)
    if importlib.util.find_spec("submitit"):
        from pretrain.jobs.on_slurm import SlurmJobsConfig

        with pytest.raises(ConfigError, match="poll_s must be positive, got 0"):
            SlurmJobsConfig(poll_s=0)
