"""A run that leaves a longer one before its own decay ends with the bits it would have had from step 0."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint import AllCheckpointsBad, CheckpointPolicy
from pretrain.config import ConfigError, load_config
from pretrain.optim import Constant, WarmupCosine, Wsd
from pretrain.scaling.plan import Shape, branches, make_cell, plan_cells, stable_steps
from pretrain.train import train

pytestmark = pytest.mark.slow

SMOKE = load_config(Path(__file__).parents[3] / "configs/scaling/smoke.py")
MODEL = Shape(width=8, num_layers=1).model(SMOKE.train.model)
STEP = stable_steps(SMOKE.train.optim.schedule, 10)


def config(workdir, num_steps, **changes):
    run = dataclasses.replace(SMOKE.train.run, num_steps=num_steps, workdir=str(workdir))
    policy = CheckpointPolicy(every_s=None, keep_last=1, keep_steps=(STEP,))
    data = dataclasses.replace(SMOKE.train.data, batch_rows=8)  # a row for each of the fake devices
    fields = {"model": MODEL, "data": data, "run": run, "checkpoint": policy, **changes}
    return dataclasses.replace(SMOKE.train, **fields)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return train(config(tmp_path_factory.mktemp("trunk"), 16), name="t").folder / "checkpoints" / str(STEP)


def test_a_trunk_keeps_the_step_that_others_leave_it_at(trunk):
    assert {path.name for path in trunk.parent.iterdir()} == {str(STEP), "16"}


def test_a_branch_equals_the_run_from_step_zero(trunk, tmp_path):
    scratch = train(config(tmp_path / "scratch", 10), name="t")
    branch = train(config(tmp_path / "branch", 10), name="t", trunk=trunk)
    assert branch.folder.name == scratch.folder.name
    assert branch.summary["params_sha256"] == scratch.summary["params_sha256"]
    assert branch.summary["val_bits_per_byte"] == scratch.summary["val_bits_per_byte"]
    assert branch.summary["train_tokens"] == scratch.summary["train_tokens"]


def test_a_trunk_of_another_recipe_is_refused(trunk, tmp_path):
    other = dataclasses.replace(SMOKE.train.optim, peak_lr=2e-2)
    with pytest.raises(ConfigError, match=r"optim\.peak_lr may not change"):
        train(config(tmp_path, 10, optim=other), name="t", trunk=trunk)


def test_a_trunk_that_is_not_there_is_refused(trunk, tmp_path):
    with pytest.raises(AllCheckpointsBad, match="a branch starts from a readable checkpoint"):
        train(config(tmp_path, 10), name="t", trunk=trunk.with_name("3"))


def test_a_trunk_after_its_branch_should_have_decayed_is_refused(trunk, tmp_path):
    with pytest.raises(ConfigError, match="must have had the rates of its trunk"):
        train(config(tmp_path, 7), name="t", trunk=trunk)


@pytest.mark.parametrize(
    ("schedule", "stable"),
    [
        (Wsd(num_warmup_steps=2, decay_fraction=0.25), 30),
        (Constant(), 39),
        (WarmupCosine(num_warmup_steps=2), 0),
    ],
)
def test_rates_before_the_stable_end_do_not_depend_on_the_length(schedule, stable):
    assert stable_steps(schedule, 40) == stable
    steps = np.arange(stable)
    assert np.array_equal(schedule.factor(steps, 40), schedule.factor(steps, 400))


def test_branches_leave_the_longest_run_of_their_size():
    cells = plan_cells(SMOKE, 260)
    found = branches(cells)
    assert len(found) == 3, "three sizes at two budgets"
    by_name = {cell.name: cell for cell in cells}
    for name, branch in found.items():
        cell, longest = by_name[name], by_name[branch.trunk]
        assert longest.train.run.num_steps > cell.train.run.num_steps > branch.step
        assert longest.train.model == cell.train.model
        assert longest.role == cell.role, "a held-out run lends nothing to the ladder"


def test_seeds_do_not_share_a_trunk():
    cells = [
        make_cell(SMOKE.train, "ladder", MODEL, num_steps, seed, 1.0, 260)
        for num_steps in (20, 40)
        for seed in (0, 1)
    ]
    assert {b.trunk for b in branches(cells).values()} == {
        c.name for c in cells if c.train.run.num_steps == 40
    }
