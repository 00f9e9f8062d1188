"""Tables come from run folders, with their source; a document's blocks are filled in and nothing else is touched."""

import json

import pytest

from pretrain.config import ConfigError
from tools.results import fill_in, main, table_of


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
