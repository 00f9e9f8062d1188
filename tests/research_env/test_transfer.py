"""What research found, on larger models: recipes are read and never run, changes find their old values, pairs are of equal compute."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ConfigError, load_config
from pretrain.optim import AdamWConfig, MuonConfig
from pretrain.scaling.cells import LADDER, Cell, columns
from pretrain.scaling.compare import Multiplier, multiplier
from pretrain.scaling.fit import FitConfig, Interval, fit
from pretrain.scaling.plan import Arm, plan_cells
from research_env.diff import emit_diff, make_diff, read_change
from research_env.ledger import Ledger, ledger_path
from research_env.records import Node, tree_digest
from research_env.rl.__main__ import main
from research_env.rl.recipe_change import PLACES, RECIPE, Change, _read, recipe_changes, replay
from research_env.rl.transfer import (
    ARM,
    TransferConfig,
    at_equal_compute,
    by_budget,
    found_change,
    paired,
    text_of,
    verdict,
    with_arm,
)
from research_env.task import open_task

ROOT = Path(__file__).parents[2]
CONFIG, SMOKE = (
    str(ROOT / f"configs/research_env/{name}.py") for name in ("rl_transfer", "rl_transfer_smoke")
)
BASELINE = (ROOT / "research_env/tasks/pretrain_tiny/codebase/recipe.py").read_bytes()


def changed(*edits):
    """The recipe with texts replaced, as a tree beside the baseline's."""
    source = BASELINE
    for old, new in edits:
        assert source.count(old.encode()) == 1, old
        source = source.replace(old.encode(), new.encode())
    return {RECIPE: BASELINE}, {RECIPE: source}


# --- reading


def test_the_ladders_base_is_the_recipe_of_the_task():
    values, _ = _read(BASELINE)
    train = load_config(CONFIG).scaling.train
    assert dataclasses.replace(train.model, base_width=None) == values["MODEL"]
    assert train.model.base_width == values["MODEL"].width
    assert train.optim == values["OPTIM"]
    assert train.loss == values["LOSS"]
    assert (train.data.batch_rows, train.data.row_length) == (values["BATCH"], values["ROW"])
    assert values.keys() == {*PLACES, "VOCAB", "STEPS"}


def test_changes_are_found_by_name_and_land_in_their_places():
    before, after = changed(
        ("peak_lr=0.003", "peak_lr=2 * 0.003"), ('activation="silu",  #', 'activation="gelu_tanh",  #'),
        ("BATCH = 16", "BATCH = 8"), ("b1=0.9,", "b1=0.8,"), ("z_weight=0.0001", "z_weight=0.0"),
    )  # fmt: skip
    changes = recipe_changes(before, after)
    assert {(c.name, c.old, c.new) for c in changes} == {
        ("BATCH", 16, 8), ("LOSS.z_weight", 0.0001, 0.0), ("MODEL.activation", "silu", "gelu_tanh"),
        ("OPTIM.method.b1", 0.9, 0.8), ("OPTIM.peak_lr", 0.003, 0.006),
    }  # fmt: skip
    base = load_config(CONFIG).scaling.train
    train = replay(changes, base)
    assert train.data.batch_rows == 8
    assert train.loss.z_weight == 0.0
    assert train.model == dataclasses.replace(base.model, activation="gelu_tanh")
    assert train.optim == dataclasses.replace(base.optim, peak_lr=0.006, method=AdamWConfig(b1=0.8, b2=0.99))


