"""Launch files are shell that parses and hands the config on; the one for plain hosts starts a lost process again."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "configs" / "launch"
FILES = sorted(path.name for path in FOLDER.iterdir())


def test_there_is_one_for_every_kind_of_cluster():
    assert {"slurm.sbatch", "tpu_xpk.sh", "gpu_host.sh"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_parses(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def stand_in(folder: Path, name: str, body: str) -> dict[str, str]:
    """An environment in which `name` is a small program of ours that logs its arguments."""
    program = folder / name
    program.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls.txt\n{body}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("codes", "starts", "end"),
    [([0], 1, 0), ([2], 1, 2), ([75], 1, 75), ([7, 5, 0], 3, 0), ([7, 7, 7, 7], 3, 7)],
)
def test_a_plain_host_starts_again_after_a_loss_or_a_hang_and_nothing_else(tmp_path, codes, starts, end):
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    body = f"code=$(head -n1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit $code"
    environment = stand_in(tmp_path, "python", body) | {"RESTARTS": "2", "RANK": "0"}
    done = subprocess.run(
        ["bash", str(FOLDER / "gpu_host.sh"), "some.py", "run.num_steps=3"],
        env=environment, check=False, capture_output=True,
    )  # fmt: skip
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert done.returncode == end
    assert (
        calls
        == ["python -m pretrain.main --config some.py distributed.cluster=torchrun run.num_steps=3"] * starts
    )


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (2, False), (75, True), (7, True), (134, True), (5, True)]
)
def test_slurm_queues_a_preempted_run_again(tmp_path, code, requeued):
    stand_in(tmp_path, "scontrol", "")
    environment = stand_in(tmp_path, "srun", f"exit {code}") | {"SLURM_JOB_ID": "4711"}
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sbatch"), "some.py", "mesh.fsdp=8"], env=environment, check=False
    )
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert done.returncode == code
    assert calls[0] == (
        "srun --kill-on-bad-exit=1 python -m pretrain.main --config some.py distributed.cluster=slurm mesh.fsdp=8"
    )
    assert (calls[1:] == ["scontrol requeue 4711"]) == requeued
