"""Laws of decode attention: the definition on what a cache holds, work that follows the rows, bits that stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.kernels.attention.api import announce, attention
from pretrain.kernels.attention.decode import choose_decode, decode_attention, held_positions
from pretrain.kernels.attention.plan import AttentionSpec

B, H, BLOCK = 3, 8, 4


@functools.partial(jax.jit, static_argnames="spec")
def decode(q, k, v, starts, lengths, spec):
    max_length = k.shape[2] if spec.window is None else 64
    return decode_attention(q, k, v, starts, lengths, spec=spec, max_length=max_length, block_keys=BLOCK)


def random_case(seed, *, heads, kv_heads, queries, entries, lengths):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, queries, heads, H)).astype(np.float32)
    k, v = (rng.normal(size=(B, kv_heads, entries, H)).astype(np.float32) for _ in range(2))
    lengths = np.array(lengths, np.int32)
    return q, k, v, np.maximum(lengths - queries, 0).astype(np.int32), lengths


def expected(oracle, q, k, v, starts, lengths, spec, sinks=None):
    """The definition in float64 and which queries see a key at all; keys are named by the position the ring holds."""
    size = k.shape[2]
    newest = lengths[:, None] - 1
    held = newest - (newest - np.arange(size)) % size
    position = starts[:, None] + np.arange(q.shape[1])
    mask = (held[:, None] >= 0) & (held[:, None] <= position[:, :, None])
    if spec.window is not None:
        mask &= held[:, None] > position[:, :, None] - spec.window
    sees = mask.any(axis=2)
    # A query that sees nothing has no sum to divide by.
    mask = np.where(sees[:, :, None], mask, True)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scale = H**-0.5 if spec.scale is None else spec.scale
    return oracle(q, k, v, mask, scale=scale, softcap=spec.softcap, sinks=sinks)["o"], sees


@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(4, 2, 1, 12), (4, 1, 1, 10), (2, 2, 3, 12)]),
    lengths=st.lists(st.integers(1, 30), min_size=B, max_size=B),
    variant=st.sampled_from([AttentionSpec(), AttentionSpec(window=5, softcap=2.0, scale=0.5)]),
)
@settings(max_examples=40)
def test_decoding_equals_the_definition(seed, shape, lengths, variant, oracle):
    """Lengths beyond the entries make rings; (4, 1, 1, 10) has a last block that blocks do not divide."""
    heads, kv_heads, queries, entries = shape
    if variant.window is None:
        lengths = [min(n, entries) for n in lengths]
    lengths = [max(n, queries) for n in lengths]
    case = random_case(
        seed, heads=heads, kv_heads=kv_heads, queries=queries, entries=entries, lengths=lengths
    )
    want, sees = expected(oracle, *case, variant)
    got = np.asarray(decode(*case, variant))
    np.testing.assert_allclose(got[sees], want[sees], rtol=0, atol=2e-6)


def test_positions_of_a_ring():
    held = np.asarray(held_positions(jnp.array([3, 4, 9, 0], jnp.int32), 0, 4, 4))
    np.testing.assert_array_equal(held[:3], [[0, 1, 2, -1], [0, 1, 2, 3], [8, 5, 6, 7]])
    assert (held[3] < 0).all()


def test_blocks_behind_the_longest_row_are_not_read():
    q, k, v, starts, lengths = random_case(0, heads=4, kv_heads=2, queries=1, entries=12, lengths=[3, 8, 1])
    clean = np.asarray(decode(q, k, v, starts, lengths, AttentionSpec()))
    k[:, :, 8:], v[:, :, 8:] = np.nan, np.nan
    np.testing.assert_array_equal(np.asarray(decode(q, k, v, starts, lengths, AttentionSpec())), clean)


def test_a_longer_neighbor_changes_no_bit():
    q, k, v, starts, lengths = random_case(1, heads=4, kv_heads=2, queries=1, entries=12, lengths=[3, 5, 1])
    before = np.asarray(decode(q, k, v, starts, lengths, AttentionSpec()))
    lengths[1], starts[1] = 12, 11
    after = np.asarray(decode(q, k, v, starts, lengths, AttentionSpec()))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()


def test_a_row_that_holds_nothing_gives_zeros():
    case = random_case(2, heads=4, kv_heads=2, queries=1, entries=12, lengths=[0, 5, 0])
    got = np.asarray(decode(*case, AttentionSpec()))
    assert not got[[0, 2]].any()
    assert np.isfinite(got).all()


def test_blocks_before_the_window_are_not_read():
    spec = AttentionSpec(window=3)
    q, k, v, starts, lengths = random_case(3, heads=4, kv_heads=2, queries=1, entries=12, lengths=[11, 12, 0])
    clean = np.asarray(decode(q, k, v, starts, lengths, spec))
    k[:, :, :8], v[:, :, :8] = np.nan, np.nan
    np.testing.assert_array_equal(np.asarray(decode(q, k, v, starts, lengths, spec))[:2], clean[:2])


@functools.cache
def by_tpu(spec):
    return jax.jit(
        functools.partial(
            decode_attention, spec=spec, max_length=1096, impl="tpu_interpret", block_keys=BLOCK
        )
    )


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=100, softcap=5.0)])
def test_the_tpu_kernel_reads_the_same_cache(spec):
    """1096 keys are two tiles, the second of which reaches beyond them: what lies there is NaN."""
    case = random_case(4, heads=4, kv_heads=2, queries=2, entries=1096, lengths=[2, 130, 1096])
    sinks = np.array([0.3, -np.inf, 2.0, -1.0], np.float32) if spec.softcap is None else None
    q, k, v, starts, lengths = case
    starts[0] = 1095  # its second query stands behind the last key
    want = decode_attention(*case, spec=spec, max_length=1096, impl="xla", sinks_N=sinks)
    got = by_tpu(spec)(*case, sinks_N=sinks)
    np.testing.assert_allclose(got[1:], want[1:], rtol=0, atol=2e-6)
    assert np.isfinite(np.asarray(got)).all()


def test_sinks_join_the_denominator(oracle):
    case = random_case(5, heads=4, kv_heads=2, queries=3, entries=12, lengths=[3, 12, 7])
    sinks = np.array([0.5, -1.0, -np.inf, 3.0], np.float32)
    got = decode_attention(*case, spec=AttentionSpec(), max_length=12, block_keys=BLOCK, sinks_N=sinks)
    want, _ = expected(oracle, *case, AttentionSpec(), sinks)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", ["xla", "tpu_interpret"])
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_a_gradient_is_refused_in_words(impl, differentiate):
    q, k, v, starts, lengths = random_case(6, heads=2, kv_heads=2, queries=1, entries=520, lengths=[1, 2, 3])

    @jax.jit
    def total(q):
        o = decode_attention(q, k, v, starts, lengths, spec=AttentionSpec(), max_length=520, impl=impl)
        return o.sum()

    with pytest.raises(
        NotImplementedError, match="decode attention has no gradient.*attention\\(\\) has one"
    ):
        differentiate(total)(q)


def test_the_kernel_for_a_cache_refuses_a_gradient_too():
    q, k = np.ones((1, 1, 2, 8), np.float32), np.ones((1, 520, 2, 8), np.float32)

    def total(k):
        return attention(q, k, k, q_offset=np.array([3]), impl="tpu_interpret").sum()

    with pytest.raises(
        NotImplementedError, match="no gradient.*give one offset for the batch, or impl='xla'"
    ):
        jax.grad(total)(k)


def test_dispatch_says_why_and_a_name_never_falls_back():
    q, k = (
        jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.float32),
        jax.ShapeDtypeStruct((2, 2, 1024, 64), jnp.float32),
    )
    choice = choose_decode(q, k, AttentionSpec(), 1024)
    assert choice.impl == "xla"
    assert "needs a TPU" in str(choice)
    assert "needs a Hopper GPU" in str(choice)
    with pytest.raises(NotImplementedError, match="a ring of 1024 for texts of 2048"):
        choose_decode(q, k, AttentionSpec(window=512), 2048, "tpu_interpret")
    with pytest.raises(
        NotImplementedError, match="'pallas_hopper' cannot do this: needs a Hopper.*take impl='xla'"
    ):
        choose_decode(q, k, AttentionSpec(), 1024, "pallas_hopper")


def test_on_hopper_the_kernel_of_training_says_that_it_serves_no_cache():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=1, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 4, 64), (2, 2, 1024, 64)))
    with jax.sharding.use_abstract_mesh(mesh):
        choice = choose_decode(q, k, AttentionSpec(), 1024)
    assert choice.impl == "xla"
    assert any("are for decoding, which it does not serve" in why for why in choice.declined["pallas_hopper"])
    assert "has no query offset" in choice.declined["cudnn"]


def test_what_serves_a_cache_is_logged_once(caplog):
    announce.cache_clear()
    case = random_case(7, heads=4, kv_heads=2, queries=1, entries=12, lengths=[3, 5, 1])
    decode_here = functools.partial(decode_attention, spec=AttentionSpec(), max_length=12)
    with caplog.at_level("INFO", logger=announce.__module__):
        for _ in range(3):
            jax.eval_shape(decode_here, *case)
    (record,) = caplog.records
    assert record.message.startswith("decode attention by xla (not pallas_tpu: needs a TPU, got cpu")
    assert "not pallas_hopper: " in record.message


def test_wrong_shapes_are_refused_all_at_once():
    q, k, v = (
        np.zeros((2, 1, 3, 8), np.float32),
        np.zeros((2, 2, 4, 8), np.float32),
        np.zeros((2, 2, 5, 8), np.float32),
    )
    rows = np.ones(2, np.int32)
    with pytest.raises(ConfigError) as error:
        decode_attention(q, k, v, rows, rows, spec=AttentionSpec(causal=False), max_length=9, impl="cuda")
    words = ("impl must be", "causal", "one shape", "multiple", "must hold 9 positions")
    assert [any(word in fault for fault in error.value.faults) for word in words] == [True] * 5
    nothing = np.zeros((2, 0, 2, 8), np.float32)
    with pytest.raises(ConfigError, match=r"none of them zero, got \(2, 0, 2, 8\)"):
        decode_attention(nothing, v, v, rows, rows, spec=AttentionSpec(), max_length=5)
    with pytest.raises(ConfigError, match=r"one logit a query head, \[2\], got \(3,\)"):
        decode_attention(
            q[:, :, :2], v, v, rows, rows, spec=AttentionSpec(), max_length=5, sinks_N=np.zeros(3)
        )
