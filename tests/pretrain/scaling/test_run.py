"""Jobs of a ladder: a crash is tried again and takes no other cell with it, bad input stops at once."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from pretrain.config import ConfigError, apply_overrides, load_config
from pretrain.jobs.api import Crashed, Job, Raised
from pretrain.metrics import JsonlWriter
from pretrain.rundir import write_json_atomic
from pretrain.scaling.plan import plan_cells
from pretrain.scaling.run import (
    Preempted,
    Tables,
    _may_be_repeated,
    _Progress,
    _run_jobs,
    cell_dir,
    finished_cells,
)

SMOKE = load_config(Path(__file__).parents[3] / "configs/scaling/smoke.py")
CELLS = plan_cells(SMOKE, 260)


def test_a_crash_is_tried_again_and_takes_no_other_cell_with_it(tmp_path):
    lines = []
    jobs = [
        Job(name=CELLS[0].name, function=os._exit, arguments=(3,)),
        Job(name=CELLS[1].name, function=math.sqrt, arguments=(4.0,)),
    ]
    failures = _run_jobs(SMOKE, tmp_path, jobs, _Progress(CELLS[:2], lines.append))
    assert [type(f) for f in failures] == [Crashed]
    said = "\n".join(lines)
    assert said.count("exited with 3") == 1 + SMOKE.scaling.retries
    assert said.count(f"{CELLS[1].name} done") == 1


def test_bad_input_of_a_cell_stops_with_its_own_words(tmp_path):
    jobs = [Job(name=CELLS[0].name, function=dataclasses.replace, arguments=(1,))]
    (failure,) = _run_jobs(SMOKE, tmp_path, jobs, _Progress(CELLS[:1], lambda line: None))
    assert isinstance(failure, Raised)
    assert "TypeError" in failure.reason()
    refused = [Job(name=CELLS[0].name, function=load_config, arguments=("nowhere.py",))]
    with pytest.raises(ConfigError, match="must name a Python file, got 'nowhere.py'"):
        _run_jobs(SMOKE, tmp_path, refused, _Progress(CELLS[:1], lambda line: None))


def test_a_preempted_cell_may_be_repeated_and_a_failed_one_not():
    def raised(error):
        return Raised(name="x", wall_s=0.0, exception=type(error).__qualname__, message="", traceback="")

    assert _may_be_repeated(raised(Preempted()))
    assert not _may_be_repeated(raised(ValueError()))


def test_a_loss_that_is_no_number_is_named_with_its_cell(tmp_path):
    config = apply_overrides(SMOKE, [f"train.run.workdir={tmp_path}"])
    tables = Tables(config)
    planned = plan_cells(config, tables.vocab_size)[0]
    folder = cell_dir(planned, "smoke")
    folder.create()
    steps = planned.train.run.num_steps
    write_json_atomic(folder.summary_json, {"steps": steps, "seconds": 1.0, "skipped_steps": 0})
    with pytest.raises(ConfigError, match="must end with an evaluation at step"):
        finished_cells(config, "smoke", tables)
    writer = JsonlWriter(folder.metrics_jsonl)
    writer.write(steps, "eval", {"nats_per_token": math.nan})
    writer.close()
    with pytest.raises(
        ConfigError, match=f"the loss of {planned.name} must be finite, got nan; lower the peak rate"
    ):
        finished_cells(config, "smoke", tables)
