"""Laws of the environment on the planted task: one status a program, one run a tree, nothing lost, nothing forged."""

import os
import re
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from research_env.env import AIResearchEnv
from research_env.ledger import Ledger
from research_env.records import Resource, Result, Status
from research_env.sandbox.ladder import SandboxConfig, probe
from research_env.sandbox.run import scratch_root
from research_env.schedule import Budget, Devices, OutOfBudget
from research_env.search.researcher import Researcher
from research_env.task import open_task, read_task
from research_env.worker import campaign_prefix, read_metric

BETTER = "--- a/settings.py\n+++ b/settings.py\n@@ -5 +5 @@\n-WIDTH = 64\n+WIDTH = 128\n"


@pytest.fixture(scope="module")
def isolation():
    """The best level of this host: other files take unshare first."""
    for level in ("bwrap", "unshare", "landlock"):
        found = probe(level)
        if found.is_held:
            return found
    pytest.skip("no level of isolation holds on this host: " + str(found.checks))


@pytest.fixture
def env(tmp_path, isolation):
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "run", sandbox=isolation) as env:
        yield env


def test_the_baseline_has_a_metric_and_costs_one_run(env):
    first, second = env.value(""), env.value("")
    assert first.status is Status.OK
    assert first.extra["true_loss"] == 3.0
    assert (first.metric, first.cache_hit, second.metric, second.cache_hit) == (
        second.metric,
        False,
        first.metric,
        True,
    )
    assert env.ledger.spent()["runs"] == 1


def test_a_planted_improvement_is_seen_and_equal_trees_run_once(env):
    results = env.value_many([BETTER, BETTER.replace("@@ -5 +5 @@", "@@ -4,2 +4,2 @@\n DECAY = 0.01"), ""])
    assert results[0].extra["true_loss"] == pytest.approx(2.92)
    assert results[1].metric == results[0].metric
    assert [result.cache_hit for result in results] == [False, True, False]


def test_the_thesis_loop_in_ten_lines(env):
    researcher = Researcher(env, seed=0)
    for _ in range(4):
        idea = researcher.ideator(env.context())
        diff = researcher.executor(idea)
        value = env.value(diff)
        researcher.learn(idea, diff, value)
    assert researcher.best is not None
    assert len(env.context().history) == 4


def test_the_script_of_the_guide_runs_as_it_stands(tmp_path, isolation, monkeypatch, capsys):
    """A user's own script: imports, ten lines, nothing else; it needs a jail, so it is not among the other guides' blocks."""
    guide = Path(__file__).parents[2] / "docs" / "research.md"
    (script,) = re.findall(r"```py\n(.*?)```", guide.read_text(), re.DOTALL)
    lines = [line for line in script.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(script, str(guide), "exec"), names)
    with names["env"] as env:
        assert len(env.context().history) == len(names["researcher"].history) == 3
    assert "status=<Status.OK" in capsys.readouterr().out
    assert (tmp_path / "runs" / "research" / "planted" / "ledger.sqlite").is_file()


def test_bad_diffs_are_results_with_a_reason(env):
    results = env.value_many(
        [
            "no diff",
            BETTER.replace("64", "65"),
            BETTER.replace("settings.py", "run.sh"),
            BETTER.replace("128", "("),
        ]
    )
    assert [result.status for result in results] == [
        Status.PATCH_REJECTED, Status.PATCH_FAILED, Status.PATCH_REJECTED, Status.BUILD_FAILED,
    ]  # fmt: skip
    assert all(result.reason and result.metric is None for result in results)


def test_a_budget_is_checked_before_the_spend(tmp_path, isolation):
    with AIResearchEnv(
        codebase="planted", workdir=tmp_path / "run", sandbox=isolation, budget=Budget(max_runs=1)
    ) as env:
        env.value("")
        env.value("")
        with pytest.raises(OutOfBudget, match="max_runs=1"):
            env.value(BETTER)
        assert env.ledger.spent()["runs"] == 1


