"""The tasks that come along, the template a user starts from, and repositories that are converted."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from research_env.env import AIResearchEnv
from research_env.records import Status
from research_env.task import built_in_tasks, open_task
from research_env.tasks.autoresearch import adapt

GUIDE = Path(adapt.__file__).parent.parent / "template" / "GUIDE.md"


@pytest.mark.parametrize("name", built_in_tasks())
def test_every_task_reads_and_keeps_its_evaluator_and_validation_data_from_runs(name, tmp_path):
    task = open_task(name, tmp_path)
    assert "eval.sh" in task.private
    assert not [path for path in task.baseline if "locked/" in path or "validation" in path]
    assert task.policy.refusal("run.sh") is not None
    assert open_task(name, tmp_path / "again").digest == task.digest


def test_the_template_runs_and_a_better_degree_is_better(tmp_path, isolation):
    better = "--- a/settings.py\n+++ b/settings.py\n@@ -5 +5 @@\n-DEGREE = 1\n+DEGREE = 3\n"
    with AIResearchEnv(codebase="template", workdir=tmp_path, sandbox=isolation) as env:
        baseline, changed = env.value_many(["", better])
    assert changed.metric < baseline.metric
    assert len(baseline.curve) == 4


def test_the_guide_names_what_is_there():
    text = GUIDE.read_text()
    for path in re.findall(r"`tasks/([a-z_/.]+)`", text):
        assert (GUIDE.parent.parent / path).exists(), path
    assert len(text.splitlines()) < 60


TRAIN = """
import json, os
import numpy as np
import prepare

def load(folder):
    table = np.load(folder + "/model.npz")["table"]
    return lambda tokens_BT: table[tokens_BT]

if __name__ == "__main__":
    data = np.fromfile(os.environ["DATA"] + "/train.bin", np.uint8)
    counts = np.full((prepare.VOCAB, prepare.VOCAB), SMOOTH, float)
    np.add.at(counts, (data[:-1], data[1:]), 1)
    np.savez(os.environ["OUT"] + "/model.npz", table=np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32))
    print("val_bpb: 0.0001")
"""


def autoresearch_repository(folder, smooth="1.0"):
    """A bigram model on a periodic text, whose training file prints a metric of its own."""
    (folder / "tokens").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for path in ("tokens/train.bin", "val.bin"):
        (np.arange(4096) % 8 + (rng.random(4096) < 0.1)).astype(np.uint8).tofile(folder / path)
    (folder / "prepare.py").write_text("VOCAB = 16\n")
    (folder / "train.py").write_text(TRAIN.replace("SMOOTH", smooth))
    return [
        "validation=val.bin",
        "dtype=uint8",
        "vocab=16",
        "bytes=4096",
        "row=64",
        "data=tokens",
        "cpu_s=20",
    ]


def test_an_autoresearch_repository_is_scored_behind_the_lock(tmp_path, isolation):
    options = autoresearch_repository(tmp_path / "repo")
    assert adapt.main([str(tmp_path / "repo"), str(tmp_path / "code"), *options]) == 0
    with AIResearchEnv(codebase=str(tmp_path / "code"), workdir=tmp_path / "run", sandbox=isolation) as env:
        assert not [path for path in env.task.baseline if "val" in path]
        baseline = env.value("")
        assert baseline.status is Status.OK, baseline.reason + baseline.log_tail
        assert 0.5 < baseline.metric < 1.5  # the entropy of the noise, not what was printed
        locked = env.value("--- a/prepare.py\n+++ b/prepare.py\n@@ -1 +1 @@\n-VOCAB = 16\n+VOCAB = 17\n")
    assert locked.status is Status.PATCH_REJECTED


def test_faults_of_a_conversion_are_named_and_nothing_is_written(tmp_path, capsys):
    options = autoresearch_repository(tmp_path / "repo")
    (tmp_path / "repo" / "train.py").write_text("print('val_bpb: 0.1')\n")
    assert adapt.main([str(tmp_path / "repo"), str(tmp_path / "code"), *options[1:], "vocab=x"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "must define load(folder)" in errors[-1]
    assert not (tmp_path / "code").exists()


# --- reinforcement learning on checked answers

LEAVES = """--- a/train.py
+++ b/train.py
@@ -1,1 +1,1 @@
-WARMUP_STEPS = 250  # supervised, on the solved problems
+WARMUP_STEPS = 1
@@ -9,2 +9,2 @@
-    weights.save(os.path.join(os.environ["OUT"], "model.safetensors"), params)
+    weights.save(os.environ["OUT"] + "/model.safetensors", {arrays})
 
