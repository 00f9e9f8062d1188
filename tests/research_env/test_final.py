"""The final split: no search and no run sees it, one node a campaign is scored on it."""

import json
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from research_env.env import AIResearchEnv
from research_env.main import main, score_final
from research_env.records import Status
from research_env.task import open_task
from research_env.worker import lay_out_judge

LOOKS = """import json, os
settings = json.load(open(os.environ["ARTIFACT"] + "/settings.json"))
path = {"search": "locked/target.txt", "final": "final/target.txt"}[os.environ["SPLIT"]]
json.dump({"metric": abs(settings["X"] - float(open(path).read())), "extra": {"sees_final": float(os.path.exists("final"))}},
          open(os.environ["RESULT"], "w"))
"""


@pytest.fixture
def codebase(tmp_path):
    """X is best at 3 for the search and at 2.5 for the final score."""
    folder = tmp_path / "code"
    for name in ("locked", "final"):
        (folder / name).mkdir(parents=True)
    (folder / "settings.py").write_text("X = 1.0\n")
    (folder / "train.py").write_text(
        "import json, os, settings\njson.dump({'X': settings.X, 'sees': os.path.exists('final')}, open(os.environ['OUT'] + '/settings.json', 'w'))\n"
    )
    (folder / "locked" / "target.txt").write_text("3.0")
    (folder / "final" / "target.txt").write_text("2.5")
    (folder / "locked" / "evaluate.py").write_text(LOOKS)
    (folder / "run.sh").write_text('exec "$PYTHON" train.py\n')
    (folder / "eval.sh").write_text('exec "$PYTHON" -I locked/evaluate.py\n')
    (folder / "task.toml").write_text(
        'metric = "distance"\neditable = ["settings.py"]\nartifact = ["settings.json"]\n'
    )
    return str(folder)


def changed(value):
    return f"--- a/settings.py\n+++ b/settings.py\n@@ -1 +1 @@\n-X = 1.0\n+X = {value}\n"


def test_only_the_final_judge_has_the_final_data_and_it_scores_one_node(tmp_path, codebase, isolation):
    with AIResearchEnv(codebase=codebase, workdir=tmp_path / "run", sandbox=isolation) as env:
        nodes = [env.add(changed(value)).node for value in (3.0, 2.0)]
        searched = env.value(changed(3.0))
        assert (searched.metric, searched.extra["sees_final"]) == (0.0, 0.0)
        assert not [path for path in env.task.baseline if path.startswith("final")]
        assert (
            env.value("--- a/final/target.txt\n+++ b/final/target.txt\n@@ -1 +1 @@\n-2.5\n+1.0\n").status
            is Status.PATCH_REJECTED
        )
        pairs = env.final_score(nodes[0], num_seeds=2)
        assert [(base.metric, mine.metric, mine.extra["sees_final"]) for base, mine in pairs] == [
            (1.5, 0.5, 1.0)
        ] * 2
        assert len({base.seed for base, _ in pairs}) == 2
        runs = env.ledger.spent()["runs"]
        env.final_score(nodes[0], num_seeds=2)
        assert env.ledger.spent()["runs"] == runs
        with pytest.raises(ConfigError, match="scores no other"):
            env.final_score(nodes[1])
        shown = [result for _, result in env.context().history]
        assert not [result for result in shown if result.extra.get("sees_final")]
        assert all(
            purpose == "final"
            for _, purpose, result in env.ledger.results()
            if result.extra.get("sees_final")
        )


def test_a_task_without_a_final_split_says_so(tmp_path, isolation):
    with AIResearchEnv(codebase="planted", workdir=tmp_path, sandbox=isolation) as env:
        with pytest.raises(ConfigError, match="has no final split"):
            env.final_score(env.add("").node)


@pytest.mark.parametrize(("name", "row"), [("toy", 129), ("pretrain_tiny", 65)])
def test_a_built_in_task_keeps_its_final_text_apart(tmp_path, name, row):
    task = open_task(name, tmp_path)
    assert task.has_final
    final, search = task.private["final/test.bin"], task.private["locked/validation.bin"]
    train = (Path(task.data) / "train.bin").read_bytes()
    assert len(final) > row * 100
    for text, others in ((final, (search, train)), (search, (train,))):
        passages = [text[start : start + row] for start in range(0, len(text) - row, row)]
        assert not [passage for passage in passages if any(passage in other for other in others)]
    shared = {train[start : start + 48] for start in range(len(train))}
    assert not [start for start in range(len(search) - 47) if search[start : start + 48] in shared]
    assert not list(lay_out_judge(task, tmp_path / "judge").rglob("test.bin"))
    assert list(lay_out_judge(task, tmp_path / "judge", "final").rglob("test.bin"))


def test_no_road_scores_a_second_tree_on_the_final_split(tmp_path, codebase, isolation):
    with AIResearchEnv(codebase=codebase, workdir=tmp_path / "run", sandbox=isolation) as env:
        first, second = (env.add(changed(value)) for value in (3.0, 2.0))
        with pytest.raises(ConfigError, match="scores no other"):
            env.evaluate_pairs([(first, 1), (second, 1)], purpose="final", split="final")
        assert env.ledger.spent()["runs"] == 0
        with pytest.raises(ConfigError, match="scores no other"):
            env.evaluate_pairs([(second, 1)], split="final")
        found = score_final(env, second.node.id)
        assert found["stopped"].startswith("the final split was opened for tree ")
        assert score_final(env, first.node.id)["num_seeds"] == 3


def test_a_campaign_scores_its_winner_once_and_the_page_says_it(tmp_path, codebase):
    argv = [
        "--config", "configs/research_env/smoke.py", f"codebase={codebase}", f"workdir={tmp_path / 'run'}",
        "noise_repeats=3",
    ]  # fmt: skip
    assert main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["winner"] is not None
    assert summary["final"]["num_seeds"] == 3
    assert "Final split: gain" in (tmp_path / "run" / "index.html").read_text()
