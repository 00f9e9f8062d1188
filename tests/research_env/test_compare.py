"""Comparisons: every arm pays the same, and what it found is judged on seeds that it never saw."""

import dataclasses
import json

import pytest

from pretrain.config import ConfigError
from research_env.ideator.mutate import MutationIdeas
from research_env.main import main
from research_env.records import Node, Resource, Result, Status
from research_env.search.compare import CompareConfig, comparison_table, run_comparison, summarize, within
from research_env.search.proposal import Proposal, Told
from research_env.search.recipe import ResearchConfig


def config(folder, **fields):
    campaign = ResearchConfig(
        codebase="planted",
        workdir="",
        arms=("best_of_n", "greedy"),
        batch=3,
        noise_repeats=3,
        ideas=MutationIdeas(),
    )
    defaults = {"num_campaigns": 2, "max_device_s": 0.6, "num_fresh_seeds": 2}
    return CompareConfig(campaign=campaign, workdir=str(folder), **{**defaults, **fields})


def told(cpu_s, device_s=9.0):
    result = Result(status=Status.OK, metric=1.0, cpu_s=cpu_s, device_s=device_s)
    return Told(Proposal(key="k", kind="explore"), Node(id="n"), result, 0.0)


def test_an_arm_gets_what_it_can_pay_for_in_order_and_no_cheap_one_after_that():
    items = [told(1.0), told(2.0), told(5.0), told(0.1)]
    assert within(items, Resource.parse("1xCPU"), 3.0) == items[:2]
    assert within(items, Resource.parse("1xCPU"), 99.0) == items
    assert within(items, Resource.parse("8xH100"), 20.0) == items[:2]  # leased whole: wall seconds count


def test_differences_to_the_control_are_paired_by_campaign(tmp_path):
    rows = [
        {"campaign": number, "arm": arm, "gain": number + extra, "candidates": 4, "device_s": 1.0, "screened_gain": 9.0}
        for number in range(2)
        for arm, extra in (("best_of_n", 0.0), ("greedy", 0.5))
    ]  # fmt: skip
    control, search = summarize(rows, config(tmp_path))["arms"]
    assert control["over_control"] is None
    assert control["gain"][0] == 0.5
    assert search["over_control"] == (0.5, 0.5, 0.5)  # what all campaigns share has no scatter
    assert search["gain"][1] < 0 < search["gain"][2]


def test_a_comparison_runs_resumes_and_writes_its_table(isolation, tmp_path):
    wanted = config(tmp_path)
    first = run_comparison(wanted, lambda text: None)
    said = []
    assert run_comparison(wanted, said.append) == first  # from the ledgers: nothing runs again
    assert len(said) == 2 * 3
    assert [row["campaign"] for row in first["rows"]] == [0, 0, 1, 1]
    for row in first["rows"]:
        assert 0 < row["device_s"] <= 0.6
        assert len(row["gains"]) == (2 if row["idea"] else 0)
    assert json.loads((tmp_path / "comparison.json").read_text())["control"] == "best_of_n"
    table = (tmp_path / "comparison.md").read_text()
    assert table == comparison_table(first) + "\n"
    assert len(table.splitlines()) == 4


def test_faults_of_a_comparison_are_named_all_at_once(tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config(tmp_path), num_campaigns=1, max_device_s=0.0, num_fresh_seeds=0)
    assert len(caught.value.faults) == 3
    path = "configs/research_env/compare_pretrain_tiny.py"
    assert main(["--config", path, "num_campaigns=1"]) == 2
    assert "num_campaigns must be at least 2" in capsys.readouterr().err
