"""Local jobs: every job has one outcome of the right type, and nothing it started outlives it."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.jobs.api import Crashed, Done, Job, JobsFailed, Raised, Resources, TimedOut, values
from pretrain.jobs.pool import PoolConfig

# Jobs name functions of a module; a test file is none for the child, so the calls live in one beside it.
CALLS = '''
import os, signal, subprocess, sys, time
from pretrain.config import ConfigError

def square(x): return x * x
def where(): return os.getpid(), os.getppid(), os.environ.get("CUDA_VISIBLE_DEVICES"), sys.stdin.read()
def refuse(): raise ConfigError("rule one", "rule two")
def fail(): print("before"); raise KeyError("gone")
def leave(code): raise SystemExit(code)
def die(number): print("last words", flush=True); os.kill(os.getpid(), number)
def unpicklable(): return lambda: 1
def record(path, seconds):
    with open(path, "a") as file: file.write(f"start {time.monotonic()}\\n")
    time.sleep(seconds)
    with open(path, "a") as file: file.write(f"end {time.monotonic()}\\n")
def sleep(path, seconds):
    """Sleep, with a child in this group and one that left it; their ids go to `path`."""
    program = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
    inside = subprocess.Popen(program)
    outside = subprocess.Popen(program, start_new_session=True)
    with open(path, "w") as file: file.write(f"{os.getpid()} {inside.pid} {outside.pid}")
    time.sleep(seconds)
def orphan(path):
    """End, and leave a child behind."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(path, "w") as file: file.write(str(child.pid))
