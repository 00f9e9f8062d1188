"""Tables come from run folders, with their source; a document's blocks are filled in and nothing else is touched."""

import json
import re

import pytest

from pretrain.config import ConfigError
from tools.results import fill_in, main, results_of


def table_of(folder):
    return results_of(folder).page()


def training_run(folder, **changes):
    folder.mkdir(parents=True)
    summary = {
        "val_bits_per_byte": 1.5, "baseline_bits_per_byte": {"unigram": 4.5, "xz": 2.25}, "params": 12345,
        "train_tokens": 67890, "tokens_per_second": 1000.4, "seconds": 90.0, "device": "1 x cpu", "steps": 250,
        "num_steps": 1000, **changes,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"run": {"seed": 7}}))
    return folder


def campaign(folder):
    folder.mkdir(parents=True)
    arm = {"arm": "greedy", "executed": 9, "ok": 8, "best_gain": 0.25, "corrected_gain": None, "promoted": 1}
    summary = {
        "arms": [arm],
        "metric": "loss",
        "baseline": 2.0,
        "sigma0": 0.01,
        "noise_repeats": 4,
        "isolation": "bwrap",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "index.html").write_text("")
    return folder


def test_a_training_run_is_sorted_best_first_with_its_source(tmp_path):
    table = table_of(training_run(tmp_path / "runs/quick/abcd"))
    lines = table.splitlines()
    assert lines[2:5] == ["| this model | 1.5000 |", "| xz | 2.2500 |", "| unigram | 4.5000 |"]
    for fact in (
        "12,345 parameters",
        "step 250 of 1,000",
        "1.5 minutes",
        "1,000 tokens/s",
        "1 x cpu",
        "seeds 7",
    ):
        assert fact in table
    assert "commit not recorded" in table


def test_a_run_without_a_logged_rate_has_a_table_without_one(tmp_path):
    assert "tokens/s" not in table_of(training_run(tmp_path / "a", tokens_per_second=None))


def test_a_run_that_held_nothing_out_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must have held-out bits per byte"):
        table_of(training_run(tmp_path / "a", val_bits_per_byte=None))


def test_benchmarks_come_with_their_ranges_and_what_was_left_out(tmp_path):
    row = {"what": "step", "ours": "a", "peer": "b", "ratio_of": "speed", "median": 1.234, "least": 1.0, "greatest": 2.0,
           "pairs": 9, "note": "n"}  # fmt: skip
    record = {
        "command": ["tools.x", "pairs=9"],
        "origin": {"commit": "abc", "hardware": "2 x chip"},
        "rows": [row],
        "left_out": {"peer c": "not installed"},
    }
    report = {
        "benchmarks": {"step": record},
        "left_out": {"attention": "no GPU"},
        "failed": {"pairing": "died"},
    }
    (tmp_path / "bench.json").write_text(json.dumps(report))
    table = table_of(tmp_path)
    assert "| step: a | b | 1.23 [1.00..2.00] x speed | 9 | n |" in table
    for line in ("attention was left out: no GPU", "pairing failed: died", "step, peer c left out: not inst"):
        assert f"- {line}" in table
    assert "commands `python -m tools.x pairs=9`; hardware 2 x chip; commit abc." in table


def test_a_step_is_a_file_with_its_utilizations(tmp_path):
    report = {"device": "a chip", "jax": "1.0", "params": 1000, "attention": "xla", "remat": "none", "rows": 8,
              "row_length": 64, "microbatches": 2, "step_s": 0.5, "step_range_s": [0.25, 1.0], "mfu": 0.5,
              "tokens_per_second": 1024.0, "mfu_packed": 0.25, "hfu": 0.625, "peak": "a data sheet"}  # fmt: skip
    path = tmp_path / "step.json"
    path.write_text(json.dumps(report))
    table = table_of(path)
    for line in ("| tokens/s | 1,024 |", "| step, ms | 500.0 [250.0..1000.0] |", "| mfu_packed | 25.0% |"):
        assert line in table
    assert "8 rows of 64 in 2 microbatches, attention xla, remat none, jax 1.0, peak a data sheet" in table
    assert "hardware a chip" in table
    path.write_text("{}")
    with pytest.raises(ConfigError, match="a results folder must be"):
        table_of(path)


def test_a_kill_test_says_where_it_killed_and_what_differed(tmp_path):
    report = {"seed": 3, "phases": {"startup": 4, "step": 2}, "kills": [{}] * 6, "runs": [{}, {}], "differences": 0,
              "damaged_checkpoints": 1}  # fmt: skip
    (tmp_path / "kill_test.json").write_text(json.dumps(report))
    table = table_of(tmp_path)
    assert "| startup | 4 |\n| step | 2 |" in table
    assert "6 kills over 2 runs, 0 differences in parameters, losses or score, 1 damaged checkpoints" in table


