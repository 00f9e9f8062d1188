"""The page of a ladder: every number of the analysis, pictures that open, nothing that asks for the network."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import load_config
from pretrain.scaling import page
from pretrain.scaling.cells import HELD_OUT, LADDER, REPEAT, Cell
from pretrain.scaling.fit import FitConfig
from pretrain.scaling.laws import effective_tokens
from pretrain.scaling.report import analyze, fit_text, summary_json, write_report
from tools.browse import find_browser, look
from tools.results import results_of

SMOKE = load_config(Path(__file__).parents[3] / "configs/scaling/smoke.py")
QUICK = FitConfig(num_bootstrap=20)
R_STAR = 10.0


def cell(role, n, d, *, unique=10**12, seed=0, gain=1.0, noise=0.0):
    unique = min(unique, d)
    worth = float(effective_tokens(np.array([float(d)]), np.array([float(unique)]), R_STAR)[0])
    loss = (1.5 + 60 * (n * gain**0.5) ** -0.35 + 90 * (worth * gain**0.5) ** -0.3) * (1 + noise)
    return Cell(
        name=f"{role}-{n:.0f}-{d:.0f}-{unique:.0f}-{seed}", role=role, params=int(n), params_total=int(n), tokens=int(d),
        unique_tokens=int(unique), flops=6 * n * d, budget_flops=6 * n * d, seed=seed, loss=loss, seconds=10.0,
    )  # fmt: skip


def cells():
    rng = np.random.default_rng(0)

    def noise():
        return 5e-4 * rng.standard_normal()

    found = []
    for budget in (1e11, 4e11, 16e11):
        for n in (budget / 120) ** 0.5 * 2.0 ** np.arange(-2, 3):
            c = cell(LADDER, n, budget / 6 / n, noise=noise())
            found.append(dataclasses.replace(c, budget_flops=budget))
    found += [cell("arm", c.params, c.tokens, gain=1.3, noise=noise()) for c in found[:6]]
    found += [
        cell(REPEAT, 50_000, 4_000_000, unique=4_000_000 // e, noise=noise()) for e in (1, 2, 4, 8, 16, 32)
    ]
    n = (64e11 / 120) ** 0.5
    return [*found, cell(HELD_OUT, n, 64e11 / 6 / n, noise=noise())]


@pytest.fixture(scope="module")
def analysis():
    return analyze(cells(), QUICK)


def test_everything_planted_is_found(analysis):
    (prediction,) = analysis.predictions
    assert abs(prediction.error) < 0.01
    assert prediction.interval.low < prediction.predicted < prediction.interval.high
    (m,) = analysis.multipliers
    assert m.better
    assert m.value == pytest.approx(1.3, rel=0.1)
    effective = next(f for f in analysis.repeat_fits if f.law.name == "effective_data")
    assert effective.values["R_star"] == pytest.approx(R_STAR, rel=0.3)


def test_the_text_states_prediction_measurement_and_error(analysis):
    text = fit_text(analysis)
    (p,) = analysis.predictions
    assert f"predicted {p.predicted:.4f}" in text
    assert f"measured {p.cell.loss:.4f}" in text
    assert f"{p.error:+.2%}" in text


def test_missing_cells_are_a_doubt():
    assert any("3 cells" in doubt for doubt in analyze(cells(), QUICK, num_missing=3).doubts)


def test_a_ladder_that_reads_its_data_again_is_a_doubt():
    again = [dataclasses.replace(c, unique_tokens=c.tokens // 8) if c.role == LADDER else c for c in cells()]
    (doubt,) = [d for d in analyze(again, QUICK).doubts if "read their data" in d]
    assert doubt.startswith("15 ladder cells read their data more than 4 times, up to 8.0")
    assert not any("read their data" in d for d in analyze(cells(), QUICK).doubts)


def test_a_repetition_curve_without_repetition_is_a_doubt_and_no_crash():
    fresh = [dataclasses.replace(c, unique_tokens=c.tokens) for c in cells()]
    found = analyze(fresh, QUICK)
    assert all(np.isnan(error) for error in found.repeat_errors)
    assert any("the repeated runs read their data 1.0 times at most" in d for d in found.doubts)
    assert "nan" not in fit_text(found)
    json.dumps(summary_json(found, SMOKE, "c"), allow_nan=False)


def test_a_multiplier_that_the_law_cannot_state_is_a_doubt():
    wonder = [dataclasses.replace(c, loss=0.5) if c.role == "arm" else c for c in cells()]
    found = analyze(wonder, QUICK)
    assert any(d.startswith("arm arm: 6 of 6 pairs lie beyond what the law can say") for d in found.doubts)


@pytest.fixture(scope="module")
def report(analysis, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ladder")
    train = dataclasses.replace(SMOKE.train, run=dataclasses.replace(SMOKE.train.run, workdir=str(workdir)))
    return write_report(analysis, dataclasses.replace(SMOKE, train=train), "planted", "the <command>")


def test_the_page_needs_nothing_else(report):
    text = re.sub(r"src='data:[^']*'", "", report.read_text())
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "the &lt;command&gt;" in text
    assert text.count("<img") == 2


def test_the_numbers_of_the_page_stand_in_its_json(report, analysis):
    numbers = json.loads(report.with_name("report.json").read_text())
    assert numbers["fit"]["values"] == analysis.fit.values
    assert len(numbers["cells"]) == len(analysis.cells)
    assert numbers["predictions"][0]["error"] == analysis.predictions[0].error
    assert numbers["origin"]["hardware"]


def test_the_table_for_a_readme_comes_from_the_same_numbers(report, analysis):
    table = results_of(report.parent).page()
    assert f"| alpha | {analysis.fit.values['alpha']:.4g} |" in table
    assert f"error {analysis.predictions[0].error:+.2%}" in table
    assert "seeds 0" in table
    assert "commit not recorded" not in table


def test_text_in_a_page_cannot_become_markup():
    assert page.table(("<b>",), [("&",)]).count("<b>") == 0
    assert page.text("a\x00b\ud800") == "a\ufffdb\ufffd"


@pytest.mark.slow
def test_a_browser_shows_every_picture_and_has_nothing_to_say(report):
    browser = find_browser()
    if browser is None:
        pytest.skip("chromium is not installed")
    console, sizes = look(report, browser)
    assert console == []
    assert len(sizes) == 2
    assert all(width > 600 and height > 300 for width, height in sizes)