def test_what_was_promised_before_a_kill_counts_and_what_ran_stays_free(tmp_path, isolation):
    diffs = [BETTER.replace("128", str(number)) for number in range(100, 104)]
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "run", sandbox=isolation) as env:
        for text in diffs[:2]:  # what a kill between the intents and the first start leaves
            node = env.add(text).node
            env.ledger.enqueue(
                env.run_key(node.tree_digest, env.screen_seed, 1.0), node=node.id, purpose="screen", tree=node.tree_digest,
                seed=env.screen_seed, rung=1.0, resource="1xCPU",
            )  # fmt: skip
    with AIResearchEnv(
        codebase="planted", workdir=tmp_path / "run", sandbox=isolation, budget=Budget(max_runs=2)
    ) as env:
        with pytest.raises(OutOfBudget, match="2 are done or promised"):
            env.value_many(diffs[2:])
        first = env.value_many(diffs[:2])
        assert env.ledger.spent()["runs"] == 2
    used_up = Budget(max_device_s=1e-9)
    with AIResearchEnv(
        codebase="planted", workdir=tmp_path / "run", sandbox=isolation, budget=used_up
    ) as env:
        assert [result.metric for result in env.value_many(diffs[:2])] == [result.metric for result in first]
        with pytest.raises(OutOfBudget, match="max_device_s"):
            env.value("")


HUGE = "1" + "0" * 400


@pytest.mark.parametrize("text", ['{"metric": HUGE}', "HUGE", '{"metric": 1, "extra": {"a": HUGE, "b": 2}}'])
def test_a_whole_number_too_large_for_a_float_is_no_metric(tmp_path, text):
    file = tmp_path / "result.json"
    file.write_text(text.replace("HUGE", HUGE))
    status, reason, metric, extra = read_metric(file, open_task("planted", tmp_path))
    if "extra" in text:
        assert (status, metric, extra) == (Status.OK, 1.0, {"b": 2.0})
    else:
        assert (status, metric) == (Status.METRIC_INVALID, None)
        assert len(reason) < 100


def test_a_second_supervisor_is_refused_and_a_restart_finds_the_rows(tmp_path, isolation):
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "run", sandbox=isolation) as env:
        metric = env.value("").metric
        with pytest.raises(ConfigError, match="in use by another supervisor"):
            Ledger(env.ledger.path)
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "run", sandbox=isolation) as env:
        again = env.value("")
        assert (again.metric, again.cache_hit) == (metric, True)


def test_rerun_in_another_folder_is_bit_equal(tmp_path, env, isolation):
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "other", sandbox=isolation) as other:
        assert other.value(BETTER).metric == env.value(BETTER).metric


def test_parallel_equals_series(tmp_path, isolation):
    diffs = [BETTER.replace("128", str(number)) for number in range(100, 108)]
    metrics = []
    for cpus in ((0,), (0, 1)):
        devices = Devices({"CPU": sorted(os.sched_getaffinity(0))[: len(cpus)]})
        with AIResearchEnv(
            codebase="planted", workdir=tmp_path / str(len(cpus)), sandbox=isolation, devices=devices
        ) as env:
            metrics.append([(r.metric, r.artifact_digest, r.tree_digest) for r in env.value_many(diffs)])
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_eight_trainings_on_two_cores_equal_the_series_and_a_rerun_digest_for_digest(tmp_path, isolation):
    """The byte language model of `toy`, short: jax, threads and the compile cache are where bits could differ."""
    rates = [f"{0.001 * number:.3f}" for number in range(5, 12)]
    head = "--- a/train.py\n+++ b/train.py\n@@ -1,1 +1,1 @@\n-LEARNING_RATE = 0.004\n+LEARNING_RATE = "
    found = []
    for name, num_cores in (("series", 1), ("again", 1), ("parallel", 2)):
        devices = Devices({"CPU": sorted(os.sched_getaffinity(0))[:num_cores]})
        with AIResearchEnv(
            codebase="toy", workdir=tmp_path / name, sandbox=isolation, devices=devices
        ) as env:
            results = env.value_many(["", *(head + rate + "\n" for rate in rates)], rung=env.task.rungs[0])
        assert all(result.status is Status.OK for result in results), results
        found.append([(r.metric, r.artifact_digest, r.tree_digest) for r in results])
    assert len(set(found[0])) == 8
    assert found[0] == found[1] == found[2]


