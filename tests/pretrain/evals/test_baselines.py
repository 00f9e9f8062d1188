"""Baselines: probabilities sum to one, known processes give known numbers, held-out text teaches nothing."""

import lzma
import math
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.evals import baselines
from pretrain.evals.baselines import TokenRows


def as_rows(stream, num_targets=16, source=0):
    """A stream cut into rows that overlap by one token, so that every pair is a target once."""
    num_rows = (len(stream) - 1) // num_targets
    starts = num_targets * np.arange(num_rows)[:, None]
    return TokenRows(
        tokens_BT1=np.asarray(stream)[starts + np.arange(num_targets + 1)].astype(np.int32),
        weights_BT=np.ones((num_rows, num_targets), np.float32),
        source_B=np.full(num_rows, source, np.int32),
    )


def markov(num_tokens, seed, vocab_size=8):
    """A chain and its entropy rate in nats."""
    transition = np.random.default_rng(7).dirichlet(np.full(vocab_size, 0.3), size=vocab_size)
    rng, stream = np.random.default_rng(seed), [0]
    choices = rng.random(num_tokens)
    cumulative = transition.cumsum(axis=1)
    for u in choices:
        stream.append(min(vocab_size - 1, int(np.searchsorted(cumulative[stream[-1]], u))))
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    rate = -np.sum(stationary[:, None] * transition * np.log(np.maximum(transition, 1e-300)))
    return np.array(stream), float(rate), float(-np.sum(stationary * np.log(stationary)))


@given(
    stream=st.lists(st.integers(0, 6), min_size=2, max_size=200),
    vocab_size=st.integers(7, 40),
)
@settings(max_examples=40)
def test_probabilities_of_all_continuations_sum_to_one(stream, vocab_size):
    model = baselines.fit_ngrams([as_rows(stream, num_targets=1)], vocab_size=vocab_size)
    following = np.arange(vocab_size)
    for context in range(vocab_size):  # contexts never seen included
        previous = np.full(vocab_size, context)
        for nats in (model.unigram_nats(previous, following), model.bigram_nats(previous, following)):
            assert np.all(np.isfinite(nats))
            assert np.exp(-nats).sum() == pytest.approx(1.0, abs=1e-9)


def test_a_markov_chain_is_scored_at_its_entropy_rate():
    stream, rate, entropy = markov(60_000, seed=1)
    heldout, _, _ = markov(20_000, seed=2)
    rows = as_rows(heldout)
    num_targets = rows.weights_BT.size
    scores = baselines.ngram_bits_per_byte(
        baselines.fit_ngrams([as_rows(stream)], vocab_size=8),
        [rows],
        heldout_bytes={"chain": num_targets},  # one byte a token: bits per byte = bits per token
        labels=["chain"],
    )
    # 20,000 samples have a standard error of about 0.01 bits.
    assert scores["bigram"]["overall"] == pytest.approx(rate / math.log(2), abs=0.04)
    assert scores["unigram"]["overall"] == pytest.approx(entropy / math.log(2), abs=0.04)


def test_on_independent_tokens_the_bigram_falls_back_to_the_unigram():
    rng = np.random.default_rng(3)
    stream, heldout = rng.zipf(1.3, size=(2, 20_000)) % 500
    scores = baselines.ngram_bits_per_byte(
        baselines.fit_ngrams([as_rows(stream)], vocab_size=500),
        [as_rows(heldout)],
        heldout_bytes={"noise": 20_000},
        labels=["noise"],
    )
    assert scores["bigram"]["overall"] == pytest.approx(scores["unigram"]["overall"], rel=0.02)


def test_only_targets_with_weight_are_counted_and_scored():
    stream, _, _ = markov(2_000, seed=1)
    rows = as_rows(stream)
    noise = TokenRows(
        tokens_BT1=np.full_like(rows.tokens_BT1, 5),
        weights_BT=np.zeros_like(rows.weights_BT),
        source_B=rows.source_B,
    )
    sizes = {"heldout_bytes": {"chain": 2_000}, "labels": ["chain"]}
    alone = baselines.ngram_bits_per_byte(baselines.fit_ngrams([rows], vocab_size=8), [rows], **sizes)
    mixed = baselines.ngram_bits_per_byte(
        baselines.fit_ngrams([rows, noise], vocab_size=8), [rows, noise], **sizes
    )
    for name in ("unigram", "bigram"):
        assert mixed[name] == pytest.approx(alone[name])


