"""Plans: budgets are met, sizes surround the prior, only size, length and seed differ, faults come at once."""

import dataclasses
from pathlib import Path

import pytest

from pretrain import config as config_lib
from pretrain.config import ConfigError, load_config
from pretrain.scaling.cells import HELD_OUT, LADDER, REPEAT
from pretrain.scaling.plan import Arm, LadderConfig, RepeatConfig, Shape, plan_cells
from pretrain.scaling.slices import SliceConfig
from pretrain.tokenizer import BpeConfig

SMOKE = load_config(Path(__file__).parents[3] / "configs/scaling/smoke.py")
VOCABULARY = 260


def with_ladder(**changes):
    return dataclasses.replace(SMOKE, ladder=dataclasses.replace(SMOKE.ladder, **changes))


def test_every_cell_spends_its_budget_within_half_a_step():
    for cell in plan_cells(SMOKE, VOCABULARY):
        step = cell.flops / cell.train.run.num_steps
        assert abs(cell.flops - cell.budget_flops) <= step / 2 * (1 + 1e-9)
        assert (
            cell.tokens == cell.train.run.num_steps * cell.train.data.batch_rows * cell.train.data.row_length
        )


def test_cells_differ_in_size_length_and_seed_only():
    allowed = ("model.width", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.hidden_width",
               "run.num_steps", "run.seed")  # fmt: skip
    for cell in plan_cells(SMOKE, VOCABULARY):
        changed = {path for path, _, _ in config_lib.diff(SMOKE.train, cell.train)}
        assert changed <= set(allowed)
        assert cell.train.optim.peak_lr == SMOKE.train.optim.peak_lr


def test_each_budget_takes_the_shapes_nearest_to_the_prior():
    shapes = tuple(Shape(width=8 * i, num_layers=1) for i in range(1, 9))
    config = with_ladder(shapes=shapes, shapes_per_budget=3, budgets_flops=(3e8, 3e9), held_out_flops=None)
    cells = plan_cells(config, VOCABULARY)
    for budget in (3e8, 3e9):
        ratios = [c.tokens / c.params for c in cells if c.budget_flops == budget]
        assert len(ratios) == 3
        assert min(ratios) < SMOKE.ladder.tokens_per_param * 1.5
        assert max(ratios) > SMOKE.ladder.tokens_per_param / 1.5
    assert max(c.params for c in cells if c.budget_flops == 3e9) > max(
        c.params for c in cells if c.budget_flops == 3e8
    )


def test_names_and_run_folders_are_different():
    cells = plan_cells(with_ladder(noise_seeds=(1, 2)), VOCABULARY)
    assert len({c.name for c in cells}) == len(cells)
    assert len({config_lib.fingerprint(c.train) for c in cells}) == len(cells)
    assert [c.role for c in cells].count(HELD_OUT) == 1


def test_noise_seeds_are_for_the_smallest_budget():
    cells = plan_cells(with_ladder(noise_seeds=(1, 2)), VOCABULARY)
    for cell in cells:
        if cell.train.run.seed:
            assert cell.budget_flops == SMOKE.ladder.budgets_flops[0]
    assert sum(c.train.run.seed == 2 for c in cells) == 3


def test_arms_have_a_partner_in_the_ladder():
    changed = dataclasses.replace(SMOKE.train, optim=dataclasses.replace(SMOKE.train.optim, weight_decay=0.5))
    cells = plan_cells(with_ladder(arms=(Arm(name="decay", train=changed),), num_arm_budgets=1), VOCABULARY)
    base = {(c.params, c.tokens, c.train.run.seed) for c in cells if c.role == LADDER}
    arm = [c for c in cells if c.role == "decay"]
    assert len(arm) == 3
    for cell in arm:
        assert (cell.params, cell.tokens, cell.train.run.seed) in base
        assert cell.train.optim.weight_decay == 0.5


def sliced():
    (source,) = SMOKE.train.data.sources
    sources = (
        SliceConfig(name="train", source=source, high=0.9),
        SliceConfig(name="heldout", source=source, low=0.9, heldout_percent=100.0),
    )
    data = dataclasses.replace(SMOKE.train.data, sources=sources, heldout_percent=0.0)
    repeat = RepeatConfig(shape=Shape(width=8, num_layers=1), num_steps=40, fractions=(1.0, 0.25))
    ladder = dataclasses.replace(SMOKE.ladder, repeat=repeat, held_out_flops=None)
    return dataclasses.replace(SMOKE, train=dataclasses.replace(SMOKE.train, data=data), ladder=ladder)


def test_a_repetition_curve_reads_less_of_the_same_text_and_is_scored_on_all_of_the_rest():
    cells = [c for c in plan_cells(sliced(), VOCABULARY) if c.role == REPEAT]
    assert [c.train.data.sources[0].high for c in cells] == [0.9, 0.225]
    assert {c.train.data.sources[1] for c in cells} == {sliced().train.data.sources[1]}
    assert {(c.train.run.num_steps, c.train.model.width) for c in cells} == {(40, 8)}
    assert len({c.name for c in cells}) == 2


def test_a_repetition_curve_needs_slices_and_a_tokenizer_that_stays():
    repeat = sliced().ladder
    with pytest.raises(ConfigError, match="needs a SliceConfig"):
        dataclasses.replace(SMOKE, ladder=repeat)
    trained = dataclasses.replace(sliced().train.data, tokenizer=BpeConfig(vocab_size=300))
    with pytest.raises(ConfigError, match="not trained on the documents it limits"):
        dataclasses.replace(sliced(), train=dataclasses.replace(SMOKE.train, data=trained))


def test_the_held_out_run_is_larger_than_all_others():
    cells = plan_cells(SMOKE, VOCABULARY)
    assert max(cells, key=lambda c: c.flops).role == HELD_OUT


def test_budgets_too_small_for_a_schedule_are_all_named():
    with pytest.raises(ConfigError) as error:
        plan_cells(with_ladder(budgets_flops=(1e7, 2e7), held_out_flops=None), VOCABULARY)
    assert len(error.value.faults) > 3
    assert all("twice its warmup" in fault for fault in error.value.faults)


def test_widths_without_width_transfer_are_refused():
    plain = dataclasses.replace(SMOKE.train, model=dataclasses.replace(SMOKE.train.model, base_width=None))
    with pytest.raises(ConfigError, match="base_width must be set"):
        dataclasses.replace(SMOKE, train=plain)


def test_a_width_that_cuts_a_head_is_refused():
    with pytest.raises(ConfigError, match="use multiples of 8"):
        Shape(width=12, num_layers=1).model(SMOKE.train.model)


def test_a_ladder_names_all_its_faults():
    shape = Shape(width=8, num_layers=1)
    with pytest.raises(ConfigError) as error:
        LadderConfig(
            budgets_flops=(2e8, 1e8),
            shapes=(shape, shape),
            shapes_per_budget=5,
            noise_seeds=(0,),
            tokens_per_param=0,
        )
    assert len(error.value.faults) == 5