def test_nothing_is_left_on_the_host(env):
    env.value(BETTER)
    assert not list(scratch_root().glob(campaign_prefix(env.workdir) + "*"))
    assert not list((env.workdir / "sealed").iterdir())


def test_any_folder_with_run_and_eval_is_a_codebase(tmp_path, isolation):
    code = tmp_path / "code"
    code.mkdir()
    (code / "answer.txt").write_text("3\n")
    (code / "run.sh").write_text('cp answer.txt "$OUT"/answer.txt\n')
    (code / "eval.sh").write_text('read x < "$ARTIFACT/answer.txt"; echo "{\\"metric\\": $x}" > "$RESULT"\n')
    with AIResearchEnv(codebase=str(code), workdir=tmp_path / "run", sandbox=isolation) as env:
        assert env.value("").metric == 3.0
        changed = env.value("--- a/answer.txt\n+++ b/answer.txt\n@@ -1 +1 @@\n-3\n+2\n")
        assert changed.metric == 2.0
        nonsense = env.value("--- a/answer.txt\n+++ b/answer.txt\n@@ -1 +1 @@\n-3\n+NaN\n")
        assert nonsense.status is Status.METRIC_INVALID
        locked = env.value("--- a/eval.sh\n+++ b/eval.sh\n@@ -1 +1 @@\n-x\n+y\n")
        assert locked.status is Status.PATCH_REJECTED


def test_faults_of_a_codebase_are_named_all_at_once(tmp_path):
    with pytest.raises(
        ConfigError, match="must be a folder or one of grpo_math, planted, pretrain_tiny, template, toy"
    ):
        open_task("nanogpt", tmp_path)
    (tmp_path / "task.toml").write_text('metrik = "x"\nservers = true\nrungs = [0.5]\n')
    with pytest.raises(ConfigError, match="needs run.sh") as caught:
        read_task(tmp_path)
    assert len(caught.value.faults) == 2
    for name in ("run.sh", "eval.sh"):
        (tmp_path / name).write_text("true\n")
    with pytest.raises(ConfigError) as caught:
        read_task(tmp_path)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("data", [".", "..", "locked", "locked/sub", "final", "data/../locked", "link"])
def test_data_that_a_run_sees_hold_nothing_of_the_judge(tmp_path, data):
    code = tmp_path / "code"
    for name in ("locked/sub", "final", "data"):
        (code / name).mkdir(parents=True)
    (code / "link").symlink_to("locked")
    for name in ("run.sh", "eval.sh", "data/held_out.txt"):
        (code / name).write_text("true\n")
    (code / "task.toml").write_text(f'data = "{data}"\n')
    with pytest.raises(ConfigError, match="data must"):
        read_task(code)
    (code / "link").unlink()
    (code / "task.toml").write_text('private = ["data/held_out.txt"]\n')
    with pytest.raises(ConfigError, match="cannot hold the private data/held_out.txt"):
        read_task(code)
    (code / "task.toml").write_text("")
    assert read_task(code).data == str(code / "data")


def test_a_short_run_is_no_best_and_a_budget_is_a_share(env):
    short = env.value(BETTER, rung=0.5)
    assert short.metric is not None
    assert env.context().history == ()
    full = env.value(BETTER)
    assert env.context().best == full
    for rung in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="rung must be"):
            env.value(BETTER, rung=rung)


@pytest.mark.parametrize("text", ["8H100", "x", "0xCPU", "-1xCPU", "1x", ""])
def test_resource_strings_are_parsed_or_refused(text):
    assert str(Resource.parse("8xH100")) == "8xH100"
    with pytest.raises(ConfigError, match="count x kind"):
        Resource.parse(text)


def test_a_resource_that_the_host_lacks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not fit this host"):
        AIResearchEnv(codebase="planted", resource="8xH100", workdir=tmp_path)


def test_a_floor_fails_closed():
    with pytest.raises(ConfigError, match="sandbox.level"):
        SandboxConfig(level="docker")


def test_results_survive_json():
    result = Result(status=Status.OK, metric=1.5, curve=((1, 2.0),), extra={"a": 1.0})
    assert Result.from_json(result.to_json()) == result