def deaf(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(path, "w") as file: file.write(str(os.getpid()))
    time.sleep(60)
def polite(path):
    def save(*_):
        with open(path, "w") as file: file.write("saved")
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    with open(path + ".ready", "w"): pass
    time.sleep(60)
'''


@pytest.fixture
def calls(tmp_path, monkeypatch):
    (tmp_path / "calls_of_the_pool_test.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    import calls_of_the_pool_test

    yield calls_of_the_pool_test
    del sys.modules["calls_of_the_pool_test"]


@pytest.fixture
def pool(tmp_path):
    return PoolConfig(num_cpus=2, grace_s=0.3).build(tmp_path / "jobs")


def is_alive(pid):
    """Alive and not a zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids, within_s=5.0):
    deadline_s = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def wait_for(path, within_s=20.0):
    deadline_s = time.monotonic() + within_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline_s, f"{path} was never written"
        time.sleep(0.02)
    return path.read_text()


def test_every_job_ends_as_one_outcome_of_its_type(calls, pool):
    jobs = [
        Job(name="square", function=calls.square, arguments=(7,)),
        Job(name="fail", function=calls.fail),
        Job(name="refuse", function=calls.refuse),
        Job(name="leave", function=calls.leave, arguments=(3,)),
        Job(name="killed", function=calls.die, arguments=(signal.SIGKILL,)),
        Job(name="lambda", function=calls.unpicklable),
        Job(name="where", function=calls.where),
    ]
    outcomes = {outcome.name: outcome for outcome in pool.run(jobs)}
    assert len(outcomes) == len(jobs)
    assert outcomes["square"] == Done(name="square", value=49, wall_s=outcomes["square"].wall_s)
    fail = outcomes["fail"]
    assert (type(fail), fail.exception, fail.message) == (Raised, "KeyError", "'gone'")
    assert "in fail" in fail.traceback
    assert fail.log_tail.startswith("before\n")
    assert outcomes["refuse"].faults == ("rule one", "rule two")
    assert outcomes["leave"].reason() == "raised SystemExit: 3"
    killed = outcomes["killed"]
    assert (type(killed), killed.exit_code, killed.log_tail) == (Crashed, -signal.SIGKILL, "last words\n")
    assert killed.reason() == "ended by signal 9"
    assert "must be picklable" in outcomes["lambda"].message
    pid, parent, _, standard_input = outcomes["where"].value
    assert (pid == os.getpid(), parent, standard_input) == (False, os.getpid(), "")


def test_a_timeout_asks_first_then_ends_the_whole_tree_and_only_that_job(calls, tmp_path):
    pool = PoolConfig(num_cpus=4, grace_s=1.0).build(tmp_path / "jobs")
    limit = Resources(timeout_s=3.0)
    jobs = [
        Job(name="slow", function=calls.sleep, arguments=(str(tmp_path / "slow"), 60), resources=limit),
        Job(name="polite", function=calls.polite, arguments=(str(tmp_path / "polite"),), resources=limit),
        Job(name="deaf", function=calls.deaf, arguments=(str(tmp_path / "deaf"),), resources=limit),
        Job(name="fast", function=calls.square, arguments=(2,)),
    ]
    outcomes = {outcome.name: outcome for outcome in pool.run(jobs)}
    assert outcomes.pop("fast").value == 4
    assert {(type(outcome), outcome.timeout_s) for outcome in outcomes.values()} == {(TimedOut, 3.0)}
    assert (tmp_path / "polite").read_text() == "saved"
    assert min(outcome.wall_s for outcome in outcomes.values()) > 3.0
    assert outcomes["deaf"].wall_s >= 4.0
    # A job, its child, its child in another session, and one that ignores SIGTERM.
    pids = f"{(tmp_path / 'slow').read_text()} {(tmp_path / 'deaf').read_text()}".split()
    assert len(pids) == 4
    assert all_gone(map(int, pids))


def test_a_job_that_ends_leaves_nothing_behind(calls, pool, tmp_path):
    (outcome,) = pool.run([Job(name="orphan", function=calls.orphan, arguments=(str(tmp_path / "pid"),))])
    assert isinstance(outcome, Done)
    assert all_gone([int((tmp_path / "pid").read_text())])


def test_closing_the_iterator_ends_what_runs_and_starts_nothing_more(calls, pool, tmp_path):
    jobs = [
        Job(name="first", function=calls.square, arguments=(1,)),
        Job(name="slow", function=calls.sleep, arguments=(str(tmp_path / "pids"), 60)),
        *(
            Job(name=f"later{i}", function=calls.sleep, arguments=(str(tmp_path / f"{i}"), 60))
            for i in range(3)
        ),
    ]
    running = pool.run(jobs)
    assert next(running).name == "first"
    pids = wait_for(tmp_path / "pids").split()
    running.close()
    assert all_gone(map(int, pids))
    assert not (tmp_path / "2").exists()


def test_jobs_die_with_a_parent_that_is_killed(calls, tmp_path):
    """SIGKILL gives the parent no chance to clean up: the jobs notice by themselves."""
    program = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        import calls_of_the_pool_test as calls
        from pretrain.jobs.api import Job
        from pretrain.jobs.pool import PoolConfig
        folder = Path(sys.argv[1])
        jobs = [Job(name="slow", function=calls.deaf, arguments=(str(folder / "pid"),))]
        list(PoolConfig(num_cpus=1).build(folder / "jobs").run(jobs))
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment) as parent:
        pid = int(wait_for(tmp_path / "pid"))
        assert is_alive(pid)
        parent.kill()
    assert all_gone([pid])


def overlap(paths):
    """The largest number of jobs that ran at the same time."""
    moments = []
    for path in paths:
        for line in path.read_text().splitlines():
            kind, time_s = line.split()
            moments.append((float(time_s), 1 if kind == "start" else -1))
    count = most = 0
    for _, change in sorted(moments):
        count += change
        most = max(most, count)
    return most


@pytest.mark.parametrize(
    ("config", "needs", "most"),
    [
        (PoolConfig(num_cpus=2), Resources(), 2),
        (PoolConfig(num_cpus=3), Resources(num_cpus=2), 1),
        (PoolConfig(num_cpus=4, memory_bytes=10), Resources(memory_bytes=6), 1),
    ],
    ids=["cpus", "wide jobs", "memory"],
)
def test_no_more_runs_at_once_than_there_is_room_for(calls, tmp_path, config, needs, most):
    paths = [tmp_path / f"times{i}" for i in range(3)]
    jobs = [
        Job(name=path.name, function=calls.record, arguments=(str(path), 0.2), resources=needs)
        for path in paths
    ]
    assert len(list(config.build(tmp_path / "jobs").run(jobs))) == 3
    assert overlap(paths) <= most


def test_a_device_has_one_holder_at_a_time(calls, tmp_path):
    pool = PoolConfig(num_cpus=4, devices=(3, 5)).build(tmp_path / "jobs")
    jobs = [Job(name="none", function=calls.where)]
    jobs += [Job(name=f"one{i}", function=calls.where, resources=Resources(num_devices=1)) for i in range(2)]
    jobs += [Job(name="both", function=calls.where, resources=Resources(num_devices=2))]
    seen = {outcome.name: outcome.value[2] for outcome in pool.run(jobs)}
    assert (seen["none"], seen["one0"], seen["one1"], seen["both"]) == ("", "3", "5", "3,5")


def test_values_come_in_the_order_of_the_jobs(calls, pool):
    jobs = [Job(name=f"square{i}", function=calls.square, arguments=(i,)) for i in range(4)]
    assert values(pool, jobs) == [0, 1, 4, 9]


def test_values_reports_all_failures_at_once(calls, pool):
    jobs = [
        Job(name="fail", function=calls.fail),
        Job(name="square", function=calls.square, arguments=(2,)),
        Job(name="leave", function=calls.leave, arguments=(3,)),
    ]
    with pytest.raises(
        JobsFailed, match="2 of 3 jobs failed: fail raised KeyError: 'gone'; leave raised SystemExit: 3"
    ):
        values(pool, jobs)
    # Bad input found inside a job is reported as bad input.
    with pytest.raises(ConfigError) as caught:
        values(pool, [*jobs, Job(name="refuse", function=calls.refuse)])
    assert caught.value.faults == ("rule one", "rule two")


def test_bad_requests_are_refused_before_anything_runs(calls, pool, tmp_path):
    job = Job(name="a", function=calls.record, arguments=(str(tmp_path / "ran"), 0))
    big = Job(name="b", function=calls.square, resources=Resources(num_cpus=3))
    for jobs, message in [
        ([job, job], "jobs that run together must have different names, got a twice"),
        ([job, big], "job b asks for num_cpus=3, the pool has 2"),
        (
            [job, Job(name="c", function=calls.square, resources=Resources(num_devices=1))],
            "num_devices=1, the pool has 0",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            pool.run(jobs)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="function and arguments must be picklable, got d"):
        list(pool.run([Job(name="d", function=lambda: 1)]))
    with pytest.raises(ConfigError, match="a job's name must be letters"):
        Job(name="../x", function=calls.square)
    with pytest.raises(ConfigError, match="timeout_s must be positive, got -1"):
        Resources(timeout_s=-1, num_cpus=1)
    with pytest.raises(ConfigError, match="devices must be different"):
        PoolConfig(devices=(1, 1))


def test_a_function_of_the_main_module_is_refused():
    def function():
        """Stands for one defined in a program."""

    function.__module__ = "__main__"
    with pytest.raises(ConfigError, match="must be importable"):
        Job(name="x", function=function)


def test_an_old_outcome_is_not_taken_for_a_new_one(calls, pool, tmp_path):
    (tmp_path / "jobs").mkdir()
    old = Done(name="killed", value="old", wall_s=0.0)
    (tmp_path / "jobs" / "killed.outcome").write_bytes(pickle.dumps(old))
    (outcome,) = pool.run([Job(name="killed", function=calls.die, arguments=(signal.SIGKILL,))])
    assert isinstance(outcome, Crashed)
