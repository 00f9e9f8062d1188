"""Laws of drawing a token: the filters keep what a sort would keep, and frequencies meet probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.draw import Settings, bisect, draw, draw_faults, invert_cumulative, seed_words

draw_jit = jax.jit(draw)


def settings_of(slots, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seeds=None):
    def column(value, dtype):
        return np.full(slots, value, dtype)

    return Settings(
        temperature_S=column(temperature, np.float32),
        top_k_S=column(top_k, np.int32),
        top_p_S=column(top_p, np.float32),
        min_p_S=column(min_p, np.float32),
        penalty_S=column(penalty, np.float32),
        seed_S2=np.stack([seed_words(seed) for seed in (range(slots) if seeds is None else seeds)]),
    )


def draws(logits, count, **options):
    """`count` tokens for one vector of logits, each from a seed of its own."""
    logits_SV = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    token_S, _ = draw_jit(
        logits_SV, np.zeros(logits_SV.shape, bool), np.zeros(count, np.int32), settings_of(count, **options)
    )
    return np.asarray(token_S)


def kept_by_sorting(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The textbook: sort, cut, cut, cut; ties with the last token kept stay."""
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        last = np.searchsorted(np.cumsum(ordered), top_p * p.sum())
        p = np.where(p >= ordered[min(last, len(p) - 1)], p, 0)
    return p * (p >= min_p)


@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.35, 0.01]),
    min_p=st.sampled_from([0.0, 0.2]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=40)
def test_only_tokens_that_the_filters_keep_are_drawn(seed, top_k, top_p, min_p, temperature):
    logits = np.random.default_rng(seed).normal(scale=2, size=20)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = set(np.flatnonzero(kept_by_sorting(logits, **options)))
    assert set(draws(logits, 256, **options)) <= kept


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.15}])
def test_frequencies_meet_the_probabilities(options):
    logits = np.array([1.5, 0.2, -1.0, 1.1, 0.0, -3.0, 0.7])
    count = 20_000
    p = kept_by_sorting(logits, **options)
    p = p / p.sum()
    frequency = np.bincount(draws(logits, count, **options), minlength=7) / count
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(frequency, p, rtol=0, atol=5 * np.sqrt(0.25 / count))
    assert not frequency[p == 0].any()


def test_bisection_finds_the_threshold_to_the_last_bit():
    weight_SV = np.random.default_rng(0).uniform(size=(8, 50)).astype(np.float32)
    for k in (1, 7, 50):
        got = np.asarray(bisect(jnp.asarray(weight_SV), lambda above, k=k: above.sum(axis=1) >= k))
        np.testing.assert_array_equal(got, np.sort(weight_SV, axis=1)[:, -k])


@given(seed=st.integers(0, 1000), vocab=st.sampled_from([1, 255, 256, 257, 700]))
@settings(max_examples=25)
def test_the_cumulative_is_inverted_in_order_and_never_at_weight_zero(seed, vocab):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(size=vocab).astype(np.float32) * (rng.uniform(size=vocab) < 0.3)
    weight[rng.integers(vocab)] = 1
    uniform = np.linspace(0, 1, 64, endpoint=False).astype(np.float32)
    token = np.asarray(invert_cumulative(np.tile(weight, (64, 1)), uniform))
    assert (np.diff(token) >= 0).all()
    assert (weight[token[token >= 0]] > 0).all()
    want = np.searchsorted(
        np.cumsum(weight.astype(np.float64)), uniform * weight.sum(dtype=np.float64), side="right"
    )
    # A uniform number within rounding of a boundary may fall on its other side.
    assert (token != want).mean() < 0.05


def test_greedy_takes_the_likeliest_and_reports_the_models_own_probability():
    logits_SV = np.random.default_rng(0).normal(size=(3, 30)).astype(np.float32)
    seen = np.zeros(logits_SV.shape, bool)
    for temperature in (0.0, 3.0):
        token_S, logprob_S = draw_jit(
            logits_SV, seen, np.arange(3, dtype=np.int32), settings_of(3, temperature=temperature, top_k=5)
        )
        expected = jax.nn.log_softmax(logits_SV)[np.arange(3), np.asarray(token_S)]
        np.testing.assert_allclose(logprob_S, expected, rtol=0, atol=1e-5)
        if temperature == 0:
            np.testing.assert_array_equal(token_S, logits_SV.argmax(axis=1))


def test_the_penalty_lowers_what_was_seen_whatever_its_sign():
    logits_SV = np.array([[2.0, 1.5, -1.0], [-0.5, -0.6, -2.0]], np.float32)
    seen_SV = np.array([[True, False, False], [True, False, False]])
    token_S, _ = draw_jit(
        logits_SV, seen_SV, np.zeros(2, np.int32), settings_of(2, temperature=0.0, penalty=1.5)
    )
    np.testing.assert_array_equal(token_S, [1, 1])


def test_a_slot_keeps_its_token_whatever_the_others_ask_for():
    """Filters and penalties of a neighbor run the other branches of the program."""
    logits_SV = np.random.default_rng(1).normal(size=(4, 300)).astype(np.float32)
    seen_SV = np.random.default_rng(2).uniform(size=(4, 300)) < 0.5
    plain = settings_of(4, seeds=[9, 1, 2, 3])
    before = draw_jit(logits_SV, seen_SV, np.full(4, 7, np.int32), plain)
    for change in ({"top_p": 0.3}, {"top_k": 2}, {"penalty": 3.0}, {"temperature": 0.0}, {"min_p": 0.5}):
        other = settings_of(4, seeds=[9, 1, 2, 3], **change)
        mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), plain, other)
        after = draw_jit(logits_SV, seen_SV, np.full(4, 7, np.int32), mixed)
        for a, b in zip(before, after, strict=True):
            assert np.asarray(a)[0] == np.asarray(b)[0], change


def test_seeds_of_63_bits_and_positions_give_other_numbers():
    logits = np.zeros((5, 1000), np.float32)
    seeds = [3, 3 + (1 << 32), 3, 4, (1 << 63) - 1]
    token, _ = draw_jit(
        logits, np.zeros(logits.shape, bool), np.array([0, 0, 1, 0, 0], np.int32), settings_of(5, seeds=seeds)
    )
    assert len(set(np.asarray(token).tolist())) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"min_p": 1.0}, "min_p must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_settings_out_of_range_get_one_line_each(change, message):
    good = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert draw_faults(**good) == []
    faults = draw_faults(**{**good, **change})
    assert len(faults) == 1
    assert message in faults[0]
