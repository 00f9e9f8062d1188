"""A study judges every model by the same problems, tells its teachers apart, and resumes."""

import dataclasses
import json

import pytest

from pretrain.config import ConfigError, apply_overrides, load_config
from pretrain.rl.__main__ import main
from pretrain.rl.reward import NumberReward, RandomReward
from pretrain.rl.study import ARMS, Arm, configs_of, picture, table, wilson

CONFIG = "configs/rl/arithmetic_study.py"
TINY = [
    f"{part}.model.{field}={value}"
    for part in ("base", "policy", "supervised")
    for field, value in (("num_layers", 1), ("width", 32), ("num_heads", 2), ("num_kv_heads", 1), ("head_width", 16),
                         ("hidden_width", 64))
]  # fmt: skip


def arm(**changes):
    values = {"seed": 1, "name": "base", "accuracy": 0.25, "num_problems": 200, "params": 10, "seconds": 1.0}
    return Arm(**{**values, **changes})


def test_the_interval_of_a_share_is_wilsons():
    # As packages of statistics give it for 25 of 100.
    low, high = wilson(0.25, 100)
    assert (low, high) == (pytest.approx(0.1755, abs=2e-4), pytest.approx(0.3430, abs=2e-4))
    assert wilson(0.0, 200)[0] == 0.0
    assert 0 < wilson(0.0, 200)[1] < 0.02
    assert wilson(1.0, 200)[1] == pytest.approx(1.0)


def test_arms_differ_in_their_teacher_alone():
    study = load_config(CONFIG)
    arms = configs_of(study, 7, "BASE")
    assert set(arms) == set(ARMS)
    assert {c.init for c in arms.values()} == {"BASE"}
    assert {c.run.seed for c in arms.values()} == {7}
    assert arms["reward"].data.reward == NumberReward()
    assert isinstance(arms["random"].data.reward, RandomReward)
    assert arms["random"].data.judge == NumberReward()  # its curve is of right answers, not of its own luck
    same = dataclasses.replace(arms["random"].data, reward=NumberReward(), judge=None)
    assert dataclasses.replace(arms["random"], data=same) == arms["reward"]
    assert arms["supervised"].data == study.supervised.data
    (source,) = arms["supervised"].data.sources
    assert all(eval(d.text.replace("=", "-")) == 0 for d in source.documents[:50])


def test_the_table_has_a_row_a_seed_and_the_picture_is_one():
    arms = [
        arm(seed=seed, name=name, accuracy=accuracy, curve=((10, accuracy),) if name != "base" else ())
        for seed in (1, 2)
        for name, accuracy in (("base", 0.2), ("reward", 0.95), ("random", 0.1), ("supervised", 0.9))
    ]
    lines = table(arms).splitlines()
    assert lines[0] == "| seed | base | reward | random | supervised |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 2"]
    assert "95.0% [91.0%..97.3%], 1 s" in lines[2]
    assert picture(arms, "study").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seeds=(1,1)"], "seeds must be different"),
        (["policy.run.eval_every_steps=none"], "eval_every_steps must be set"),
        (["base.model.width=64"], "must have the same model"),
        (["supervised.run.num_steps=3"], "supervised: optim.schedule.num_warmup_steps must not exceed"),
    ],
)
def test_studies_that_compare_nothing_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        apply_overrides(load_config(CONFIG), overrides)


def test_another_kind_of_config_is_refused(capsys):
    assert main(["--config", "configs/rl/arithmetic_base.py"]) == 2
    assert "must return a StudyConfig for pretrain.rl" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_study_runs_to_its_report_and_is_read_the_second_time(tmp_path, capsys):
    argv = [
        "--config", CONFIG, *TINY, f"workdir={tmp_path}", "seeds=(3,)", "base.run.num_steps=3", "supervised.run.num_steps=2",
        *(f"{arm}.optim.schedule.num_warmup_steps=1" for arm in ("base", "supervised", "policy")),
        "policy.run.num_steps=2", "policy.run.eval_every_steps=1", "policy.data.prompts_per_step=4", "policy.data.slots=16",
        "policy.data.problems.num_heldout=20",
    ]  # fmt: skip
    assert main(argv) == 0
    folder = tmp_path / "arithmetic_study"
    report = json.loads((folder / "study.json").read_text())
    assert [row["name"] for row in report] == ["base", *ARMS]
    assert all(row["num_problems"] == 20 for row in report)
    assert [step for step, _ in report[1]["curve"]] == [1, 2]
    random = report[1 + ARMS.index("random")]
    assert random["curve"][-1][1] == random["accuracy"]  # judged in the run as after it, not by its own luck
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 4
    capsys.readouterr()
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == before
    assert json.loads((folder / "study.json").read_text()) == report
