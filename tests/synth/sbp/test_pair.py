"""Pairs: drawn from all neighbors above a threshold, capped, without copies; the control relates nothing."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import ConfigError
from synth.document import Document
from synth.neighbors import Vectors
from synth.sbp.embed import HashedWordsConfig
from synth.sbp.pair import (
    PAIR,
    RANDOM,
    REPORT,
    Barred,
    Pair,
    PairRule,
    Pairs,
    all_neighbors,
    derange,
    draw_pairs,
    threshold_for,
)


def neighbors(count, reach, seed):
    """Rows and similarities as a search returns them: sorted, symmetric, without the document itself."""
    chance = np.random.default_rng(seed)
    similarity = chance.uniform(-1, 1, size=(count, count)).astype(np.float32)
    similarity = np.maximum(similarity, similarity.T)
    np.fill_diagonal(similarity, -np.inf)
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, : min(reach, count - 1)]
    keys = chance.integers(0, 2**63, size=count).astype(np.uint64)
    return rows, np.take_along_axis(similarity, rows, axis=1), keys


def test_neighbors_of_all_documents_are_in_memory_once(tmp_path):
    chance, count = np.random.default_rng(0), 100_000
    np.save(tmp_path / "v.npy", chance.normal(size=(count, 4)).astype(np.float32))
    vectors = Vectors([tmp_path / "v.npy"], [[f"{i:06d}" for i in range(count)]])

    class Some:
        def propose(self, query_QD):
            return chance.integers(0, count, size=(len(query_QD), 60))

    tracemalloc.start()
    try:
        rows, similarity = all_neighbors(vectors, Some(), 70)  # more than are proposed: none
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (rows[:, 60:] == -1).all()
    assert (similarity[:, 60:] == -np.inf).all()
    assert (np.diff(similarity[:, :50], axis=1) <= 0).all()
    assert peak < 1.5 * (rows.nbytes + similarity.nbytes)


def none_alike(first, second):
    return np.zeros(len(first), bool)


def as_set(pairs):
    return set(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True))


cases = st.tuples(st.integers(2, 40), st.integers(1, 30), st.integers(0, 999))


@given(cases, st.floats(-0.5, 0.9), st.integers(1, 5), st.integers(1, 5))
def test_pairs_are_above_the_threshold_capped_and_never_of_one_document(
    case, threshold, first_cap, second_cap
):
    rows, similarity, keys = neighbors(*case)
    rule = PairRule(threshold=threshold, max_per_first=first_cap, max_per_second=second_cap)
    pairs = draw_pairs(rows, similarity, keys, rule, threshold, none_alike)
    assert (pairs.first_P != pairs.second_P).all()
    assert (pairs.similarity_P > threshold).all()
    assert max(Counter(pairs.first_P.tolist()).values(), default=0) <= first_cap
    assert max(Counter(pairs.second_P.tolist()).values(), default=0) <= second_cap
    assert len(as_set(pairs)) == len(pairs)
    assert as_set(pairs) <= {(i, int(j)) for i, row in enumerate(rows) for j in row}


@given(cases, st.lists(st.floats(-0.5, 0.95), min_size=2, max_size=4), st.integers(1, 4))
def test_raising_the_threshold_never_adds_a_pair(case, thresholds, cap):
    rows, similarity, keys = neighbors(*case)
    before = None
    for threshold in sorted(thresholds):
        rule = PairRule(threshold=threshold, sample_above=-0.5, max_per_first=cap, max_per_second=cap)
        now = as_set(draw_pairs(rows, similarity, keys, rule, threshold, none_alike))
        assert before is None or now <= before
        before = now


@given(cases, st.floats(-0.5, 0.9), st.randoms(use_true_random=False))
def test_the_order_of_documents_decides_nothing(case, threshold, chance):
    rows, similarity, keys = neighbors(*case)
    rule = PairRule(threshold=threshold, max_per_first=2, max_per_second=3)
    pairs = as_set(draw_pairs(rows, similarity, keys, rule, threshold, none_alike))
    order = list(range(len(rows)))
    chance.shuffle(order)
    place = np.argsort(order)
    moved = draw_pairs(place[rows][order], similarity[order], keys[order], rule, threshold, none_alike)
    assert {(order[i], order[j]) for i, j in as_set(moved)} == pairs


def test_not_only_the_nearest_are_drawn():
    """Ranks of the drawn among all above the threshold: uniform, so their mean is the middle."""
    rows, similarity, keys = neighbors(400, 100, 1)
    rule = PairRule(threshold=-1.0, max_per_first=4, max_per_second=1000)
    pairs = draw_pairs(rows, similarity, keys, rule, -1.0, none_alike)
    rank = [int(np.flatnonzero(rows[i] == j)[0]) for i, j in as_set(pairs)]
    assert np.mean(rank) == pytest.approx(49.5, abs=4 * 28.9 / np.sqrt(len(rank)))


@given(cases, st.floats(1, 20))
def test_a_threshold_of_none_gives_that_many_neighbors(case, wanted):
    _, similarity, _ = neighbors(*case)
    threshold = threshold_for(similarity, wanted)
    assert (similarity > threshold).sum() <= wanted * len(similarity)
    if wanted < similarity.shape[1]:
        assert (similarity >= threshold).sum() >= int(wanted * len(similarity))


def test_near_duplicates_and_passages_of_one_document_are_never_paired():
    chance = np.random.default_rng(0)
    words = [f"w{i}" for i in range(200)]
    texts = [" ".join(chance.choice(words, 40)) for _ in range(20)]
    texts += [text + " with an end" for text in texts]
    rule = PairRule(threshold=-1.0, max_per_first=100, max_per_second=100)
    rows, similarity, keys = neighbors(40, 39, 0)
    # Alike enough for the sketches (0.4), and below the bound.
    texts[1] = " ".join([*texts[0].split()[:28], *texts[1].split()[28:]])
    texts[21] = texts[1] + " with an end"
    roots = ["whole", "whole", *map(str, range(2, 40))]
    pairs = as_set(draw_pairs(rows, similarity, keys, rule, -1.0, Barred(texts, roots, rule)))
    wanted = {(i, j) for i in range(40) for j in range(40) if i != j and abs(i - j) != 20}
    assert pairs == wanted - {(0, 1), (1, 0)}


lengths = st.lists(st.integers(1, 500), min_size=12, max_size=60)


@given(lengths, st.integers(0, 99))
def test_random_pairs_have_no_fixed_point_and_keep_firsts_seconds_and_lengths(length, seed):
    chance = np.random.default_rng(seed)
    count = len(length)
    first = np.repeat(np.arange(count), 3)
    second = (first + chance.integers(1, count, size=len(first))) % count
    pairs = Pairs(first_P=first, second_P=second, similarity_P=np.ones(len(first)))
    # Equal length for all lets every bucket stand alone; mixed lengths may have to join buckets.
    random = derange(pairs, np.array(length), seed)
    assert (random.second_P != second).all()
    assert (random.second_P != first).all()
    assert (random.first_P == first).all()
    assert Counter(random.second_P.tolist()) == Counter(second.tolist())


def test_random_seconds_are_about_as_long_as_the_real_ones():
    chance = np.random.default_rng(0)
    length = chance.integers(1, 1000, size=500)
    first = np.arange(500).repeat(4)
    second = (first + chance.integers(1, 500, size=len(first))) % 500
    pairs = Pairs(first_P=first, second_P=second, similarity_P=np.ones(len(first)))
    random = derange(pairs, length, 0)
    bucket = np.floor(np.log2(length))
    assert (bucket[random.second_P] == bucket[second]).mean() > 0.98


def test_random_pairs_need_different_documents():
    pairs = Pairs(first_P=np.array([0, 1]), second_P=np.array([2, 2]), similarity_P=np.ones(2))
    with pytest.raises(ConfigError, match="different documents"):
        derange(pairs, np.array([5, 5, 5]), 0)


# --- the stage ---------------------------------------------------------------------------------------


def documents(part, count):
    chance = np.random.default_rng(len(part))
    made = []
    for i in range(count):
        topic = i % 4
        words = [f"t{topic}x{w}" for w in chance.integers(0, 12, 30)] + [
            f"g{w}" for w in chance.integers(0, 12, 10)
        ]
        made.append(Document(id=f"{part}{i:03d}", text=" ".join(words), meta={"topic": topic}))
    return made


def run_pair(make_shard, tmp_path, num_files, **fields):
    parts = {part: documents(part, 80) for part in ("unique", "validation")}
    embedder = HashedWordsConfig(width=64).build(None)
    vectors = []
    for part, own in parts.items():
        for file in range(num_files):
            chosen = own[file::num_files]
            path = tmp_path / f"{part}-{num_files}-{file}.npy"
            np.save(path, embedder.vectors([d.text for d in chosen]))
            meta = {"part": part, "file": path.name, "ids": [d.id for d in chosen]}
            vectors.append(Document(id=path.stem, text="", meta=meta))
    shard = make_shard(embed=vectors, **parts)
    rule = PairRule(num_neighbors=30, neighbors_per_document=10, max_per_first=3, label_key="topic", **fields)
    return list(Pair(rule=rule).run((), shard=shard))


def test_the_stage_pairs_documents_of_one_topic_and_its_control_does_not(make_shard, tmp_path):
    made = run_pair(make_shard, tmp_path, 1)
    kinds = Counter((d.meta["kind"], d.meta["part"]) for d in made)
    assert kinds[PAIR, "unique"] == kinds[RANDOM, "unique"] > 0
    assert kinds[PAIR, "validation"] == kinds[RANDOM, "validation"] > 0
    topic = {d.id: d.meta["topic"] for part in ("unique", "validation") for d in documents(part, 80)}
    same = {
        kind: np.mean([topic[d.parents[0]] == topic[d.parents[1]] for d in made if d.meta["kind"] == kind])
        for kind in (PAIR, RANDOM)
    }
    assert same[PAIR] > 0.95
    assert same[RANDOM] < 0.5
    reports = [d.meta for d in made if d.meta["kind"] == REPORT]
    assert all(r["recall"] == 1.0 and r["same_label"] > 0.95 for r in reports)
    assert all(r["neighbors_above"] == pytest.approx(10, abs=5) for r in reports)


def test_pairs_are_the_same_for_any_number_of_files(make_shard, tmp_path):
    one = run_pair(make_shard, tmp_path, 1)
    for num_files in (2, 7):
        assert run_pair(make_shard, tmp_path, num_files) == one


def test_a_threshold_that_nothing_passes_is_refused(make_shard, tmp_path):
    with pytest.raises(ConfigError, match="none above"):
        run_pair(make_shard, tmp_path, 1, threshold=0.9999)
