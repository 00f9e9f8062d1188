"""The table: published fractions come back, intervals are Student's, settings are chosen on validation alone."""

import math
from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config, to_json
from synth.sbp.sweep import Case, SweepConfig, sweep_lines
from synth.sbp.table import Outcome, best_of, compare, comparison_lines, estimate, fraction_of_oracle, picture
from synth.sbp.trials import ORACLE_ARM, REPETITION, Trial, Trials


@pytest.mark.parametrize(("sbp", "oracle", "wanted"), [(2.32, 5.54, 0.4188), (1.32, 2.26, 0.5841)])
def test_the_fraction_of_the_oracles_gain_is_the_published_one(sbp, oracle, wanted):
    """Gains in accuracy over repetition, as losses: minus the accuracy."""
    found = fraction_of_oracle([0.0], [-sbp], [-oracle])
    assert found is not None
    assert found.mean == pytest.approx(wanted, abs=5e-5)


def test_the_fraction_is_undefined_unless_the_oracles_gain_excludes_zero():
    assert fraction_of_oracle([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], [0.5, 1.4, 0.9]) is None
    assert fraction_of_oracle([1.0], [0.9], [1.1]) is None
    assert fraction_of_oracle([1.0, 1.0], [0.9, 0.9], [0.5, 0.5]) is not None


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert not found.excludes_zero
    assert estimate([5.0]).half_width == math.inf
    many = [float(i) for i in range(12)]
    spread = math.sqrt(sum((v - 5.5) ** 2 for v in many) / 11)
    assert estimate(many).half_width == pytest.approx(2.201 * spread / math.sqrt(12), rel=0.02)


def outcome(seed, arm, validation, test, share=0.0, decay=0.1):
    trial = Trial(arm=arm, num_steps=10, weight_decay=decay, share=share)
    nats = {"validation": validation, "test": test}
    run = {"nats_per_token": nats, "curve": [[5, {"test": test + 1}], [10, nats]]}
    return Outcome(seed=seed, trial=to_json(trial), run=run)


OUTCOMES = [
    *(outcome(s, REPETITION, 2.0, 2.0 + s / 100, decay=0.1) for s in range(3)),
    *(outcome(s, REPETITION, 1.9, 2.5 + s / 100, decay=1.0) for s in range(3)),
    *(outcome(s, "random_pair", 1.8, 2.3 + s / 50, share=0.25) for s in range(3)),
    *(outcome(s, "sbp", 1.7 - s / 100, 2.2 + s / 60, share=0.5) for s in range(3)),
    *(outcome(s, "sbp", 1.75, 2.1, share=0.25) for s in range(3)),
    *(outcome(s, ORACLE_ARM, 1.0, 1.0 + s / 90) for s in range(3)),
]


def test_the_setting_is_chosen_on_validation_and_reported_on_test():
    best = best_of(OUTCOMES, REPETITION)
    assert [o.trial["weight_decay"] for o in best] == [1.0] * 3
    assert [o.test for o in best] == [2.5, 2.51, 2.52]  # not the lower test loss of the other decay


def test_a_setting_that_ended_without_a_number_is_never_the_best():
    lost = [outcome(s, REPETITION, float("nan"), float("nan"), decay=0.3) for s in range(3)]
    assert best_of([*lost, *OUTCOMES], REPETITION) == best_of(OUTCOMES, REPETITION)


def test_the_page_says_what_was_measured():
    found = compare(OUTCOMES)
    assert found.differences["repetition - sbp"].mean == pytest.approx(0.01 + 0.3 - 1 / 60, abs=1e-9)
    assert found.differences["random_pair - sbp"].values[0] == pytest.approx(0.1)
    fraction = found.fraction["sbp"]
    assert fraction is not None
    assert fraction.values[0] == pytest.approx(0.3 / 1.5)
    lines = comparison_lines(found, {"best possible": 0.9})
    for word in ("repetition", "random_pair", "sbp", "oracle", "best possible", "share 0.5", "decay 1"):
        assert any(word in line for line in lines), word
    assert picture(OUTCOMES, {"best possible": 0.9}, 100, "three seeds").startswith(b"\x89PNG")


def test_trials_name_every_setting_once():
    trials = Trials(num_steps=100, fewer_steps=(0.25, 0.5), weight_decays=(0.1, 1.0), shares=(0.25, 0.5))
    found = trials.all()
    assert len({t.name for t in found}) == len(found) == 3 * 2 + 3 * 2 + 1
    assert {t.num_steps for t in found if t.arm == REPETITION} == {25, 50, 100}
    assert {t.num_steps for t in found if t.arm != REPETITION} == {100}


def test_trials_refuse_what_they_cannot_be():
    with pytest.raises(ConfigError) as error:
        Trials(num_steps=0, fewer_steps=(1.5,), shares=(), synthetic_arms=("rephrase",))
    assert len(error.value.faults) == 4


CONFIGS = Path(__file__).parents[3] / "configs/synth"
WORLDS = {
    "sbp_worlds": load_config(CONFIGS / "sbp_worlds.py"),
    **{case.name: case.config for case in load_config(CONFIGS / "sbp_worlds_sweep.py").cases},
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_worlds_have_seeds_for_as_much_synthetic_text_as_the_arms_read_once(name):
    """From the sizes alone: else a run ends when all but its arms is done. A tenth more, as some texts are left out."""
    config = WORLDS[name]
    world, split = config.data.world, config.split
    documents = config.data.num_documents * (1 - split.validation - split.test) * split.unique
    tokens = (world.min_length + world.max_length) / 2 + 1
    needed = max(config.trials.shares) * config.trials.num_steps * config.learner.tokens_per_step
    assert documents * config.synthesis.samples_per_document * tokens > 1.1 * needed


@pytest.mark.parametrize("name", ["sbp_dclm_3b_200b", "sbp_dclm_3b_1t"])
def test_the_papers_settings_leave_room_for_texts_that_are_left_out_or_short(name):
    config = load_config(CONFIGS / f"{name}.py")
    unique = config.split.unique * 482e9
    needed = max(config.trials.shares) * config.trials.num_steps * config.learner.tokens_per_step
    assert unique * config.synthesis.samples_per_document > 2 * needed


def test_a_sweep_has_a_row_for_each_case_and_dashes_where_nothing_was_measured():
    numbers = compare(OUTCOMES).to_json()
    numbers["fraction_of_oracle_gain"]["sbp"] = None
    smoke = load_config(Path(__file__).parents[3] / "configs/synth/sbp_smoke.py")
    cases = tuple(Case(varied="width", value=value, config=smoke) for value in ("16", "32"))
    lines = sweep_lines(cases, {case.name: numbers for case in cases})
    assert len(lines) == 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| width | 32 |" in lines[3]
    assert "undefined" in lines[3]
    assert "| - |" in lines[3]  # self_samples were not among the outcomes
    with pytest.raises(ConfigError, match="different"):
        SweepConfig(cases=(cases[0], cases[0]))