def test_a_config_folder_with_one_run_stands_for_it(tmp_path):
    run = training_run(tmp_path / "quick/abcd")
    assert table_of(tmp_path / "quick") == table_of(run)


def test_a_campaign_says_what_is_corrected_and_promoted(tmp_path):
    assert "| greedy | 9 | 8 | +0.2500 | none | 1 |" in table_of(campaign(tmp_path / "c"))


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="finished"):
        table_of(tmp_path)


def test_blocks_are_filled_in_and_the_rest_stays(tmp_path):
    training_run(tmp_path / "a")
    text = "before\n<!-- results: a -->\nold\n<!-- end of results -->\nbetween\n<!-- results: b -->\nkept\n<!-- end of results -->\nafter\n"
    new, absent = fill_in(text, tmp_path)
    assert "old" not in new
    assert "| this model | 1.5000 |" in new
    assert "kept" in new
    assert len(absent) == 1
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert fill_in(new, tmp_path)[0] == new, "filling in again changes nothing"


def test_the_command_names_what_it_left_alone(tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text("<!-- results: nowhere -->\n<!-- end of results -->\n")
    assert main(["--into", str(document), "--root", str(tmp_path)]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["--into", str(tmp_path / "absent.md")]) == 2


ROW = "| a run | `make it` | old, \\| 1 <!-- result: a --> |\n"


def test_a_row_is_filled_in_with_its_source_and_its_words_stay(tmp_path):
    origin = {"commit": "abc+", "hardware": "2 x a chip"}
    training_run(tmp_path / "a", origin=origin)
    text = f"| what | command | result |\n|---|---|---|\n{ROW}| no run | `b` | kept | \n"
    new, absent = fill_in(text, tmp_path)
    assert absent == []
    assert new.startswith(
        "| what | command | result |\n|---|---|---|\n| a run | `make it` | 1.500 bits per byte held out; xz"
    )
    for fact in (
        "unigram 4.500 (12,345 parameters",
        "hardware 1 x cpu of 2 x a chip; commit abc+; seeds 7) <!-- res",
    ):
        assert fact in new
    assert "old" not in new
    assert new.endswith("<!-- result: a --> |\n| no run | `b` | kept | \n")
    assert fill_in(new, tmp_path)[0] == new


def test_a_row_without_its_folder_is_left_alone_and_named(tmp_path):
    text, absent = fill_in(ROW, tmp_path)
    assert text == ROW
    (fault,) = absent
    assert f"{tmp_path / 'a'} is not there" in fault


def test_no_result_can_break_its_row(tmp_path):
    training_run(tmp_path / "a", val_bits_per_byte=1.5, baseline_bits_per_byte={"a | b\nc": 2.0})
    new, _ = fill_in(ROW, tmp_path)
    assert new.count("\n") == 1
    assert len(re.findall(r"(?<!\\)\|", new)) == 4
    assert fill_in(new, tmp_path)[0] == new


def test_a_run_of_another_objective_says_its_last_words(tmp_path):
    run = training_run(tmp_path / "a", closing=["held-out accuracy 90.0 %", "12,345 parameters, 3 s"])
    summary = json.loads((run / "summary.json").read_text())
    del summary["val_bits_per_byte"]
    (run / "summary.json").write_text(json.dumps(summary))
    found = results_of(run)
    assert found.line == "held-out accuracy 90.0 %"
    assert found.table == "- held-out accuracy 90.0 %"


def test_a_study_gives_every_seed_and_the_origin_of_its_runs(tmp_path):
    arms = [
        {"seed": seed, "name": name, "accuracy": value, "num_problems": 200, "params": 1000, "seconds": 30.0,
         "curve": [[5, 0.5], [10, value]] if name == "reward" else []}
        for name, values in (("base", (0.0, 0.015)), ("reward", (0.995, 0.95)))
        for seed, value in zip((4, 5), values, strict=True)
    ]  # fmt: skip
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(arms))
    assert "commit not recorded" in results_of(folder).page()
    training_run(tmp_path / "reward/0123", origin={"commit": "abc", "hardware": "a chip"})
    found = results_of(folder)
    assert "| 4 | 0.0% | 99.5% |\n| 5 | 1.5% | 95.0% |" in found.table
    assert found.line == "base 0.0%, 1.5%; reward 99.5%, 95.0%"
    assert "1,000 parameters, 200 held-out problems, greedy, 2.0 process minutes, 10 steps" in found.facts
    assert found.source == "hardware a chip; commit abc; seeds 4, 5"