def test_another_optimizer_is_one_change():
    before, after = changed(
        ("method=AdamWConfig(b1=0.9, b2=0.99)", "method=MuonConfig()"), ("AdamWConfig, O", "MuonConfig, O")
    )
    with pytest.raises(ConfigError, match="statements or names changed too"):
        recipe_changes(before, after)  # the import line: a name from elsewhere could be anything
    old = BASELINE.replace(b"import AdamWConfig,", b"import AdamWConfig, MuonConfig,")
    new = old.replace(b"method=AdamWConfig(b1=0.9, b2=0.99)", b"method=MuonConfig()")
    (change,) = recipe_changes({RECIPE: old}, {RECIPE: new})
    assert (change.place, change.new) == ("optim.method", MuonConfig())
    assert replay([change], load_config(CONFIG).scaling.train).optim.method == MuonConfig()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("BATCH = 16", "BATCH = 16\nimport os"), "statements or names changed too"),
        (("BATCH = 16", "BATCH = 16\nprint(BATCH)"), "statements or names changed too"),
        (("BATCH = 16", "BATCH = __import__('os').getpid()"), "BATCH must be a plain value"),
        (("peak_lr=0.003", "peak_lr=float('0.006')"), "OPTIM must be a plain value"),
        (("VOCAB = 128", "VOCAB = 256"), "VOCAB has no place in a TrainConfig"),
        (("peak_lr=0.003", "peak_lr=-1.0"), "peak_lr"),
        (("peak_lr=0.003", "peak_rate=0.003"), "gives OptimConfig what it does not take"),
        (("BATCH = 16", "BATCH = 1 // 0"), "cannot be computed"),
        (("BATCH = 16", "BATCH = 16\nBATCH = 8"), "BATCH is assigned again"),
        (("BATCH = 16", "BATCH = = 16"), "must be Python"),
    ],
)  # fmt: skip
def test_a_recipe_is_read_and_never_run(edit, words):
    with pytest.raises(ValueError, match=words):
        recipe_changes(*changed(edit))


def test_a_change_of_the_code_is_not_replayed():
    with pytest.raises(ConfigError, match=r"pretrain/step\.py changed too"):
        recipe_changes(
            {RECIPE: BASELINE, "pretrain/step.py": b"x = 1\n"},
            {RECIPE: BASELINE, "pretrain/step.py": b"x = 2\n"},
        )


def test_sizes_are_left_to_the_ladder_and_alone_they_are_nothing_to_replay():
    train = load_config(CONFIG).scaling.train
    before, after = changed(
        ("width=64", "width=96"), ("round(100", "round(200"), ("clip_norm=1.0", "clip_norm=0.5")
    )
    changes = recipe_changes(before, after)
    assert {c.name: c.place for c in changes} == {
        "MODEL.width": "", "STEPS": "", "OPTIM.clip_norm": "optim.clip_norm",
    }  # fmt: skip
    assert replay(changes, train) == dataclasses.replace(
        train, optim=dataclasses.replace(train.optim, clip_norm=0.5)
    )
    with pytest.raises(ConfigError, match="a change of sizes alone is not replayed"):
        replay([c for c in changes if not c.place], train)


def test_a_change_must_find_its_old_value():
    changes = [Change(name="OPTIM.peak_lr", old=0.01, new=0.02), Change(name="BATCH", old=32, new=64)]
    with pytest.raises(ConfigError) as error:
        replay(changes, load_config(CONFIG).scaling.train)
    assert len(error.value.faults) == 2
    assert "train.optim.peak_lr must be 0.01" in str(error.value)


# --- the campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A ledger like that of a campaign with two promoted changes, one rejected, one of the code."""
    folder = tmp_path_factory.mktemp("campaign")
    task = open_task("pretrain_tiny", folder)
    ledger = Ledger(ledger_path(folder))
    for name, path, old, new, decision, posterior in (
        ("weaker", RECIPE, b"clip_norm=1.0", b"clip_norm=0.5", "promote", 0.01),
        ("better", RECIPE, b"peak_lr=0.003", b"peak_lr=0.006", "promote", 0.05),
        ("lucky", RECIPE, b"weight_decay=0.1", b"weight_decay=0.2", "reject", 0.09),
        ("code", "train.py", b"number % 20", b"number % 10", "reject", 0.0),
    ):
        tree = {**task.baseline, path: task.baseline[path].replace(old, new)}
        diff = emit_diff(make_diff(task.baseline, tree))
        ledger.add_node(
            Node(
                id=name,
                diff=diff,
                tree_digest=tree_digest(read_change(diff, task.baseline, task.policy)[0]),
                idea=f"Idea {name}.",
            )
        )
        ledger.note(
            "verdict", name, json.dumps({"arm": "x", "posterior": posterior, "decision": decision, "mean": 0.1, "lower": 0.05,
                                         "upper": 0.15, "num_seeds": 5}),
        )  # fmt: skip
    ledger.close()
    return folder


