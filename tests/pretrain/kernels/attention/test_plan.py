"""The plan and its work lists: exact by brute force, for any packing, window, block and context shard."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.kernels.attention import worklist
from pretrain.kernels.attention.plan import (
    AttentionSpec,
    allowed_BTS,
    block_bounds,
    make_plan,
    visited_blocks,
)

NUM_KEYS = 48
# Compiled once for all packings: op by op they are most of the time of these tests.
BOUNDS = jax.jit(block_bounds, static_argnames=("block_q", "block_k", "side"))
WORK = jax.jit(worklist.work_list, static_argnames=("block_q", "block_k", "side"))
WORK_AT_ZERO = jax.jit(
    functools.partial(worklist.work_list, q_offset=0), static_argnames=("block_q", "block_k", "side")
)


@st.composite
def packings(draw):
    """One row of segment ids 1, 2, .. with padding at the end."""
    lengths = draw(st.lists(st.integers(1, NUM_KEYS), max_size=NUM_KEYS))
    row = np.zeros(NUM_KEYS, np.int32)
    start = 0
    for i, n in enumerate(lengths):
        row[start : start + n] = i + 1
        start += n
    return row[None]


windows = st.one_of(st.none(), st.integers(1, 60))


@given(segments=packings(), window=windows, causal=st.booleans())
def test_the_plan_says_what_segments_and_window_say(segments, window, causal, allowed):
    spec = AttentionSpec(window=window, causal=causal)
    plan = make_plan(segments, spec, seq_len=NUM_KEYS)
    np.testing.assert_array_equal(
        allowed_BTS(plan, 0, NUM_KEYS), allowed(segments, window=window, causal=causal)
    )


@given(
    segments=packings(), window=windows, block_q=st.sampled_from([4, 8, 16]), block_k=st.sampled_from([4, 8, 16]),
    shards=st.sampled_from([1, 3]), data=st.data(),
)  # fmt: skip
def test_block_ranges_hold_the_allowed_blocks_and_no_other(
    segments, window, block_q, block_k, shards, data, allowed
):
    num_queries = NUM_KEYS // shards
    q_offset = num_queries * data.draw(st.integers(0, shards - 1))
    full = make_plan(segments, AttentionSpec(window=window), seq_len=NUM_KEYS)
    plan = full.rows(q_offset, num_queries)
    mask = allowed(segments, window=window, q_offset=q_offset, num_queries=num_queries)[0]
    tiled = mask.reshape(num_queries // block_q, block_q, NUM_KEYS // block_k, block_k).swapaxes(1, 2)
    any_QK, all_QK = tiled.any(axis=(2, 3)), tiled.all(axis=(2, 3))
    for side, some, every in (("q", any_QK, all_QK), ("k", any_QK.T, all_QK.T)):
        bounds = block_bounds(plan, block_q=block_q, block_k=block_k, side=side, q_offset=q_offset)
        lo, full_lo, full_hi, hi = (
            np.asarray(getattr(bounds, f.name))[0] for f in dataclasses.fields(bounds)
        )
        assert (0 <= lo).all()
        assert (lo <= full_lo).all()
        assert (full_lo <= full_hi).all()
        assert (full_hi <= hi).all()
        place = np.arange(some.shape[1])[None]
        np.testing.assert_array_equal((place >= lo[:, None]) & (place < hi[:, None]), some)
        np.testing.assert_array_equal((place >= full_lo[:, None]) & (place < full_hi[:, None]), every)


@settings(max_examples=30)
@given(segments=packings(), window=windows, side=st.sampled_from(["q", "k"]), traced=st.booleans())
def test_a_work_list_is_its_bounds_in_order(segments, window, side, traced):
    """Every visited block once, flags at both ends of an outer block, masks where not all pairs are allowed."""
    plan = make_plan(segments, AttentionSpec(window=window), seq_len=NUM_KEYS)
    offset = 0
    if traced:
        plan, offset = plan.rows(16, 16), jnp.int32(16)
    bounds = BOUNDS(plan, block_q=8, block_k=4, side=side, q_offset=offset)
    lo, full_lo, full_hi, hi = (np.asarray(getattr(bounds, f.name))[0] for f in dataclasses.fields(bounds))
    wanted = []
    for outer in range(len(lo)):
        inner = list(range(lo[outer], hi[outer])) or [None]
        for i, block in enumerate(inner):
            flags = worklist.FIRST * (i == 0) | worklist.LAST * (i == len(inner) - 1)
            if block is not None:
                flags |= worklist.COMPUTE | worklist.MASKED * (not full_lo[outer] <= block < full_hi[outer])
            wanted.append((outer, block, flags))
    if traced:
        work = WORK(plan, side=side, block_q=8, block_k=4, q_offset=offset)
    else:
        work = WORK_AT_ZERO(plan, side=side, block_q=8, block_k=4)
    work = jax.tree.map(np.asarray, work)
    steps = int(work.num_steps[0])
    assert steps == len(wanted) <= len(work.outer)
    for (outer, block, flags), word, inner in zip(
        wanted, work.outer[:steps], work.inner[:steps], strict=True
    ):
        assert int(word) == outer
        if block is None:
            assert not int(inner) & worklist.COMPUTE
            assert int(inner) & worklist.FIRST
            assert int(inner) & worklist.LAST
        else:
            assert (int(inner) >> worklist.FLAG_BITS, int(inner) & (2**worklist.FLAG_BITS - 1)) == (
                block,
                flags,
            )


def test_renumbered_documents_give_the_same_plan():
    spec = AttentionSpec()
    one = make_plan(np.array([[1, 1, 2, 2, 2, 3, 0, 0]]), spec, seq_len=8)
    two = make_plan(np.array([[4, 4, 9, 9, 9, 70, 0, 0]]), spec, seq_len=8)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_plan_under_jit_equals_the_plan_outside():
    spec = AttentionSpec(window=3)
    segments = np.array([[1, 1, 2, 2, 2, 3, 0, 0]])
    inside = jax.jit(lambda s: make_plan(s, spec, seq_len=8))(segments)
    jax.tree.map(np.testing.assert_array_equal, inside, make_plan(segments, spec, seq_len=8))


def test_padding_behind_the_last_key_moves_no_real_query():
    """The rows of a batch are decoded together, and the one that ends first is padded."""
    whole = make_plan(None, AttentionSpec(window=3), seq_len=12, batch=2)
    local = whole.rows(jnp.asarray([10, 4], jnp.int32), 4)
    np.testing.assert_array_equal(local.k_lo_BT[0, :2], whole.k_lo_BT[0, 10:])
    np.testing.assert_array_equal(local.k_lo_BT[1], whole.k_lo_BT[1, 4:8])


def test_visited_blocks_of_one_document_are_the_triangle():
    plan = make_plan(None, AttentionSpec(), seq_len=64, batch=2)
    np.testing.assert_array_equal(visited_blocks(plan, block_q=8, block_k=8), [36, 36])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[1, 2, 1]], r"sorted along a row, got 1 at \[0, 2\] after 2; number the documents"),
        ([[1, 0, 1]], r"sorted along a row, got 1 at \[0, 2\] after 1; number the documents"),
        ([[1, 1, 2], [3, 3, 2]], r"got 2 at \[1, 2\] after 3"),
        ([[1, 2]], r"shape \[B, 3\], got \(1, 2\); give one id for each key"),
        ([[1.0, 1.0, 2.0]], r"integers, got float64; cast them"),
    ],
)
def test_bad_segment_ids_are_refused(segments, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(np.array(segments), AttentionSpec(), seq_len=3)


@pytest.mark.parametrize(
    ("segments", "sizes", "message"),
    [
        ([[1, 1, 2]], {"seq_len": 3}, "must be an array, got list; convert them by np.asarray"),
        (np.ones((0, 3), int), {"seq_len": 3}, "at least one row and one key, got batch 0 and seq_len 3"),
        (None, {"seq_len": 0}, "at least one row and one key, got batch 1 and seq_len 0; leave empty"),
        (None, {"seq_len": 3, "batch": 0}, "at least one row and one key, got batch 0 and seq_len 3"),
    ],
)
def test_a_plan_of_nothing_or_of_no_array_is_refused(segments, sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(segments, AttentionSpec(), **sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window .* integer >= 1, got 0; use None"),
        ({"window": 2.5}, "window .* integer >= 1, got 2.5; use None"),
        ({"window": True}, "window .* integer >= 1, got True; use None"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, got 0.0; use None for none"),
        ({"softcap": math.inf}, "softcap must be a finite number > 0, got inf; use None for none"),
        ({"softcap": math.nan}, "softcap must be a finite number > 0, got nan; use None for none"),
        ({"softcap": "50"}, "softcap must be a finite number > 0, got '50'; use None for none"),
        ({"scale": 0}, r"scale must be a finite number > 0, got 0; use None for 1/sqrt\(head width\)"),
        ({"scale": -1.0}, "scale must be a finite number > 0, got -1.0; use None"),
        ({"scale": math.inf}, "scale must be a finite number > 0, got inf; use None"),
        ({"scale": math.nan}, "scale must be a finite number > 0, got nan; use None"),
        ({"causal": None}, "causal must be True or False, got None; give one of them"),
    ],
)
def test_bad_specs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AttentionSpec(**fields)


def test_all_faults_of_a_spec_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        AttentionSpec(window=-1, softcap=math.nan, scale=0.0)
    assert len(caught.value.faults) == 3
