"""The tasks that come along, the template a user starts from, and repositories that are converted."""

import re
from pathlib import Path

import numpy as np
import pytest

from research_env.env import AIResearchEnv
from research_env.records import Status
from research_env.sandbox.ladder import probe
from research_env.task import built_in_tasks, open_task
from research_env.tasks.autoresearch import adapt

GUIDE = Path(adapt.__file__).parent.parent / "template" / "GUIDE.md"


@pytest.fixture(scope="module")
def isolation():
    """The first level that holds here."""
    for level in ("unshare", "bwrap", "landlock"):
        found = probe(level)
        if found.is_held:
            return found
    pytest.skip("no level of isolation holds on this host")


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
    assert changed.metric < baseline.metric < 3.6  # from 4.85, the logarithm of 128