def config_of(campaign, **changes):
    return dataclasses.replace(load_config(SMOKE), campaign=str(campaign), **changes)


def test_the_best_promoted_change_is_taken_and_another_by_name(campaign):
    found = found_change(config_of(campaign))
    assert found.node.id == "better"
    assert [str(c) for c in found.changes] == ["OPTIM.peak_lr 0.003 -> 0.006"]
    assert (found.gain, found.interval, found.num_seeds) == (0.1, (0.05, 0.15), 5)
    assert found_change(config_of(campaign, node="lucky")).changes[0].name == "OPTIM.weight_decay"
    with pytest.raises(ConfigError, match=r"train\.py changed too"):
        found_change(config_of(campaign, node="code"))
    with pytest.raises(ConfigError, match="node must be in the ledger"):
        found_change(config_of(campaign, node="nobody"))


def test_a_folder_without_a_campaign_and_one_without_a_promotion_are_named(tmp_path, capsys):
    assert main(["--config", SMOKE, f"campaign={tmp_path}"]) == 2
    assert "campaign must be the folder of a campaign on pretrain_tiny" in capsys.readouterr().err
    open_task("pretrain_tiny", tmp_path)
    Ledger(ledger_path(tmp_path)).close()
    assert main(["--config", SMOKE, f"campaign={tmp_path}"]) == 2
    assert "got 0 confirmed and none promoted" in capsys.readouterr().err
    assert main(["--config", "configs/scaling/smoke.py"]) == 2
    assert "must return a TransferConfig" in capsys.readouterr().err


def test_the_command_that_people_type_reads_its_config(tmp_path):
    command = [sys.executable, "-m", "research_env.rl", "--config", SMOKE, f"campaign={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: campaign must be the folder of a campaign")


def test_a_codebase_that_changed_since_is_refused(campaign, tmp_path):
    task = open_task("pretrain_tiny", tmp_path)
    ledger = Ledger(ledger_path(tmp_path))
    tree = {**task.baseline, RECIPE: task.baseline[RECIPE].replace(b"BATCH = 16", b"BATCH = 8")}
    diff = emit_diff(make_diff(task.baseline, tree))
    ledger.add_node(Node(id="n", diff=diff, tree_digest=tree_digest(tree)))
    ledger.close()
    assert found_change(config_of(tmp_path, node="n")).changes[0].new == 8
    with (Path(task.folder) / "pretrain" / "step.py").open("a") as file:
        file.write("\n# later\n")
    with pytest.raises(ConfigError, match="has changed since"):
        found_change(config_of(tmp_path, node="n"))


def test_a_ladder_that_has_arms_already_is_refused():
    scaling = load_config(SMOKE).scaling
    arms = dataclasses.replace(scaling.ladder, arms=(Arm(name="x", train=scaling.train),))
    with pytest.raises(ConfigError, match=r"scaling\.ladder\.arms must be \(\)"):
        TransferConfig(scaling=dataclasses.replace(scaling, ladder=arms), campaign="")


# --- the comparison

E, A, B, ALPHA, BETA = 1.8, 480.0, 2000.0, 0.35, 0.37