def test_ideators_show_mean_and_maximum(tmp_path):
    def at(value):
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    row = {
        "name": "grpo",
        "start": {"mean": at(0.2), "maximum": at(0.3)},
        "end": {"mean": at(0.25), "maximum": at(0.31)},
        "cures": False,
    }
    summary = {"variants": [row], "num_epochs": 70, "samples_per_epoch": 128, "baseline_value": 0.333}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(json.dumps({"seeds": [10, 11]}))
    found = results_of(tmp_path)
    assert "| grpo | 0.200 -> 0.250 [0.240, 0.260] | 0.300 -> 0.310 [0.300, 0.320] | no |" in found.table
    assert "70 epochs of 128 ideas, without change 0.333" in found.facts
    assert found.seeds == "10, 11"


def test_a_transfer_says_what_a_change_was_worth_there_and_here(tmp_path):
    report = {
        "multiplier": 0.3, "interval": [0.24, 0.38], "pairs": 8, "campaign_gain": 0.054, "campaign_interval": [0.01, 0.097],
        "verdict": "reversed", "largest_params": 5000, "replayed": ["lr"],
        "budgets": [{"budget_flops": 1e9, "pairs": 4, "multiplier": 0.31, "loss_difference": 0.02}],
    }  # fmt: skip
    (tmp_path / "transfer.json").write_text(json.dumps(report))
    ladder = {"origin": {"commit": "abc", "hardware": "a chip"}, "cells": [{"seed": 1}, {"seed": 0}]}
    (tmp_path / "report.json").write_text(json.dumps(ladder))
    (tmp_path / "report.html").touch()
    found = results_of(tmp_path)
    assert found.line == (
        "gain in the campaign +0.054 [+0.010, +0.097]; here 0.30 [0.24, 0.38] times the compute, 8 pairs: reversed"
    )
    assert found.source == "hardware a chip; commit abc; seeds 0, 1"


def test_an_evaluation_shows_intervals_where_there_are_any_and_the_base(tmp_path):
    def of(value, low=None, high=None):
        return {"value": value, "low": low, "high": high, "items": 9}

    entry = {"version": 2, "metrics": {"accuracy": of(0.5, 0.4, 0.6)}, "base": {"accuracy": of(0.25)}}
    whole = {"version": 1, "metrics": {"f1": of(0.125)}}
    report = {"tasks": {"sums": entry, "spans": whole}, "config": {"seed": 3}}
    (tmp_path / "results.json").write_text(json.dumps(report))
    found = results_of(tmp_path)
    assert (
        "| sums v2 | accuracy | 0.5000 [0.4000, 0.6000] | 0.2500 |\n| spans v1 | f1 | 0.1250 |  |"
        in found.table
    )
    assert found.line == "sums accuracy 0.5000 [0.4000, 0.6000], base 0.2500; spans f1 0.1250"


def test_reports_of_single_benchmarks_have_rows_too(tmp_path):
    step = {"turns": 9, "dtype": "float32", "dropped_blocks": 1, "shape": {"name": "10m"}, "entrants": [
        {"name": "ours"}, {"name": "peer", "our_speed": 1.25, "our_speed_range": [1.0, 1.5], "pairs": 8}]}  # fmt: skip
    path = tmp_path / "step.json"
    path.write_text(json.dumps(step))
    assert (
        results_of(path).line == "training step: pretrain.step 1.25 [1.00..1.50] x the speed of peer, 8 pairs"
    )
    spread = {"median": 1.16, "least": 1.09, "greatest": 1.21}
    peer = {"our_speed": spread, "our_processor_speed": spread, "same_ids_as_ours": 1.0}
    asked = {"folder": "m/smol", "batch": 16, "new_tokens": 64, "prompt_tokens": 64, "pairs": 5}
    path.write_text(
        json.dumps({"options": asked, "origin": {"commit": "abc"}, "entrants": {"ours": {}, "hf": peer}})
    )
    found = results_of(path)
    assert found.line == (
        "generation, smol, 16 texts, 64 tokens after 64: pretrain.generate 1.16 [1.09..1.21] x the speed of hf, 5 pairs"
    )
    assert "by processor time; 100.0% of ids the same" in found.table
    assert "commit abc" in found.source


def test_a_report_of_older_code_is_named_and_not_a_crash(tmp_path):
    (tmp_path / "kill_test.json").write_text("{}")
    with pytest.raises(ConfigError, match="it lacks 'kills'"):
        results_of(tmp_path)
