"""Stages resume exactly, name what changed, never spend past the cap; every generator runs through the same recipe."""

import json
import math
import re
from dataclasses import replace

import pytest

from pretrain.config import ConfigError, apply_overrides
from synth.baselines.active_reading import ActiveReading
from synth.baselines.focal_rewrite import FocalRewrite
from synth.baselines.genre_audience import GenreAudience
from synth.baselines.qa_pairs import QaPairs
from synth.baselines.repeat import Repeat
from synth.baselines.rephrase import Rephrase
from synth.entigraph.relations import EntiGraph
from synth.llm.budget import Budget
from synth.llm.scripted import ScriptedConfig
from synth.recipe import RecipeConfig, predict
from synth.stage import RunConfig, StageFailed
from synth.worlds.niche import WorldDocuments
from synth.worlds.reader import ReaderConfig
from synth.worlds.render import read
from synth.worlds.world import WorldConfig

WORLDS = WorldDocuments(world=WorldConfig(seed=3, num_documents=3, per_type=(3, 2, 2, 2)))
NUM_TEXTS = 3 * (1 + math.comb(9, 2) + 10)


def recipe(workdir, *, generator=None, llm=None, seed=0, **run):
    return RecipeConfig(
        sources=WORLDS,
        generator=generator or EntiGraph(max_triples=10),
        llm=llm or ReaderConfig(),
        seed=seed,
        first_wait_s=0.0,
        run=RunConfig(workdir=str(workdir), **run),
    )


def execute(config):
    return {result.name: result for result in config.execute(lambda line: None)}


def outputs(workdir):
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(workdir.glob("*/*.jsonl.zst"))}


def test_a_second_run_does_nothing_and_a_lost_shard_comes_back_from_the_cache(tmp_path):
    first = execute(recipe(tmp_path, num_shards=2))
    assert first["entigraph"].counts["out"] == NUM_TEXTS
    assert first["entigraph"].counts["paid_calls"] == NUM_TEXTS - 3  # the summaries came with the entities
    before = outputs(tmp_path)
    assert all(result.num_run == 0 for result in execute(recipe(tmp_path, num_shards=2)).values())
    (tmp_path / "entigraph" / "00001-of-00002.jsonl.zst").unlink()
    again = execute(recipe(tmp_path, num_shards=2))["entigraph"]
    assert (again.num_run, again.counts["paid_calls"]) == (1, NUM_TEXTS - 3)
    assert outputs(tmp_path) == before


def test_ids_and_texts_do_not_depend_on_the_shard_count(tmp_path):
    found = []
    for count in (1, 2, 7):
        result = execute(recipe(tmp_path / str(count), num_shards=count))["corpus"]
        documents = list(result.documents())
        assert len({d.id for d in documents}) == len(documents) == NUM_TEXTS
        found.append([(d.id, d.text) for d in documents])
    assert found[0] == found[1] == found[2]


def test_processes_write_the_bytes_of_one_process(tmp_path):
    execute(recipe(tmp_path / "one", num_shards=3))
    execute(recipe(tmp_path / "two", num_shards=3, num_processes=2))
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"generator": EntiGraph(max_triples=11)},
            "entigraph_prepare .* config.generator.max_triples was 10, is now 11",
        ),
        ({"llm": ReaderConfig(compose=False)}, "config.llm.compose was true, is now false"),
        ({"seed": 1}, "config.seed was 0, is now 1"),
        ({"num_shards": 3}, "stage sources .* shard_count was 2, is now 3"),
    ],
)
def test_a_changed_field_stops_the_run_and_is_named(tmp_path, change, message):
    execute(recipe(tmp_path, num_shards=2))
    before = outputs(tmp_path)
    with pytest.raises(ConfigError, match=message):
        execute(recipe(tmp_path, **{"num_shards": 2, **change}))
    assert outputs(tmp_path) == before


def test_only_what_follows_from_a_change_is_made_again(tmp_path):
    config = recipe(tmp_path, num_shards=2)
    execute(config)
    changed = replace(config, items_per_document=30)
    with pytest.raises(
        ConfigError, match="stage entigraph .*items_per_document was null, is now 30"
    ) as refused:
        execute(changed)
    (remedy,) = re.findall(r'write "(run\.fresh=[^"]*)"', str(refused.value))
    done = execute(apply_overrides(changed, [remedy]))
    ran = {name: result.num_run for name, result in done.items()}
    assert ran == {"sources": 0, "entigraph_prepare": 0, "entigraph": 2, "corpus": 1, "report": 1}
    assert done["entigraph"].counts["out"] == 90
    assert done["entigraph"].counts["cached_calls"] == done["entigraph"].counts["calls"]