@pytest.mark.parametrize("gain", [0.8, 1.25])
def test_a_planted_gain_comes_out_for_a_change_that_changes_the_number_of_parameters(gain):
    """Pairs are of equal budget, shape and seed, though neither N nor D of the two is equal."""
    scaling = load_config(SMOKE).scaling
    changes = [Change(name="MODEL.hidden_width", old=160, new=320)]
    planned = plan_cells(with_arm(scaling, changes), 260)
    of = {(p.role, p.budget_flops, p.train.model.width): p for p in planned}
    rng = np.random.default_rng(0)
    cells = []
    for plan in planned:
        own = of[LADDER, plan.budget_flops, plan.train.model.width]
        # Each makes `gain` of what it got; whole steps give it a little more or less than its base.
        scale = (gain * plan.flops / own.flops if plan.role == ARM else 1.0) ** 0.5
        size, tokens = 1e3 * own.params * scale, 1e4 * own.tokens * scale
        loss = E + A * size**-ALPHA + B * tokens**-BETA
        cells.append(
            Cell(
                name=plan.name, role=plan.role, params=int(1e3 * plan.params), params_total=plan.params_total,
                tokens=int(1e4 * plan.tokens), unique_tokens=10**15, flops=plan.flops, budget_flops=plan.budget_flops,
                seed=plan.train.run.seed, loss=loss * (1 + 1e-5 * rng.standard_normal()),
            )
        )  # fmt: skip
    arm = [cell for cell in cells if cell.role == ARM]
    base = [cell for cell in cells if cell.role == LADDER]
    assert len(arm) == len(base) == 6
    assert not {(c.params, c.tokens) for c in arm} & {(c.params, c.tokens) for c in base}
    law = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    with pytest.raises(ConfigError, match="at least two cells"):
        multiplier(ARM, base, arm, law)
    found = paired(cells, planned)
    measured = at_equal_compute(multiplier(ARM, base, [c for c in found if c.role == ARM], law), found)
    assert measured.value == pytest.approx(gain, rel=0.01)
    assert verdict(measured) == ("transferred" if gain > 1 else "reversed")
    rows = by_budget(measured, found)
    assert [row["budget_flops"] for row in rows] == list(scaling.ladder.budgets_flops)
    assert all(row["pairs"] == 3 for row in rows)
    assert all((row["loss_difference"] < 0) == (gain > 1) for row in rows)


def test_an_interval_that_holds_one_shows_nothing():
    cells = [(f"{i}", value) for i, value in enumerate((0.8, 1.25))]
    fields = {"arm": ARM, "value": 1.0, "cells": tuple(cells)}
    assert verdict(Multiplier(interval=Interval(0.8, 1.2), **fields)).startswith("not shown")


def test_the_report_says_what_was_replayed_and_what_was_not():
    report = {
        "node": "n", "idea": "Raise the rate.", "replayed": ["OPTIM.peak_lr 0.003 -> 0.006"], "not_replayed": ["MODEL.width 64 -> 96"],
        "campaign_gain": 0.1, "campaign_interval": (0.05, 0.15), "campaign_seeds": 5, "multiplier": 1.2, "interval": [1.1, 1.3],
        "confidence": 0.95, "pairs": 6, "largest_params": 1000,
        "budgets": [{"budget_flops": 1e9, "pairs": 3, "multiplier": 1.2, "loss_difference": -0.01}], "verdict": "transferred",
        "doubts": ["few cells"],
    }  # fmt: skip
    text = text_of(report)
    for words in (
        "+0.1000 [+0.0500, +0.1500] on 5 paired seeds", "1.200 [1.100, 1.300] times the compute", "transferred.",
        "Not replayed, because the ladder sets it: MODEL.width 64 -> 96.", "| 1e+09 | 3 | 1.200 | -0.0100 |", "Doubt: few cells.",
    ):  # fmt: skip
        assert words in text
    assert "was not confirmed" in text_of({**report, "campaign_gain": None})


@pytest.mark.slow
def test_the_smoke_ladder_is_trained_compared_and_read_the_second_time(campaign, tmp_path, capsys):
    argv = ["--config", SMOKE, f"campaign={campaign}", f"scaling.train.run.workdir={tmp_path}"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "rl_transfer_smoke" / "transfer.json").read_text())
    assert report["node"] == "better"
    assert report["pairs"] == 6
    assert report["interval"][0] <= report["multiplier"] <= report["interval"][1]
    assert (tmp_path / "rl_transfer_smoke" / "report.html").exists()
    capsys.readouterr()
    assert main(argv) == 0
    assert "12 of 12 cells are finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "rl_transfer_smoke" / "transfer.json").read_text()) == report
