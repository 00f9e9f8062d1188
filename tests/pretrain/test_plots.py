"""Pictures: names never collide, smoothing keeps lines straight, every run folder can be drawn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import plots


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@given(places=st.lists(st.floats(0, 1), max_size=12).map(sorted))
def test_spread_keeps_order_and_gap_and_moves_nothing_that_fits(places):
    moved = plots.spread(places, gap=0.05)
    assert len(moved) == len(places)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    if all(b - a >= 0.05 for a, b in zip(places, places[1:], strict=False)):
        assert moved == pytest.approx(places)
    assert np.mean(moved or [0]) == pytest.approx(np.mean(places or [0]))  # least squares keeps the center


@given(slope=st.floats(-5, 5), span=st.integers(1, 20))
def test_smoothing_keeps_a_straight_line_straight_away_from_its_ends(slope, span):
    line = slope * np.arange(100.0)
    inside = slice(span, 100 - span)
    np.testing.assert_allclose(plots.smooth(line, span=span)[inside], line[inside], atol=1e-9)


def test_smoothing_skips_what_is_not_finite():
    smoothed = plots.smooth([1.0, math.nan, 1.0, math.inf, 1.0], span=2)
    np.testing.assert_allclose(smoothed, [1.0, math.nan, 1.0, math.nan, 1.0])


def write_run(folder, records, summary=None):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def test_a_finished_run_is_drawn_with_its_sources_and_baselines(tmp_path):
    records = [
        {"step": s, "kind": "train", "loss": 5.0 / s, "loss_by_source": {"a": 6.0 / s, "b": 4.0 / s}}
        for s in range(1, 50)
    ]
    records += [
        {
            "step": s,
            "kind": "eval",
            "bits_per_byte": 3.0 / s,
            "bits_per_byte_by_source": {"a": 3.5 / s, "b": 2.5 / s},
        }
        for s in (10, 49)
    ]
    train, heldout = plots.loss_panels(records, {"unigram": 4.0, "xz": 2.5})
    assert [c.label for c in train.curves] == ["a", "b", "", "all"]
    assert [c.label for c in heldout.curves] == ["a", "b", "all"]
    assert list(heldout.curves[-1].y) == [0.3, 3.0 / 49]
    assert [(level.label, level.y) for level in heldout.levels] == [("unigram", 4.0), ("xz", 2.5)]
    write_run(
        tmp_path / "x" / "1a2b",
        records,
        {"params": 1000, "baseline_bits_per_byte": {"unigram": 4.0, "xz": 2.5}},
    )
    png = plots.draw_loss(tmp_path / "x" / "1a2b").read_bytes()
    assert size(png) == (1555, 561)
    plots.draw_loss(tmp_path / "x" / "1a2b")
    assert (tmp_path / "x" / "1a2b" / "loss.png").read_bytes() == png  # the same input, the same bytes


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "kind": "eval", "bits_per_byte": 4.0}],
        [{"step": 1, "kind": "train", "loss": 2.0}],
        [
            {"step": 1, "kind": "train", "loss": {"not_finite": "nan"}},
            {"step": 2, "kind": "train", "loss": 3.0},
        ],
        [{"step": 1, "kind": "sample", "text": "no numbers"}],
    ],
    ids=["nothing", "one evaluation", "one step", "nan", "other lines"],
)
def test_an_unfinished_run_can_be_drawn(tmp_path, records):
    write_run(tmp_path / "run", records)
    assert size(plots.draw_loss(tmp_path / "run").read_bytes()) == (1555, 561)


def test_a_log_scaled_panel_with_intervals_is_drawn():
    x = np.logspace(5, 8, 8)
    curve = plots.Curve(label="N", x=x, y=10 * x**-0.1, band=0.1 * np.ones(8), markers=True, dashed=True)
    panel = plots.Panel(
        title="scaling", x_label="FLOPs", y_label="nats", curves=[curve], x_log=True, y_log=True
    )
    assert size(plots.draw([panel])) == (777, 561)


def test_a_picture_is_as_wide_as_its_names_need():
    def width(label):
        curve = plots.Curve(label=label, x=[1.0, 2.0], y=[1.0, 0.5])
        return size(plots.draw([plots.Panel(title="", x_label="", y_label="", curves=[curve])]))[0]

    assert width("short") == 777
    assert width("thirty characters of a long name") > 777 + 30 * 144 * 0.03