def test_sources_are_scored_apart_and_add_up_to_the_whole():
    stream, _, _ = markov(4_000, seed=1)
    easy, hard = as_rows(np.zeros(330, int), source=0), as_rows(stream[:330], source=2)
    model = baselines.fit_ngrams([as_rows(stream)], vocab_size=8)
    num_bytes = {"easy": 100, "hard": 300}
    scores = baselines.ngram_bits_per_byte(
        model, [easy, hard], heldout_bytes=num_bytes, labels=["easy", "unused", "hard"]
    )["bigram"]
    assert scores["overall"] * 400 == pytest.approx(scores["easy"] * 100 + scores["hard"] * 300)
    previous = following = np.zeros(easy.weights_BT.size, int)
    assert scores["easy"] * 100 * math.log(2) == pytest.approx(model.bigram_nats(previous, following).sum())


def test_a_single_pair_and_no_pair():
    model = baselines.fit_ngrams([as_rows([1, 2], num_targets=1)], vocab_size=4)
    assert model.bigram_nats(np.array([1]), np.array([2])) < math.log(4)
    with pytest.raises(ConfigError, match="need train rows with at least one target"):
        baselines.fit_ngrams([], vocab_size=4)


def test_counts_do_not_depend_on_when_they_are_merged(monkeypatch):
    stream, _, _ = markov(3_000, seed=1)
    batches = [as_rows(stream[i : i + 161]) for i in range(0, 2_880, 160)]
    at_once = baselines.fit_ngrams(batches, vocab_size=8)
    monkeypatch.setattr(baselines, "_MERGED_PAIRS", 300)
    piecewise = baselines.fit_ngrams(batches, vocab_size=8)
    for name in ("unigram_V", "context_V", "pair_keys", "pair_counts"):
        np.testing.assert_array_equal(getattr(at_once.counts, name), getattr(piecewise.counts, name))
    assert at_once.counts.num_tokens == 2_880
    np.testing.assert_array_equal(at_once.bigram_weights_K3, piecewise.bigram_weights_K3)


def test_once_enough_rows_are_fitted_on_the_others_are_counted(monkeypatch):
    monkeypatch.setattr(baselines, "_MAX_FITTED_PAIRS", 100)
    stream, _, _ = markov(3_000, seed=1)
    batches = [as_rows(stream[i : i + 161]) for i in range(0, 2_880, 160)]
    assert baselines.fit_ngrams(batches, vocab_size=8).counts.num_tokens == 2_880


def test_xz_is_the_command_line_tool():
    text = ("the quick brown fox jumps over the lazy dog " * 50).encode()
    other = bytes(range(256)) * 4
    scores = baselines.xz_bits_per_byte({"a": text, "empty": b"", "b": other})
    assert set(scores) == {"overall", "a", "b"}
    assert len(lzma.decompress(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))) == len(text)
    if shutil.which("xz"):
        for name, contents in (("a", text), ("b", other), ("overall", text + other)):
            packed = subprocess.run(
                ["xz", "-9e", "-c"], input=contents, capture_output=True, check=True
            ).stdout
            assert scores[name] == 8 * len(packed) / len(contents)
    else:
        assert 0 < scores["a"] < 1 < scores["b"] < 8
    with pytest.raises(ConfigError, match="xz baseline needs held-out bytes"):
        baselines.xz_bits_per_byte({"a": b""})


def test_all_baselines_at_once():
    stream, _, _ = markov(2_000, seed=1)
    text = (97 + stream[:500]).astype(np.uint8).tobytes()
    scores = baselines.baseline_bits_per_byte(
        [as_rows(stream)], [as_rows(stream[:500])], {"a": text}, vocab_size=8, labels=["a"]
    )
    assert list(scores) == ["unigram", "bigram", "xz"]
    assert scores["bigram"]["overall"] < scores["unigram"]["overall"]
    assert scores["xz"] == baselines.xz_bits_per_byte({"a": text})