"""


@pytest.fixture
def grpo(tmp_path, monkeypatch):
    """The codebase of `grpo_math` as modules: (model, grpo, train)."""
    task = open_task("grpo_math", tmp_path)
    monkeypatch.syspath_prepend(task.folder)
    monkeypatch.setenv("RUNG", "1.0")
    names = ("model", "weights", "grpo", "train")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield [importlib.import_module(name) for name in ("model", "grpo", "train")]
    for name in names:
        sys.modules.pop(name, None)


def test_the_gradient_of_grpo_math_is_that_of_the_clipped_surrogate(grpo):
    model, rule, _ = grpo
    rng = np.random.default_rng(0)
    params = {name: value.astype(np.float64) for name, value in model.init(rng).items()}
    tokens_BT, logp_BA = model.answer(params, ["12+34=", "99+01=", "05+50="], rng)
    advantage_B = np.array([1.5, -1.0, 0.5])
    old_BA = logp_BA.astype(np.float64) + np.array([[0.0, 0.1, -0.3], [0.05, -0.4, 0.3], [0.02, 0.0, -0.1]])

    def loss(values):
        total = 0.0
        for place in range(model.ANSWER):
            at = model.LENGTH - model.ANSWER + place
            prefix_BT = tokens_BT.copy()
            prefix_BT[:, at:] = model.PAD
            logp_BV = model.log_softmax(model.forward(values, prefix_BT)[0])
            ratio_B = np.exp(logp_BV[np.arange(3), tokens_BT[:, at]] - old_BA[:, place])
            total += np.minimum(
                ratio_B * advantage_B,
                np.clip(ratio_B, 1 - rule.CLIP_LOW, 1 + rule.CLIP_HIGH) * advantage_B,
            ).sum()
        return -total / (3 * model.ANSWER)

    found = rule.gradient(params, tokens_BT, old_BA, advantage_B)
    for name, value in params.items():
        index = tuple(rng.integers(0, size) for size in value.shape)
        if name == "embed":
            index = (0, tokens_BT[0, 0], 3)  # an entry that is used
        step = np.zeros_like(value)
        step[index] = 1e-5
        numeric = (loss({**params, name: value + step}) - loss({**params, name: value - step})) / 2e-5
        # `gradient` passes float32 back: relative 1e-6, on gradients up to about 1.
        assert found[name][index] == pytest.approx(numeric, abs=2e-6, rel=1e-4)


@pytest.mark.parametrize("estimator", ["grpo", "mean", "rloo"])
def test_advantages_of_grpo_math_sum_to_zero(grpo, estimator, monkeypatch):
    _, rule, _ = grpo
    monkeypatch.setattr(rule, "ESTIMATOR", estimator)
    rewards_QP = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    found_QP = rule.advantages(rewards_QP)
    assert found_QP.sum(axis=1) == pytest.approx([0, 0, 0], abs=1e-9)
    assert np.all(found_QP[1] == 0)
    assert found_QP[2, 3] > 0 > found_QP[2, 0]


def test_grpo_math_is_scored_by_the_locked_model_on_sums_no_run_has_seen(tmp_path, isolation):
    misshapen = LEAVES.replace("{arrays}", '{"w1": np.zeros(3)}')
    infinite = LEAVES.replace("{arrays}", "{name: value * np.inf for name, value in params.items()}")
    with AIResearchEnv(codebase="grpo_math", workdir=tmp_path, sandbox=isolation) as env:
        task = env.task
        parts = [
            {line.split()[0] for line in Path(task.folder, name).read_text().splitlines()}
            for name in ("data/solved.txt", "data/train.txt", "locked/heldout.txt")
        ]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 10_000  # no sum is in two parts
        for path in ("model.py", "weights.py", "locked/evaluate.py"):
            assert task.policy.refusal(path) is not None
        for name in ("model.py", "weights.py"):
            assert task.private[f"locked/{name}"] == task.baseline[name]
        results = [env.value(diff, rung=0.05) for diff in ("", misshapen, infinite)]
    assert results[0].status is Status.OK, results[0].reason + results[0].log_tail
    assert 0.2 < results[0].metric < 0.7  # the warm-up and one step
    assert [result.status for result in results[1:]] == [Status.METRIC_INVALID] * 2, results


@pytest.mark.slow
def test_grpo_math_learns_from_checked_answers(tmp_path, isolation):
    """20 steps against the warm-up alone, the same seeds."""
    still = "--- a/train.py\n+++ b/train.py\n@@ -1,1 +1,1 @@\n-LEARNING_RATE = 0.002\n+LEARNING_RATE = 0.0\n"
    with AIResearchEnv(codebase="grpo_math", workdir=tmp_path, sandbox=isolation) as env:
        found = [[env.value(diff, seed=seed).metric for diff in ("", still)] for seed in range(3)]
    # Measured: 3 to 8 points on each seed; one standard error of a paired mean over three seeds is below 2.
    assert np.mean([learned - warm for learned, warm in found]) > 0.01, found


@pytest.mark.slow
def test_the_trainer_itself_is_a_codebase(tmp_path, isolation):
    """The loop closes: pretrain/ is the tree; what the baseline compiled is read, not written, by the candidate."""
    better = "--- a/recipe.py\n+++ b/recipe.py\n@@ -1,1 +1,1 @@\n-    peak_lr=0.003,\n+    peak_lr=0.01,\n"
    with AIResearchEnv(codebase="pretrain_tiny", workdir=tmp_path, sandbox=isolation) as env:
        baseline, changed = env.value(""), env.value(better)
        assert baseline.status is Status.OK, baseline.reason + baseline.log_tail
        assert changed.status is Status.OK, changed.reason + changed.log_tail
        assert env.cache is not None
        assert list(env.cache.iterdir())
        assert any(path.startswith("pretrain/") for path in env.task.baseline)
        pairs = env.final_score(env.add(better).node, num_seeds=1)
    assert [result.status for pair in pairs for result in pair] == [Status.OK] * 2, pairs
    assert (
        pairs[0][1].metric < pairs[0][0].metric < 3.9
    )  # other text, and the change is worth something on it as well
    assert changed.metric < baseline.metric < 3.6  # from 4.85, the logarithm of 128
