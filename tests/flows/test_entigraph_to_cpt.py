"""Flow (b): fictional documents to texts, a base, arms, scores and a table, through the command that people call."""

import json
from pathlib import Path

import pytest

from synth.main import main

pytestmark = pytest.mark.slow

SMOKE = str(Path(__file__).parents[2] / "configs/synth/entigraph_worlds_smoke.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    assert main(["--config", SMOKE, f"run.workdir={folder}"]) == 0
    return folder


def test_every_arm_is_asked_at_every_budget_beside_the_base_closed_and_open(workdir):
    results = json.loads((workdir / "results.json").read_text())
    lines = [(entry["arm"], entry["tokens"]) for entry in results["entries"]]
    assert lines == [
        ("base", 0),
        ("base, open book", 0),
        ("raw", 1152),
        ("raw", 2304),
        ("entigraph", 1152),
        ("entigraph", 2304),
        ("entigraph, open book", 2304),
    ]
    for entry in results["entries"]:
        kinds = entry["accuracy"]
        assert kinds["all"]["num_questions"] == sum(
            kinds[kind]["num_questions"] for kind in ("same", "reverse", "hop2")
        )
        assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in kinds.values())


def test_the_gates_are_printed_with_the_result(workdir):
    page = (workdir / "results.md").read_text()
    assert "base seed1: closed book" in page
    assert "the gates: FAILED" in page  # two steps teach nobody to read
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing_and_writes_the_same_bytes(workdir, capsys):
    names = ("results.json", "results.md", "results.png")
    before = [(workdir / name).read_bytes() for name in names]
    trained = {path: path.stat().st_mtime_ns for path in workdir.glob("training/*/*/summary.json")}
    (workdir / "scores" / "00000-of-00001.done.json").unlink()
    assert main(["--config", SMOKE, f"run.workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "tunings: 2 out (complete before, nothing to do)" in out
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert len(trained) == 3
    assert [(workdir / name).read_bytes() for name in names] == before


def test_a_failed_gate_ends_the_run_before_its_arms(workdir, tmp_path, capsys):
    folder = tmp_path / "copy"
    for name in ("texts", "bases", "base_scores"):
        for path in (workdir / name).rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(workdir)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    assert main(["--config", SMOKE, f"run.workdir={folder}", "gates.stop=true"]) == 6
    assert "must reach 0.85 with the book open" in capsys.readouterr().err
    assert not (folder / "tunings").exists()
