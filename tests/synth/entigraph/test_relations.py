"""The plan enumerates every pair and triple once, in an order fixed by the seed, of which a budget takes a prefix."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from synth.document import Document, windows_of
from synth.entigraph.entities import merge_entities, normalize_entity, read_entities
from synth.entigraph.relations import EntiGraph, permuted, unrank_pair, unrank_triple, windows_about
from synth.generator import Rejection

DOCUMENT = Document(id="d", text="x")


def plan(num, *, seed=0, **fields):
    prepared = {"summary": "s", "entities": [f"e{i}" for i in range(num)]}
    return list(EntiGraph(max_entities=None, **fields).plan(DOCUMENT, prepared, seed=seed))


@given(st.integers(2, 40))
def test_all_pairs_then_all_triples_each_once(num):
    items = plan(num, max_triples=None)
    pairs = [frozenset(item.parts) for item in items if item.kind == "pair"]
    triples = [frozenset(item.parts) for item in items if item.kind == "triple"]
    assert len(set(pairs)) == len(pairs) == math.comb(num, 2)
    assert len(set(triples)) == len(triples) == math.comb(num, 3)
    assert all(len(p) == 2 for p in pairs)
    assert all(len(t) == 3 for t in triples)
    assert [item.kind for item in items] == ["summary"] + ["pair"] * len(pairs) + ["triple"] * len(triples)


@given(st.integers(3, 12), st.integers(0, 30), st.integers(0, 2**40))
def test_a_budget_is_a_prefix_and_the_seed_fixes_the_order(num, budget, seed):
    items = plan(num, seed=seed, max_triples=None)
    assert plan(num, seed=seed, max_triples=budget) == items[: 1 + math.comb(num, 2) + budget]


def test_another_seed_is_another_order():
    assert plan(20, seed=1) != plan(20, seed=2)


@given(st.integers(0, 3000), st.integers(0, 2**62))
def test_a_keyed_order_is_a_permutation(count, key):
    assert sorted(permuted(count, key)) == list(range(count))


def test_unranking_far_out_matches_ranking():
    for i, j, k in itertools.combinations((0, 1, 999, 54321, 999999), 3):
        assert unrank_triple(math.comb(k, 3) + math.comb(j, 2) + i) == (i, j, k)
        assert unrank_pair(math.comb(j, 2) + i) == (i, j)


@given(st.text(max_size=30))
def test_normalizing_twice_changes_nothing(name):
    assert normalize_entity(normalize_entity(name)) == normalize_entity(name)


def test_names_are_merged_whatever_their_case_and_article():
    assert merge_entities([["The Mill", "Ada"], ["mill.", "ADA", '"Ben"']], 3) == ["Mill", "Ada", "Ben"]


def test_json_is_found_in_a_fence_and_never_repaired():
    good = 'Here:\n```json\n{"summary": "s", "entities": ["Ada"]}\n```'
    assert read_entities(good) == {"summary": "s", "entities": ["Ada"]}
    for bad in (
        '{"summary": "s", "entities": ["Ada",]}',
        '{"summary": "s", "entities": []}',
        "Ada",
        '{"entities": ["A"]}',
    ):
        assert isinstance(read_entities(bad), Rejection)


@given(st.text(alphabet="ab .\n", max_size=2000), st.integers(200, 400))
def test_windows_lose_no_word_and_keep_their_length(text, limit):
    windows = windows_of(text, limit)
    assert " ".join(windows).split() == text.split() or len(text) > limit
    assert all(len(window) <= limit for window in windows) or len(text) <= limit
    assert "".join("".join(windows).split()) == "".join(text.split())


def test_a_relation_sees_the_windows_of_its_entities():
    filler = "Nothing happens here at all. " * 40
    text = f"Ada was born in Cork.\n\n{filler}\n\nBen lived in Dublin.\n\n{filler}"
    seen = windows_about(text, ("Ada", "Ben"), 600)
    assert "Ada was born" in seen
    assert "Ben lived" in seen
    assert len(seen) <= 700
