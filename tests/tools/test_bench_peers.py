"""Turns alternate, ratios are those of neighbors in time, all who search find the same, and levels are only those held."""

import itertools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tools import bench_peers
from tools.bench_pairs import BenchConfig
from tools.bench_peers import PLAIN, Options, compare_pairing, compare_sandbox, main, take_turns

SMALL = BenchConfig(num_vectors=600, width=64, num_files=2, centers=20, num_neighbors=5)


def test_turns_alternate_after_one_that_is_not_counted():
    order, clock = [], itertools.count(step=3.0)
    entrants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = take_turns(entrants, 3, clock=lambda: next(clock))
    assert order == list("ababbaab")
    assert seconds == {"a": [3.0] * 3, "b": [3.0] * 3}


def test_a_row_is_median_and_range():
    row = bench_peers.ratio("w", "o", "p", "speed", [3.0, 1.0, 2.0], "n")
    assert (row.median, row.least, row.greatest, row.pairs) == (2.0, 1.0, 3.0, 3)


def test_all_who_search_exactly_find_the_same_neighbors():
    report = compare_pairing(Options(pairs=2, num_queries=50, vectors=SMALL))
    assert report["recall"]["exact"] == 1
    peers = {bench_peers.FAISS, bench_peers.SKLEARN} - report["left_out"].keys()
    assert all(report["recall"][peer] > 0.99 for peer in peers)
    assert report["recall"]["inverted lists"] > 0.5
    assert {(row.ours, row.peer) for row in report["rows"]} == {
        (ours, peer) for ours in ("Exact", "InvertedLists") for peer in peers
    }
    assert all(row.pairs == 2 and 0 < row.least <= row.median for row in report["rows"])


def test_the_index_counts_once_and_queries_as_often_as_there_are_documents(monkeypatch):
    """600 documents and 50 queries: twelve times the seconds of a turn, and the index once."""
    turns = {"inverted lists": [1.0], "exact": [2.0], bench_peers.FAISS: [6.0], bench_peers.SKLEARN: [6.0]}
    monkeypatch.setattr(
        bench_peers, "take_turns", lambda entrants, pairs: {name: turns[name] for name in entrants}
    )
    report = compare_pairing(Options(pairs=1, num_queries=50, vectors=SMALL))
    by_ours = {row.ours: row.median for row in report["rows"]}
    assert by_ours["Exact"] == 3.0
    assert by_ours["InvertedLists"] == pytest.approx(12 * 6.0 / (report["build_s"] + 12 * 1.0))


def test_an_absent_peer_is_left_out_with_its_reason(monkeypatch):
    find = bench_peers.importlib.util.find_spec
    monkeypatch.setattr(
        bench_peers.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    report = compare_pairing(Options(pairs=1, num_queries=20, vectors=SMALL))
    assert "not installed" in report["left_out"][bench_peers.SKLEARN]
    assert {row.peer for row in report["rows"]} == {bench_peers.FAISS}


def test_the_peers_are_named_where_one_installs_them_and_pinned():
    root = Path(bench_peers.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["peers"]]
    pinned = re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text(), re.MULTILINE)
    for package in ("scikit-learn", "faiss-cpu", "torch", "transformers", "scipy"):
        assert package in named
        assert package in pinned


def test_a_document_is_not_its_own_neighbor():
    queries = np.array([4, 7])
    rows_QR = np.array([[4, 1, 2], [3, 7, 5]])
    assert bench_peers._neighbors(([], rows_QR), queries) == [{1, 2}, {3, 5}]
    assert bench_peers._neighbors([rows_QR[:1], rows_QR[1:]], queries) == [{1, 2}, {3, 5}]


def test_every_level_is_measured_or_has_a_reason():
    report = compare_sandbox(Options(what="sandbox", pairs=2))
    measured = {row.ours for row in report["rows"] if row.peer == PLAIN}
    assert measured | set(report["left_out"]) >= set(bench_peers.LEVELS)
    assert not measured & set(report["left_out"])
    assert all(row.ratio_of == "seconds" for row in report["rows"])
    # A jail starts the same process and more.
    assert all(row.median > 1 for row in report["rows"] if row.peer == PLAIN)


def test_a_host_without_a_program_says_so(monkeypatch):
    monkeypatch.setitem(bench_peers.BARE, "bwrap", ["no-such-program"])
    monkeypatch.setattr(bench_peers, "LEVELS", ("bwrap",))
    held = bench_peers.probe("landlock")  # any level that was probed: only its checks are read
    monkeypatch.setattr(
        bench_peers, "probe", lambda level: bench_peers.dataclasses.replace(held, level=level, checks=())
    )
    monkeypatch.setattr(bench_peers, "measure_launch_s", lambda level, num_runs: [0.0])
    report = compare_sandbox(Options(what="sandbox", pairs=1))
    assert report["left_out"] == {"a bare bwrap": "no-such-program is not installed"}
    assert bench_peers._fault(["false"]) == "false fails: "


def test_the_report_is_written_and_said(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["what=sandbox", "pairs=1", f"out={out}"]) == 0
    assert json.loads(out.read_text())["seconds"][PLAIN]
    said = capsys.readouterr().out
    assert PLAIN in said or "left out" in said


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["what=cooking"], "what must be one of pairing, sandbox, got 'cooking'"),
        (["pairs=0"], "pairs must be positive, got 0"),
        (["num_queries=0"], "num_queries must lie in [1, 100000], the number of vectors, got 0"),
    ],
)
def test_bad_options_are_one_line_and_code_2(arguments, fault, capsys):
    assert main(arguments) == 2
    assert fault in capsys.readouterr().err
