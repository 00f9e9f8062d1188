"""Flow (a): documents to a loss, with the smoke config, through the entry point that people call."""

import gzip
import json
from pathlib import Path

import pytest

from pretrain.main import main

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/pretrain/smoke.py")


def run(*overrides: str) -> int:
    return main(["--config", SMOKE, "run.writers=()", *overrides])


def run_folder(workdir: Path) -> Path:
    (folder,) = (workdir / "smoke").iterdir()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert run(f"run.workdir={workdir}") == 0
    return run_folder(workdir)


def test_a_run_leaves_what_the_readme_promises(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "loss.png", "samples.txt", "checkpoints"} <= names
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == 30
    assert set(summary["baseline_bits_per_byte"]) == {"unigram", "bigram", "xz"}
    assert summary["val_bits_per_byte"] < summary["baseline_bits_per_byte"]["unigram"]
    assert summary["val_bits_per_byte_by_source"].keys() == {"rhymes"}
    for key in ("train_tokens", "params", "params_sha256", "tokens_per_second", "mfu", "seconds", "device"):
        assert summary[key]


def test_the_loss_falls(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]


def test_the_same_command_again_has_nothing_to_do(uninterrupted, capsys):
    before = (uninterrupted / "summary.json").stat().st_mtime_ns
    assert run(f"run.workdir={uninterrupted.parents[1]}") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (uninterrupted / "summary.json").stat().st_mtime_ns == before


def test_stopping_and_going_on_equals_the_uninterrupted_run(uninterrupted, tmp_path):
    """Stops inside a checkpoint interval and at its end; the bits of all parameters are compared."""
    for stop in (7, 20, 30):
        assert run(f"run.workdir={tmp_path}", f"run.stop_step={stop}") == 0
        summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
        assert summary["steps"] == stop
    wanted = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["params_sha256"] == wanted["params_sha256"]
    assert summary["val_bits_per_byte"] == wanted["val_bits_per_byte"]


@pytest.mark.slow
def test_stopping_at_every_step_of_a_short_run_changes_no_bit(tmp_path):
    """Every call goes on from the checkpoint of the one before; parameters, moments and windows are compared by hash."""
    short = (
        "run.num_steps=4", "run.log_every_steps=1", "run.eval_every_steps=2", "checkpoint.every_steps=1",
        "checkpoint.keep_last=9", "model.num_layers=1", "sample.prompts=()", "optim.schedule.num_warmup_steps=1",
    )  # fmt: skip
    assert run(f"run.workdir={tmp_path / 'whole'}", *short) == 0
    for stop in range(1, 5):
        assert run(f"run.workdir={tmp_path / 'parted'}", *short, f"run.stop_step={stop}") == 0
    leaves, lines = {}, {}
    for name in ("whole", "parted"):
        folder = run_folder(tmp_path / name)
        manifests = [json.loads((folder / f"checkpoints/{k}/manifest.json").read_text()) for k in range(1, 5)]
        leaves[name] = [{e["leaf"]: e["hash"] for e in m["body"]["leaves"]} for m in manifests]
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[name] = {(x["kind"], x["step"]): x.get("loss", x.get("bits_per_byte")) for x in found}
    assert any(leaf.startswith("opt_state.") for leaf in leaves["whole"][0])
    for step, (whole, parted) in enumerate(zip(leaves["whole"], leaves["parted"], strict=True), 1):
        assert parted == whole, f"step {step}"
    assert {("train", step) for step in range(1, 5)} | {("eval", 2), ("eval", 4)} <= lines["whole"].keys()
    assert {key: lines["parted"].get(key) for key in lines["whole"]} == lines["whole"]


def test_a_run_that_goes_on_holds_no_step_twice(uninterrupted, tmp_path):
    run(f"run.workdir={tmp_path}", "run.stop_step=15")
    run(f"run.workdir={tmp_path}")
    steps = {}
    for folder in (uninterrupted, run_folder(tmp_path)):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps[folder] = [
            (line["kind"], line["step"], line.get("loss", line.get("bits_per_byte"))) for line in lines
        ]
    assert len(set(steps[uninterrupted])) == len(steps[uninterrupted])
    assert set(steps[uninterrupted]) == set(steps[run_folder(tmp_path)])


JSONL = """
import dataclasses
from pretrain.config import load_config
from pretrain.data.source import JsonlConfig

def get_config():
    config = load_config({smoke!r})
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=(JsonlConfig(name="mine", path="corpus.jsonl"),))
    )
"""


def corpus_run(folder: Path, corpus: bytes | None, *overrides: str) -> int:
    config = folder / "mine.py"
    config.write_text(JSONL.format(smoke=SMOKE))
    if corpus is not None:
        (folder / "corpus.jsonl").write_bytes(corpus)
    return main(
        [
            "--config",
            str(config),
            "run.writers=()",
            f"data.root={folder}",
            f"run.workdir={folder / 'runs'}",
            *overrides,
        ]
    )


GOOD = b"".join(json.dumps({"id": str(i), "text": f"line {i} of many"}).encode() + b"\n" for i in range(60))


@pytest.mark.parametrize(
    ("corpus", "overrides", "words"),
    [
        (None, (), ["corpus.jsonl", "not there"]),
        (b"", (), ["mine", "documents"]),
        (GOOD + b'{"text": \n', (), ["corpus.jsonl:61", "JSON"]),
        (GOOD + b'{"text": "\xff"}\n', (), ["corpus.jsonl:61", "UTF-8"]),
        (GOOD, ("run.num_stps=3",), ["run.num_stps", "did you mean run.num_steps"]),
        (GOOD, ("run.num_steps=few",), ["run.num_steps", "integer", "few"]),
        (GOOD, ("data.row_length=1",), ["row_length"]),
        (GOOD, ("mesh.fsdp=3",), ["mesh", "multiply"]),
        (GOOD, ("init=/nowhere",), ["checkpoint", "/nowhere"]),
        (GOOD, ("run.num_microbatches=3",), ["batch_rows", "microbatches"]),
        (GOOD, ("optim.weight_decay=nan",), ["optim.weight_decay must be a number", "nan"]),
        (GOOD, ("data.sources.mine.max_epochs=0.1",), ["max_epochs", "run.num_steps"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, corpus, overrides, words):
    code = corpus_run(tmp_path, corpus, *overrides)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (2, 3)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert not list((tmp_path / "runs").glob("mine/*")), "refused before the run has a folder"


def test_a_corpus_that_changed_under_its_rows_is_refused(tmp_path, capsys):
    assert corpus_run(tmp_path, GOOD, "run.stop_step=1") == 0
    assert corpus_run(tmp_path, GOOD.replace(b"line 7", b"LINE 7"), "run.stop_step=2") == 2
    assert "rebuild" in capsys.readouterr().err


def test_a_counted_bad_record_is_reported(tmp_path):
    assert (
        corpus_run(tmp_path, GOOD + b"{\n", "data.sources.mine.on_bad_record=count", "run.stop_step=1") == 0
    )
    (folder,) = (tmp_path / "runs/mine").iterdir()
    assert '"bad_records": 1' in (folder / "summary.json").read_text()


def test_compressed_corpora_are_read_by_their_ending(tmp_path):
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(GOOD))
    assert corpus_run(tmp_path, None, "data.sources.mine.path=corpus.jsonl.gz", "run.stop_step=1") == 0
