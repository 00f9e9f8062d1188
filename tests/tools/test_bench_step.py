"""The comparison is fair: one entrant at a time, order alternating, ratios within a turn, bad input refused."""

import itertools
import json
import math

import jax
import pytest

from pretrain.model.transformer import abstract_params
from tools import bench_step, our_step

TINY = {"D": 32, "L": 1, "N": 2, "F": 128, "V": 64, "B": 2, "T": 16}

PEERS = """
import json, os, time

def factory(seconds):
    def make(shape):
        def step():
            start = time.monotonic()
            time.sleep(seconds)
            with open(os.environ["SEEN"], "a") as file:
                file.write(json.dumps([seconds, start, time.monotonic()]) + "\\n")
            return 1.0
        print("a framework that talks on standard output")
        return step, {"params": shape["D"], "note": "sleeps"}
    return make

fast, slow = factory(0.02), factory(0.06)

def dies(shape):
    os._exit(9)
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Peers on the path; the file where they write when they worked."""
    (tmp_path / "sleepers.py").write_text(PEERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    return tmp_path / "seen.jsonl"


def _compared(pairs: int, block: int) -> dict:
    entrants = [bench_step.Entrant(f"sleepers:{name}", TINY, 1) for name in ("fast", "slow")]
    try:
        # The sleepers take no processor time, so whatever runs beside this test does not change their blocks.
        return bench_step.compare(
            entrants, bench_step.Options(pairs=pairs, block=block, max_foreign=math.inf)
        )
    finally:
        for entrant in entrants:
            entrant.close()


def test_entrants_work_one_at_a_time_and_the_order_alternates(seen):
    _compared(pairs=3, block=2)
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    timed = lines[2:]  # after one step of warmup each
    assert all(before[2] <= after[1] for before, after in itertools.pairwise(timed))
    assert [line[0] for line in timed] == [0.02] * 2 + [0.06] * 4 + [0.02] * 4 + [0.06] * 2


def test_speed_is_the_ratio_of_medians_within_a_turn(seen):
    report = _compared(pairs=3, block=2)
    ours, peer = report["entrants"]
    assert ours["our_speed_range"] == [1.0, 1.0]
    assert peer["pairs"] == 3
    # 3 on a machine that wakes sleepers at once; a loaded one adds the same delay to both.
    assert 1.2 < peer["our_speed"] < 6
    assert peer["median_s"] >= 0.06
    assert (peer["params"], peer["note"], peer["counted_steps"]) == (32, "sleeps", 6)
    assert "sleepers:slow" in bench_step.table(report)


def test_blocks_in_which_others_worked_are_not_counted(seen, monkeypatch):
    entrant = bench_step.Entrant("sleepers:fast", TINY, 1)
    clock = itertools.count(step=10.0)  # ten seconds of somebody's work at each look
    monkeypatch.setattr(bench_step, "_busy_s", lambda: next(clock))
    try:
        assert entrant.run(1, max_foreign=0.06) is None
        assert entrant.step_s == []
        assert entrant.run(1, max_foreign=math.inf) is not None
    finally:
        entrant.close()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["shape=3m"], "shape must be one of 0.87m, 10m"),
        (["peers=nowhere"], "a peer must be module:function, got 'nowhere'"),
        (["pears=a:b"], "did you mean peers?"),
        (["block=0"], "block must be positive, got 0"),
    ],
)
def test_bad_options_are_one_line_and_code_2(arguments, fault, capsys):
    assert bench_step.main(arguments) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere_at_all:factory", "must be importable"),
        ("sleepers:missing", "has no 'missing'"),
        ("sleepers:dies", "its process died"),
    ],
)
def test_a_peer_that_cannot_start_is_named(seen, name, fault):
    with pytest.raises(bench_step.ConfigError, match=fault):
        bench_step.Entrant(name, TINY, 1)


@pytest.mark.parametrize("name", bench_step.SHAPES)
def test_our_model_has_as_many_parameters_as_a_peer(name):
    shape = bench_step.SHAPES[name]
    D, L, F, V, T = (shape[letter] for letter in "DLFVT")
    peer = V * D + T * D + L * (4 * D * D + 2 * D * F + 2 * D) + D
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(our_step.model_config(shape), V)))
    assert abs(ours / peer - 1) < 0.002
    assert peer == {"0.87m": 869_504, "10m": 9_999_040}[name]


def test_our_rows_are_packed():
    batch = our_step.rows(TINY)
    for segments, positions in zip(batch.segment_ids_BT1, batch.positions_BT1, strict=True):
        runs = [list(group) for _, group in itertools.groupby(segments)]
        assert positions.tolist() == [i for run in runs for i in range(len(run))]
        assert len(runs) > 1


@pytest.mark.slow
def test_our_step_learns_its_batch_and_the_report_is_written(seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_step.SHAPES, "0.87m", TINY)
    out = tmp_path / "report.json"
    arguments = ["peers=sleepers:fast", "pairs=1", "block=2", "warmup=200", "max_foreign=9", f"out={out}"]
    assert bench_step.main(arguments) == 0
    ours, peer = json.loads(out.read_text())["entrants"]
    assert ours["last_warmup_loss"] < ours["first_loss"]
    assert peer["our_speed"] > 0
    assert "tools.our_step:factory" in capsys.readouterr().out


@pytest.mark.slow
def test_the_peer_of_the_extra_learns_its_batch_at_nearly_our_size():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    step, info = bench_step.load_factory("tools.peer_transformers:gpt2_step")(bench_step.SHAPES["0.87m"])
    assert info["params"] == pytest.approx(869_504, rel=0.01)
    first = step()
    assert all(step() < first for _ in range(5))
