"""The kill harness: it tells phases apart by the run folder; the real thing kills a small training run."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.rundir import RunDir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kill_test", ROOT / "tools" / "kill_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def append(run, **line):
    with open(run.metrics_jsonl, "a") as file:
        file.write(json.dumps(line) + "\n")


def test_phases_are_told_by_the_folder(tool, tmp_path):
    run = RunDir(tmp_path)
    watcher = tool.Watcher(run, eval_every_steps=4, last_step=10)
    assert watcher.phase() == "startup"
    run.metrics_jsonl.touch()
    assert watcher.phase() == "startup"
    append(run, step=3, kind="train")
    assert watcher.phase() == "step"
    append(run, step=4, kind="train")
    assert watcher.phase() == "evaluation"
    append(run, step=4, kind="eval")
    assert watcher.phase() == "step"
    (run.checkpoints / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert watcher.phase() == "checkpoint"
    (run.checkpoints / "4.orbax-checkpoint-tmp").rename(run.checkpoints / "4")
    assert watcher.phase() == "checkpoint", "committed, but the manifest is missing"
    (run.checkpoints / "4" / "manifest.json").touch()
    assert watcher.phase() == "step"
    append(run, step=10, kind="train")
    assert watcher.phase() == "evaluation"


def test_resuming_is_startup_until_a_line_is_appended(tool, tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        append(run, step=step, kind="train")
    watcher = tool.Watcher(run, eval_every_steps=None, last_step=10)
    assert watcher.phase() == "startup"
    replacement = tmp_path / "new"
    replacement.write_text("".join(run.metrics_jsonl.read_text().splitlines(keepends=True)[:2]))
    replacement.rename(run.metrics_jsonl)
    assert watcher.phase() == "startup", "lines after the checkpoint were dropped"
    assert watcher.phase() == "startup"
    append(run, step=3, kind="train")
    assert watcher.phase() == "step"


def test_what_a_killed_start_left_is_not_a_checkpoint_of_this_one(tool, tmp_path):
    run = RunDir(tmp_path)
    (run.checkpoints / "4").mkdir(parents=True)
    watcher = tool.Watcher(run, eval_every_steps=None, last_step=10)
    append(run, step=1, kind="train")
    assert watcher.phase() == "step"
    (run.checkpoints / "6.orbax-checkpoint-tmp").mkdir()
    assert watcher.phase() == "checkpoint"


def test_an_unfinished_line_is_not_read(tool, tmp_path):
    assert tool.last_line(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert tool.last_line(tmp_path / "metrics.jsonl") == {"step": 1, "kind": "train"}


def test_every_kill_is_followed_by_a_restart_and_every_run_is_compared(tool):
    """Runs that end between two kills are compared and followed by another run, until all kills are used."""

    class Script:
        def __init__(self):
            self.log = []

        def start_and_kill(self, workdir, target):
            self.log.append((workdir, target))
            ended = len(self.log) % 4 == 3
            return (
                None
                if ended
                else {"phase": target, "after_s": 0.0, "last_step": 1, "newest_checkpoint": None}
            )

        def finish(self, workdir):
            self.log.append((workdir, "finish"))

        def compare(self, workdir):
            return {"workdir": workdir}

    script = Script()
    kills, ends = tool.run_kills(script, 7, random.Random(0))
    assert len(kills) == 7
    assert [end["workdir"] for end in ends] == ["killed0", "killed1", "killed2"]
    assert script.log[-1] == ("killed2", "finish")
    assert {target for _, target in script.log} == {*tool.PHASES, "finish"}


@pytest.mark.slow
def test_killed_runs_end_with_the_parameters_of_the_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "tools.kill_test", "--config", "configs/pretrain/smoke.py"]
    done = subprocess.run(
        [*command, "--kills", "8", "--workdir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kill_test.json").read_text())
    assert len(report["kills"]) == 8
    assert report["differences"] == 0
    assert report["damaged_checkpoints"] == 0
    assert len(report["phases"]) >= 3
