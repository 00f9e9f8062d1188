"""Flow (c): documents to pairs, to a synthesizer, to new documents, to the table of arms; with the smoke config."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pretrain.config import apply_overrides, load_config
from synth.main import main
from synth.shards import read_documents

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SMOKE = str(ROOT / "configs/synth/sbp_smoke.py")


def run(workdir: Path, *overrides: str) -> int:
    return main(["--config", SMOKE, f"run.workdir={workdir}", *overrides])


def documents(folder: Path):
    return [d for path in sorted(folder.glob("*.jsonl.zst")) for d in read_documents(path)]


def outputs(workdir: Path) -> dict[str, bytes]:
    """What stages left; the files that training reads and writes are below `training` and named by their content."""
    return {
        p.relative_to(workdir).as_posix(): p.read_bytes()
        for p in sorted(workdir.glob("seed*/*/0*.jsonl.zst"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sbp")
    assert run(workdir) == 0
    return workdir


def test_the_run_leaves_a_table_and_a_picture(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["nats_per_token"]) == {"repetition", "self_samples", "random_pair", "sbp", "oracle"}
    assert set(results["differences"]) == {"repetition - sbp", "random_pair - sbp", "self_samples - sbp"}
    assert set(results["flops"]) >= {"reference", "embed", "tune_pair", "texts_sbp", "one run of sbp"}
    assert 0 < results["floors"]["best possible"] < min(e["mean"] for e in results["nats_per_token"].values())
    assert (finished / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "results.md").read_text()
    for word in ("of the oracle's gain", "tuned on", "paper, 1T 6B", "corpus_copy", "FLOPs"):
        assert word in page, word


def test_every_synthetic_text_names_its_seed_and_each_seed_is_used_once(finished):
    config = load_config(SMOKE)
    seeds = {d.id for d in documents(finished / "seed0/unique")}
    for label, has_parent in (("sbp", True), ("random", True), ("self", False)):
        folder = finished / f"seed0/texts_{label}"
        texts = documents(folder)
        used = Counter((t.meta["seed_document"], t.meta["sample"]) for t in texts)
        left_out = [
            json.loads(line) for p in folder.glob("*.errors.jsonl") for line in p.read_text().splitlines()
        ]
        used.update((f["document"], int(f["item"].rsplit(":", 1)[1])) for f in left_out)
        assert used == Counter((s, n) for s in seeds for n in range(config.synthesis.samples_per_document))
        for text in texts:
            assert text.parents == ((text.meta["seed_document"],) if has_parent else ())
            assert text.made_by
            assert len(text.meta["model"]) == 64


def test_synthetic_rows_are_read_once_and_arms_read_equal_tokens(finished):
    trials = [d.meta for d in documents(finished / "seed0/trials")]
    whole = {t["train_tokens"] for t in trials if t["trial"]["arm"] != "repetition"}
    assert len(whole) == 1
    assert max(t["train_tokens"] for t in trials) in whole
    steps, batch_rows = load_config(SMOKE).trials.num_steps, load_config(SMOKE).learner.batch_rows
    for trial in trials:
        if trial["trial"]["share"]:
            (rows,) = (n for name, n in trial["rows"].items() if name.startswith("texts_"))
            assert rows >= trial["trial"]["share"] * steps * batch_rows


def test_a_synthesizer_starts_from_the_bits_of_the_reference(finished):
    (reference,) = documents(finished / "seed0/reference")
    config = json.loads(next(finished.glob("seed0/training/tune_pair/*/config.json")).read_text())
    began_from = json.loads((Path(config["init"]).parent / "summary.json").read_text())
    assert began_from["params_sha256"] == reference.meta["params_sha256"]


def test_the_same_command_again_has_nothing_to_do(finished, capsys):
    before = outputs(finished)
    assert run(finished) == 0
    said = capsys.readouterr().out
    assert said.count("complete before, nothing to do") == len({path.split("/")[1] for path in before})
    assert outputs(finished) == before


def test_another_recipe_is_refused_and_says_which_field(finished, capsys):
    assert run(finished, "synthesis.samples_per_document=4") == 2
    assert "samples_per_document was 3, is now 4" in capsys.readouterr().err


def test_too_little_synthetic_text_is_refused_before_arms_are_trained(finished, tmp_path):
    config = apply_overrides(load_config(SMOKE), [f"run.workdir={finished}", "trials.num_steps=4000"])
    (stage,) = (s for s in config.stages(0) if s.name == "trials")
    assert stage.trials.num_steps == 4000
    assert run(finished, "trials.num_steps=4000", "run.fresh=('trials',)") == 2
    assert run(finished) == 0  # the runs themselves are kept


def test_a_gate_that_is_not_passed_stops_before_synthesis(finished, tmp_path, capsys):
    assert run(finished, "gate.min_gain_nats=9.0", "run.fresh=('gate',)") == 6
    assert "random pairs" in capsys.readouterr().err
    assert not list((finished / "seed0/texts_sbp").glob("*.done.json"))
