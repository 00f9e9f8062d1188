"""SIGKILL at random moments over all stages: the restarted run ends with the bytes of the run never killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synth.shards import read_documents

SMOKE = str(Path(__file__).parents[3] / "configs/synth/sbp_smoke.py")


def command(workdir):
    return [sys.executable, "-m", "synth.main", "--config", SMOKE, f"run.workdir={workdir}"]


def outputs(workdir):
    found = [*workdir.glob("seed*/*/0*.jsonl.zst"), *workdir.glob("results.*")]
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(found)}


def kill_and_restart(tmp_path, num_kills):
    """(kills that met a run at work, runs they were shared out over), all of which end as the one never killed."""
    chance = random.Random(0)
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    # The first run compiled for those that follow: only a second one tells how long they take.
    started = time.monotonic()
    subprocess.run(command(tmp_path / "second"), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    killed, rounds = 0, [tmp_path / "killed0"]
    for _ in range(num_kills):
        process = subprocess.Popen(command(rounds[-1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(0.15, 0.9) * whole_s)
            assert process.returncode == 0
            rounds.append(tmp_path / f"killed{len(rounds)}")  # it got through: the next kill needs a new run
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    expected = outputs(tmp_path / "whole")
    for folder in (tmp_path / "second", *rounds):
        subprocess.run(command(folder), check=True, capture_output=True)
        assert outputs(folder) == expected
        for stage in ("texts_sbp", "texts_random", "texts_self"):
            shards = [read_documents(path) for path in folder.glob(f"seed*/{stage}/0*.jsonl.zst")]
            ids = [document.id for shard in shards for document in shard]
            assert 0 < len(ids) == len(set(ids)), "a seed was synthesized twice"
    return killed, len(rounds)


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_a_run_never_killed(tmp_path):
    killed, _ = kill_and_restart(tmp_path, num_kills=8)
    assert killed > 0
