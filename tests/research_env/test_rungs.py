"""Successive halving across programs: cheap, close to the best, exact on replay, and a kill is neither failure nor metric."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ConfigError
from research_env.choose import Halving
from research_env.dashboards.page import read_arms
from research_env.env import AIResearchEnv
from research_env.main import main
from research_env.records import Status
from research_env.search.rungs import HalvingConfig, Rungs

FRACTIONS = (1 / 27, 1 / 9, 1 / 3, 1.0)
# A loss that falls with the run's length; SLOW starts behind everyone and ends ahead of everyone.
TRAIN = """import json, os
from settings import GAIN, SLOW
share = float(os.environ["RUNG"])
json.dump([2.0 - GAIN + (0.1 + SLOW) * (1 / share - 1) - SLOW, share], open(os.environ["OUT"] + "/loss.json", "w"))
"""
TASK = """metric = "loss"
editable = ["settings.py"]
artifact = ["loss.json"]
rungs = [0.1111111111111111, 0.3333333333333333, 1.0]
"""
EVAL = """import json, os
loss, share = json.load(open(os.environ["ARTIFACT"] + "/loss.json"))
json.dump({"metric": loss, "extra": {"share": share}}, open(os.environ["RESULT"], "w"))
"""


@pytest.fixture
def codebase(tmp_path):
    """A folder whose constants decide the loss at each length."""
    folder = tmp_path / "code"
    (folder / "locked").mkdir(parents=True)
    (folder / "settings.py").write_text("GAIN = 0.01\nSLOW = 0.0\n")
    (folder / "train.py").write_text(TRAIN)
    (folder / "locked" / "evaluate.py").write_text(EVAL)
    (folder / "task.toml").write_text(TASK)
    (folder / "run.sh").write_text('exec "$PYTHON" train.py\n')
    (folder / "eval.sh").write_text('exec "$PYTHON" -I locked/evaluate.py\n')
    return str(folder)


def changed(gain, slow=0.0):
    return f"--- a/settings.py\n+++ b/settings.py\n@@ -1,2 +1,2 @@\n-GAIN = 0.01\n-SLOW = 0.0\n+GAIN = {gain}\n+SLOW = {slow}\n"


def open_env(folder, codebase, isolation):
    return AIResearchEnv(codebase=codebase, workdir=folder, sandbox=isolation)


def test_only_the_best_third_of_each_rung_runs_on(tmp_path, codebase, isolation):
    diffs = [changed(0.1 * number) for number in range(9)] + ["no diff", changed("1 / 0")]
    with open_env(tmp_path / "run", codebase, isolation) as env:
        rungs = Rungs(env, HalvingConfig(survivor_share=0.0), "arm", 0)
        candidates = [env.add(text) for text in diffs]
        results = rungs.evaluate(candidates)
        again = Rungs(env, HalvingConfig(survivor_share=0.0), "arm", 0).evaluate(candidates)
        lengths = sorted(
            round(result.rung, 3) for _, _, result in env.ledger.results() if result.metric is not None
        )
        spent = env.ledger.spent()["runs"]
    statuses = [result.status for result in results]
    assert statuses == [Status.EARLY_KILLED] * 8 + [Status.OK, Status.PATCH_REJECTED, Status.RUN_CRASH]
    assert lengths == [0.111] * 9 + [0.333] * 3 + [1.0]
    assert spent == 9 + 3 + 1 + 1  # and the one that crashed
    assert results[8].extra["share"] == 1.0
    assert results[0].metric is None
    assert results[0].reason == "ended at rung 0.111 of the budget: 9 of 9 there"
    assert [(r.status, r.metric, r.reason) for r in again] == [
        (r.status, r.metric, r.reason) for r in results
    ]
    assert results[8].device_s == pytest.approx(again[8].device_s)


def test_a_survivor_shows_what_an_early_end_would_have_cost(tmp_path, codebase, isolation):
    diffs = [changed(0.1 * number) for number in range(4)] + [changed(0.5, slow=0.6)]
    with open_env(tmp_path / "run", codebase, isolation) as env:
        candidates = [env.add(text) for text in diffs]
        rungs = Rungs(env, HalvingConfig(survivor_share=0.999), "arm", 0)
        results = rungs.evaluate(candidates)
        assert candidates[4].node.id in rungs.survivors
        events = env.ledger.events("survivor")
    assert min(results, key=lambda result: result.metric) is results[4]
    assert {node for node, _ in events} == rungs.survivors
    assert json.loads(events[0][1])["arm"] == "arm"


def test_27_programs_cost_four_full_runs_and_a_restart_costs_nothing(tmp_path, codebase, isolation):
    """Every rung is a run from the start and is counted whole: 27 / 27 + 9 / 9 + 3 / 3 + 1, which is 14.8 % of 27."""
    toml = Path(codebase) / "task.toml"
    toml.write_text(toml.read_text().replace("rungs = [", "rungs = [0.037037037037037035, "))
    for _ in range(2):
        with open_env(tmp_path / "run", codebase, isolation) as env:
            candidates = [env.add(changed(0.01 * number)) for number in range(27)]
            results = Rungs(env, HalvingConfig(survivor_share=0.0), "arm", 0).evaluate(candidates)
            lengths = [
                result.rung for _, purpose, result in env.ledger.results() if result.metric is not None
            ]
        assert sum(lengths) == pytest.approx(4.0)
        assert len(lengths) == 27 + 9 + 3 + 1
        assert [result.status for result in results].count(Status.OK) == 1
        assert results[26].status is Status.OK


def test_who_is_only_measured_takes_nobodys_place(tmp_path, codebase, isolation):
    """The slow starter is ended, and is the best of all at every later rung; with or without it the same program climbs."""
    diffs = [changed(0.1 * number) for number in range(8)] + [changed(1.0, slow=0.2)]
    with open_env(tmp_path / "run", codebase, isolation) as env:
        candidates = [env.add(text) for text in diffs]
        num_seen = 0
        for seed in range(40):  # what ran once is in the ledger
            rungs = Rungs(env, HalvingConfig(survivor_share=0.2), f"arm{seed}", seed)
            results = rungs.evaluate(candidates)
            assert results[7].status is Status.OK, "the best at the first rung stays the best of who climbs"
            if candidates[8].node.id in rungs.survivors:
                assert results[8].better_than(results[7])
                num_seen += 1
    assert num_seen > 3


def test_a_task_without_rungs_is_refused(tmp_path, isolation):
    with (
        open_env(tmp_path / "run", "planted", isolation) as env,
        pytest.raises(ConfigError, match="halving needs a task with rungs"),
    ):
        Rungs(env, HalvingConfig(), "arm", 0)


@pytest.mark.parametrize("fields", [{"eta": 1}, {"survivor_share": 1.0}])
def test_faults_of_halving_are_named(fields):
    with pytest.raises(ConfigError, match="halving"):
        HalvingConfig(**fields)


def test_a_campaign_with_halving_ends_resumes_and_shows_its_kills(tmp_path, codebase, isolation):
    argv = [
        "--config", "configs/research_env/smoke_halving.py", f"codebase={codebase}", f"workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(argv) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    page = (tmp_path / "run" / "index.html").read_text()
    assert main(argv) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == first
    for arm in first["arms"]:
        assert arm["told"] == 6
        assert arm["early_killed"] > 0
        assert arm["ok"] + arm["early_killed"] <= 6
    assert "early_killed" in page
    with AIResearchEnv(codebase=codebase, workdir=tmp_path / "run", sandbox=isolation) as env:
        arms = read_arms(env.ledger)
    kills = [result for items in arms.values() for _, result in items if result.status is Status.EARLY_KILLED]
    assert len(kills) == sum(arm["early_killed"] for arm in first["arms"])


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.2])
def test_halving_costs_at_most_15_percent_and_less_than_a_sigma(spread):
    """200 campaigns of 81 power-law curves c + a s^-b of the share s; c is 2.8 with deviation 0.02, a and b vary by `spread`.

    Regret is the true final loss of who is chosen above that of the best program. sigma0 is 0.004. Measured: cost 14.8 %, regret
    0.0008, 0.0014 and 0.0009 at the three spreads (standard error 0.0002); full runs of all 81 have 0.0008, 0.0005 and 0.0003.
    All 81 are judged at once and none is a survivor, which is the best case; each rung is paid for whole.
    """
    sigma = 0.004
    rng = np.random.default_rng(0)
    costs, regrets = [], []
    for _ in range(200):
        c, a, b = (
            rng.normal(2.8, 0.02, 81),
            rng.normal(0.2, 0.2 * spread, 81),
            rng.normal(0.3, 0.3 * spread, 81),
        )
        true = c + a
        halving, cost, queue, top = Halving(4), 0.0, [(str(i), 0) for i in range(81)], {}
        while queue:
            for name, rung in queue:
                i = int(name)
                score = c[i] + a[i] * FRACTIONS[rung] ** -b[i] + rng.normal(0, sigma)
                cost += FRACTIONS[rung]
                halving.tell(name, rung, -score)
                if rung == 3:
                    top[i] = score
            queue = halving.climbers()
        costs.append(cost / 81)
        regrets.append(true[min(top, key=lambda i: top[i])] - true.min())
    assert max(costs) <= 0.15
    assert np.mean(regrets) < sigma
