"""Laws of the ring: values and gradients of attention over all keys, whatever is packed, and no key of another document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.plan import AttentionSpec, make_plan
from pretrain.model.ring import ring_attention
from pretrain.sharding import MeshConfig, make_mesh

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 8
# Documents shorter and longer than a device's six positions, padding, and a row of one document.
SEGMENTS = np.array([[1] * 3 + [2] * 14 + [3] * 2 + [0] * 5, [1] * 24], np.int32)
RING, ROWS = PartitionSpec("fsdp", "context"), PartitionSpec("fsdp")


def inputs():
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def around_the_ring(spec):
    """(q, k, v) on eight devices, four of them a ring."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))

    def local(q, k, v, plan):
        offset = jax.lax.axis_index("context") * q.shape[1]
        return ring_attention(q, k, v, plan.rows(offset, q.shape[1]).k_lo_BT, "context", 4, spec)

    def run(q, k, v):
        rows = jax.sharding.reshard(jnp.asarray(SEGMENTS), ROWS)
        plan = jax.shard_map(
            functools.partial(make_plan, spec=spec, seq_len=LENGTH), in_specs=ROWS, out_specs=ROWS
        )(rows)
        mapped = jax.shard_map(local, in_specs=(RING, RING, RING, ROWS), out_specs=RING)
        return mapped(*(jax.sharding.reshard(x, RING) for x in (q, k, v)), plan)

    return mesh, run


@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(), AttentionSpec(window=9, softcap=2.0, scale=0.5)],
    ids=["plain", "window and cap"],
)
def test_values_and_gradients_are_those_of_all_keys_at_once(spec):
    *qkv, d = inputs()
    plan = make_plan(SEGMENTS, spec, seq_len=LENGTH)
    expected = functools.partial(attention, plan=plan, spec=spec, impl="reference")
    mesh, ring = around_the_ring(spec)

    def both(function, d, *qkv):
        out, pull = jax.vjp(function, *qkv)
        return out, *pull(d)

    wanted = jax.jit(functools.partial(both, expected))(d, *qkv)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, RING)) for x in (d, *qkv)]
        got = jax.jit(functools.partial(both, ring))(*sharded)
    for name, w, g in zip(("out", "dq", "dk", "dv"), wanted, got, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max(), err_msg=name)


def test_a_changed_key_reaches_no_query_of_another_document():
    q, k, v, _ = inputs()
    mesh, ring = around_the_ring(AttentionSpec())
    other_k, other_v = k.copy(), v.copy()
    other_k[0, 9], other_v[0, 9] = 7.0, -3.0  # of the second document, which lies on three devices
    with jax.set_mesh(mesh):
        run = jax.jit(ring)
        before, after = np.asarray(run(q, k, v)), np.asarray(run(q, other_k, other_v))
    same = (before == after).all(axis=(2, 3))
    assert same[0, :9].all()
    assert not same[0, 9:17].any()
    assert same[0, 17:].all()
    assert same[1].all()