def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(tmp_path):
    priced = ReaderConfig(prompt_usd_per_million=1.0, completion_usd_per_million=4.0)
    bill = sum(result.cost_usd for result in execute(recipe(tmp_path / "whole", llm=priced)).values())
    small = execute(recipe(tmp_path / "parts", llm=priced, budget=Budget(max_calls=50)))
    assert small["entigraph"].partial
    assert small["entigraph_prepare"].counts["paid_calls"] + small["entigraph"].counts["paid_calls"] == 50
    dollars = execute(recipe(tmp_path / "parts", llm=priced, budget=Budget(max_cost_usd=0.8 * bill)))
    assert 0.5 * bill < sum(result.cost_usd for result in dollars.values()) <= 0.8 * bill
    assert dollars["entigraph"].counts["paid_calls"] > 47
    assert not execute(recipe(tmp_path / "parts", llm=priced))["entigraph"].partial
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = recipe(tmp_path)

    def interfere(line):
        if line.startswith("the page"):
            return  # the folder is free again
        with pytest.raises(ConfigError, match="one writer"):
            config.execute(lambda inner: None)

    config.execute(interfere)


def test_bad_replies_never_reach_a_table(tmp_path):
    bad = ScriptedConfig(malformed=0.2, refused=0.1, truncated=0.1, overloaded=0.3)
    done = execute(recipe(tmp_path, llm=bad, max_failed_fraction=0.9))
    counts = done["entigraph"].counts
    documents = list(done["entigraph"].documents())
    assert counts["failed"] == sum(v for k, v in counts.items() if k.startswith("failed_")) > 0
    assert {k for k in counts if k.startswith("failed_")} <= {
        "failed_refused",
        "failed_truncated",
        "failed_empty",
        "failed_looping",
    }
    assert all(d.meta.get("finish", "stop") == "stop" and d.text for d in documents)
    assert counts["retries"] > 0


def test_a_stage_above_its_share_of_failures_stops_the_run(tmp_path):
    with pytest.raises(StageFailed, match="max_failed_fraction=0.02"):
        execute(recipe(tmp_path, llm=ScriptedConfig(refused=0.5)))


@pytest.mark.parametrize(
    ("generator", "num_texts"),
    [
        (Repeat(times=4), 12),
        (Rephrase(styles=("easy", "medium", "hard", "qa"), versions=3, window_characters=None), 36),
        (QaPairs(batches=5), 15),
        (GenreAudience(versions=2), 30),
        (ActiveReading(versions=2), 18),
        (FocalRewrite(), 36),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_generator_runs_through_the_same_recipe(tmp_path, generator, num_texts):
    done = execute(recipe(tmp_path, generator=generator))
    documents = list(done["corpus"].documents())
    assert len(documents) == num_texts
    sources = {d.id: read(d.text) for d in done["sources"].documents()}
    for document in documents:
        (parent,) = document.parents
        told = read(document.text)
        assert told
        assert told <= sources[parent]  # a perfect reader invents nothing


def test_the_pilot_predicts_the_bill_and_is_not_paid_twice(tmp_path):
    priced = ReaderConfig(prompt_usd_per_million=1.0, completion_usd_per_million=4.0)
    config = recipe(tmp_path, llm=priced)
    pilot = replace(config, run=replace(config.run, dry_run="pilot", dry_run_documents=2))
    expected = predict(pilot)
    done = execute(config)
    used = [done[name].counts for name in ("entigraph_prepare", "entigraph")]
    assert expected.calls == sum(c["calls"] for c in used)
    assert expected.usage.completion_tokens == pytest.approx(
        sum(c["completion_tokens"] for c in used), rel=0.15
    )
    assert expected.usage.prompt_tokens == pytest.approx(sum(c["prompt_tokens"] for c in used), rel=0.15)
    assert sum(c["cached_calls"] for c in used) == 2 + 2 * 8


def test_every_text_leads_back_to_its_call(tmp_path):
    done = execute(recipe(tmp_path))
    for document in done["corpus"].documents():
        assert document.parents[0].startswith("world")
        assert document.made_by == done["entigraph"].recipe
        if document.meta["kind"] != "summary":
            assert len(document.meta["call"]) == 64
            assert all(part in document.text for part in document.meta["parts"])


def test_the_page_is_written(tmp_path):
    execute(recipe(tmp_path))
    page = (tmp_path / "report.md").read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert f"| entigraph/pair | {3 * math.comb(9, 2)} |" in page
    assert numbers["names_all_parts"] == 1.0
