"""Tables come from run folders, with their source; a document's blocks are filled in and nothing else is touched."""

import json

import pytest

from pretrain.config import ConfigError
from tools.results import fill_in, main, table_of


def training_run(folder):
    folder.mkdir(parents=True)
    summary = {
        "val_bits_per_byte": 1.5, "baseline_bits_per_byte": {"unigram": 4.5, "xz": 2.25}, "params": 12345,
        "train_tokens": 67890, "tokens_per_second": 1000.4, "seconds": 90.0, "device": "1 x cpu",
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
    for fact in ("12,345 parameters", "1.5 minutes", "1 x cpu", "seeds 7", "commit not recorded"):
        assert fact in table


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
