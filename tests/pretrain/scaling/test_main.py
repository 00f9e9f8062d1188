"""The verb: both spellings of an action, bad input, and a ladder that is killed and goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config
from pretrain.scaling.__main__ import main
from pretrain.scaling.coordinates import CoordinateCheck, check_ladder

ROOT = Path(__file__).parents[3]
SMOKE = str(ROOT / "configs/scaling/smoke.py")


def test_a_plan_says_what_will_be_run(tmp_path, capsys):
    for spelling in (["plan", "--config", SMOKE], ["--config", SMOKE, "scaling.action=plan"]):
        assert main([*spelling, f"train.run.workdir={tmp_path}"]) == 0
        text = capsys.readouterr().out
        assert "7 cells" in text
        assert "held_out-w" in text
    assert not (tmp_path / "smoke").exists()


def test_a_fit_without_runs_is_bad_input(tmp_path, capsys):
    assert main(["fit", "--config", SMOKE, f"train.run.workdir={tmp_path}"]) == 2
    assert "needs more cells than its 5 parameters, got 0" in capsys.readouterr().err


def test_another_kind_of_config_is_bad_input(capsys):
    assert main(["--config", str(ROOT / "configs/pretrain/smoke.py")]) == 2
    assert "must return a ScalingConfig for pretrain.scaling, got TrainConfig" in capsys.readouterr().err


def test_an_unknown_action_is_bad_input(capsys):
    assert main(["--config", SMOKE, "scaling.action=dream"]) == 2
    assert "scaling.action" in capsys.readouterr().err


def test_a_coordinate_check_needs_two_widths():
    config = load_config(SMOKE)
    one = dataclasses.replace(config.ladder, shapes=config.ladder.shapes[:1], shapes_per_budget=1)
    with pytest.raises(ConfigError, match=r"two widths or more, ladder.shapes has \[8\]; add a shape"):
        check_ladder(dataclasses.replace(config, ladder=one), "smoke", vocab_size=260)


def test_rates_that_do_not_transfer_are_an_exit_code(tmp_path, capsys, monkeypatch):
    tilted = CoordinateCheck(
        widths=(8, 16, 32), changes={"logits": (1.0, 1.2, 1.44), "block 0": (1.0, 1.05, 1.1)}
    )
    monkeypatch.setattr("pretrain.scaling.coordinates.coordinate_check", lambda *_, **__: tilted)
    assert main(["check", "--config", SMOKE, f"train.run.workdir={tmp_path}"]) == 1
    assert "NOT flat within 0.15: logits; narrow widths" in capsys.readouterr().out


@pytest.mark.slow
def test_a_coordinate_check_tells_width_transfer_from_none(tmp_path, capsys):
    assert main(["check", "--config", SMOKE, f"train.run.workdir={tmp_path}"]) == 0
    assert "one rate serves widths 8 to 32" in capsys.readouterr().out
    found = json.loads((tmp_path / "smoke/coordinates.json").read_text())
    slopes = [found[key]["slopes"]["logits"] for key in ("width_transfer", "without")]
    assert abs(slopes[0]) < 0.15 < slopes[1]
    assert (tmp_path / "smoke/coordinates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_rate_serves_all_widths_of_the_ladder_that_predicts(tmp_path, capsys):
    config = str(ROOT / "configs/scaling/ladder_cpu.py")  # its warmup is longer than the check
    assert main(["check", "--config", config, f"train.run.workdir={tmp_path}"]) == 0
    assert "one rate serves widths 16 to 128" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_ladder_goes_on_and_does_nothing_twice(tmp_path):
    """A minute or two of one core: seven runs, each in a process of its own."""
    command = [sys.executable, "-m", "pretrain.scaling", "--config", SMOKE, f"train.run.workdir={tmp_path}"]
    # One device, and programs that are compiled fast: they run for a second.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": flags}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def summaries():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "smoke").glob("*/summary.json")}

    while len(summaries()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = summaries()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = summaries()
    assert len(after) == 7
    assert {path: after[path] for path in before} == before
    report = json.loads((tmp_path / "smoke/report.json").read_text())
    assert len(report["cells"]) == 7
    assert report["num_missing"] == 0
    assert "held out" in done.stdout
    assert (tmp_path / "smoke/report.html").read_text().count("<img") == 1
