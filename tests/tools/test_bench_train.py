"""The step benchmark runs the real step on packed rows and adds up what a profiler saw."""

import json
import types

import numpy as np
import pytest

from pretrain.config import load_config
from tools import bench_train as bench

SMOKE = "configs/pretrain/smoke.py"


def test_the_smoke_config_is_measured(tmp_path, capsys):
    out = tmp_path / "step.json"
    argv = [
        "--config",
        SMOKE,
        f"bench.out={out}",
        "bench.blocks=2",
        "bench.steps=1",
        "bench.median_document=10",
    ]
    assert bench.main(argv) == 0
    report = json.loads(out.read_text())
    assert report["tokens_per_second"] == pytest.approx(
        report["rows"] * report["row_length"] / report["step_s"]
    )
    # The batch stays the same, so the loss falls; documents need less than whole rows.
    assert report["losses"][-1] < report["losses"][0]
    assert 0 < report["mfu_packed"] < report["mfu"]
    assert report["attention"] == "xla"
    assert "tokens/s" in capsys.readouterr().out


def test_rows_are_documents_end_to_end():
    config = load_config(SMOKE)
    batch = bench.rows(config, median_document=10, seed=1)
    for ids, positions, weights in zip(
        batch.segment_ids_BT1, batch.positions_BT1, batch.weights_BT, strict=True
    ):
        starts = np.flatnonzero(positions == 0)
        assert len(starts) == ids[-1] == len(np.unique(ids))
        np.testing.assert_array_equal(np.diff(positions)[np.diff(ids) == 0], 1)
        np.testing.assert_array_equal(weights == 0, np.diff(ids) != 0)


def test_kernels_of_all_streams_add_up():
    def line(name, **events):
        kernels = [types.SimpleNamespace(name=n, duration_ns=1e6 * ms) for n, ms in events.items()]
        return types.SimpleNamespace(name=name, events=kernels)

    planes = [
        types.SimpleNamespace(name="/host:CPU", lines=[line("Stream #1", other=100)]),
        types.SimpleNamespace(
            name="/device:GPU:0",
            lines=[line("Stream #1", a=4, b=2), line("Stream #2", a=4), line("XLA Ops", a=8)],
        ),
    ]
    found = bench.summed(types.SimpleNamespace(planes=planes), num_steps=2, top=1)
    assert found == {"busy_ms": 5.0, "top": [{"name": "a", "ms": 4.0, "calls": 1.0}], "others_ms": 1.0}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bench.blocks=0", "bench.blocks must be positive, got 0"),
        ("bench.bloks=1", "bloks"),
        ("model.num_layers=0", "model.num_layers must be positive, got 0"),
    ],
)
def test_bad_arguments_are_refused(argument, message, capsys):
    assert bench.main(["--config", SMOKE, argument]) == 2
    assert message in capsys.readouterr().err
