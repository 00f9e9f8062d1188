"""Candidates on other processes and machines: the same results, host faults repeated, nothing run where the jail does not hold."""

import dataclasses
import importlib

import pytest

from pretrain.jobs.api import Lost
from pretrain.jobs.pool import PoolConfig
from research_env.env import AIResearchEnv
from research_env.records import Status
from research_env.sandbox.ladder import probe
from research_env.schedule import CannotGoOn
from research_env.search.campaign import paired_gains
from research_env.worker import JobSpec, run_spec

DIFFS = ["", "no diff"] + [
    f"--- a/settings.py\n+++ b/settings.py\n@@ -5 +5 @@\n-WIDTH = 64\n+WIDTH = {width}\n"
    for width in (100, 128, "1 / 0")
]


def values(folder, isolation, jobs=None, resource="1xCPU"):
    with AIResearchEnv(
        codebase="planted", workdir=folder, sandbox=isolation, jobs=jobs, resource=resource
    ) as env:
        results = env.value_many(DIFFS)
        assert env.value_many(DIFFS)[0].cache_hit
        assert set(env.ledger.states().values()) == {"DONE"}
        assert not list((env.workdir / "sealed").iterdir())
        attempts = [key for key, _ in env.ledger.events("started")]
    kept = [
        (r.status, r.metric, r.artifact_digest, r.tree_digest, r.diff_digest, r.env_digest, r.run_key)
        for r in results
    ]
    return kept, len(attempts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetfulConfig:
    """A pool whose machines go away the first `num_losses` times."""

    num_losses: int

    def build(self, folder):
        return Forgetful(self.num_losses, PoolConfig(num_cpus=2).build(folder))


class Forgetful:
    def __init__(self, num_losses, pool):
        self._left, self._pool = num_losses, pool

    def run(self, jobs):
        jobs = list(jobs)
        if self._left:
            self._left -= 1
            return iter([Lost(name=job.name, wall_s=0.0, cause="the node went away") for job in jobs])
        return self._pool.run(jobs)


def test_processes_give_what_this_process_gives_digest_for_digest(tmp_path, isolation):
    here, there = values(tmp_path / "a", isolation), values(tmp_path / "b", isolation, PoolConfig(num_cpus=2))
    assert there == here
    assert [row[0] for row in here[0]] == [
        Status.OK, Status.PATCH_REJECTED, Status.OK, Status.OK, Status.RUN_CRASH,
    ]  # fmt: skip


def test_what_a_cluster_lost_is_run_again_and_never_blamed_on_the_idea(tmp_path, isolation):
    here, num_runs = values(tmp_path / "a", isolation)
    found, attempts = values(tmp_path / "b", isolation, ForgetfulConfig(num_losses=2))
    assert found == here
    assert attempts == 3 * num_runs
    with AIResearchEnv(
        codebase="planted", workdir=tmp_path / "c", sandbox=isolation, jobs=ForgetfulConfig(num_losses=3)
    ) as env:
        result = env.value("")
        assert result.status is Status.INFRA_ERROR
        assert result.reason == "preempted 3 times"


def test_a_fault_of_the_host_is_no_bad_gain_and_a_restart_tries_again(tmp_path, isolation):
    folder = tmp_path / "run"
    for jobs, num_results in ((ForgetfulConfig(num_losses=9), 2), (None, 2)):
        with AIResearchEnv(codebase="planted", workdir=folder, sandbox=isolation, jobs=jobs) as env:
            pair = (env.add(DIFFS[3]), env.add("", key="baseline"))
            if jobs is None:
                (found,) = paired_gains(env, *pair, range(1))
                assert abs(found - 0.08) < 0.12  # WIDTH = 128 is worth 0.08, the noise is 0.02 in each
            else:
                with pytest.raises(CannotGoOn, match="failed on a confirming seed: infra_error"):
                    paired_gains(env, *pair, range(1))
            results = list(env.ledger.results())
            assert len(results) == num_results
    assert {result.status for _, _, result in results} == {Status.OK}


def test_a_host_without_the_level_or_the_lent_devices_runs_nothing(tmp_path, isolation, monkeypatch):
    spec = JobSpec(
        run_key="k", name="n", task_folder=str(tmp_path / "nowhere"), task_digest="t", tree={}, env_digest="e", diff_digest="d", seed=0,
        rung=1.0, level=isolation.level, label="x", workdir=str(tmp_path), num_devices=2, device_kind="H100",
    )  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = run_spec(spec.to_json())
    assert found["status"] == "infra_error"
    assert found["reason"] == "the cluster lent devices (3,), 2 were asked for"
    broken = probe("unshare")
    lacking = dataclasses.replace(broken, checks=(dataclasses.replace(broken.checks[0], is_held=False),))
    monkeypatch.setattr("research_env.worker.probe", lambda level: lacking)
    found = run_spec(spec.to_json())
    assert f"{isolation.level} does not hold on" in found["reason"]
    assert broken.checks[0].name in found["reason"]


def test_a_codebase_that_changed_under_the_campaign_is_not_judged(tmp_path, isolation):
    with AIResearchEnv(
        codebase="planted", workdir=tmp_path, sandbox=isolation, jobs=PoolConfig(num_cpus=1)
    ) as env:
        evaluator = tmp_path / "codebases" / "planted" / "locked" / "evaluate.py"
        evaluator.write_text(evaluator.read_text().replace("BASE_LOSS = 3.0", "BASE_LOSS = 1.0"))
        result = env.value("")
    assert result.status is Status.INFRA_ERROR
    assert "is not what the supervisor read" in result.reason


def test_a_resource_that_only_the_cluster_has_is_not_refused_here(tmp_path, isolation):
    with AIResearchEnv(
        codebase="planted",
        workdir=tmp_path,
        sandbox=isolation,
        resource="8xH100",
        jobs=ForgetfulConfig(num_losses=9),
    ) as env:
        assert env.value("").status is Status.INFRA_ERROR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "module", "make"),
    [
        ("ray", "pretrain.jobs.on_ray", lambda module: module.RayJobsConfig(num_cpus=2)),
        (
            "submitit",
            "pretrain.jobs.on_slurm",
            lambda module: module.SlurmJobsConfig(cluster="local", poll_s=0.2),
        ),
    ],
)
def test_a_cluster_gives_what_this_process_gives(tmp_path, isolation, package, module, make):
    pytest.importorskip(package, reason=f"{package} is not installed")
    jobs = make(importlib.import_module(module))
    assert values(tmp_path / "b", isolation, jobs) == values(tmp_path / "a", isolation)
