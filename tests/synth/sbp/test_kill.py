"""SIGKILL at random moments over all stages: the restarted run ends with the bytes of the run never killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMOKE = str(Path(__file__).parents[3] / "configs/synth/sbp_smoke.py")
NUM_KILLS = 10


def command(workdir):
    return [sys.executable, "-m", "synth.main", "--config", SMOKE, f"run.workdir={workdir}"]


def outputs(workdir):
    found = [*workdir.glob("seed*/*/0*.jsonl.zst"), *workdir.glob("results.*")]
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(found)}


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_a_run_never_killed(tmp_path):
    chance = random.Random(0)
    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    killed, folder = 0, tmp_path / "killed"
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(0.15, 0.5) * whole_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        else:
            assert process.returncode == 0
            break
    subprocess.run(command(folder), check=True, capture_output=True)
    assert killed > 0
    assert outputs(folder) == outputs(tmp_path / "whole")
