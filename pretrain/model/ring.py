"""Attention around a ring of devices: queries stay, keys and values travel from neighbor to neighbor.

A row split over the context axis needs all keys up to its own. Gathering them puts the whole row on every device; here
each holds one block of keys at a time and adds up the parts of its softmax (Liu et al., arXiv 2310.01889). Backward, the
gradients of a block travel with it. A block is skipped where no query of the device sees any of it, but devices with
early queries then wait for those with late ones: rows are cut in order, not in zigzag, so that the packing plan stays a
range. In plain JAX: the scores of one block of queries against one of keys are in memory, in float32.

B rows, T query time and S key time on one device, N query heads, K key-value heads, G = N/K, H head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pretrain.kernels.attention.math import MASKED
from pretrain.kernels.attention.plan import AttentionSpec
from pretrain.kernels.attention.reference import score_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    k_lo_BT: Int[Array, "B T"],
    axis: str,
    num_devices: int,
    spec: AttentionSpec,
) -> Float[Array, "B T N H"]:
    """Causal attention of the local queries to the keys of all `num_devices` devices of `axis`, inside `shard_map`.

    `k_lo_BT` is the first key that each local query may see, counted in the whole row.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, k_lo_BT, axis, num_devices, spec)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_lo_BT: jax.Array,
    axis: str,
    num_devices: int,
    spec: AttentionSpec,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    assert spec.causal, "a ring of keys is for causal attention"
    B, T, N, H = q.shape
    q_BTKGH = q.reshape(B, T, k.shape[2], -1, H)
    rank = jax.lax.axis_index(axis)

    def sums_of(k: jax.Array, v: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, _ = _logits(q_BTKGH, k, k_lo_BT, rank, block, spec)
        top = jnp.max(logits, axis=-1)
        p = jnp.exp(logits - top[..., None])
        out = jnp.einsum("bkgts,bskh->bkgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out, top, jnp.sum(p, axis=-1)

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        (k, v), sums = _to_next(carry[0], axis, num_devices), carry[1]
        block = (rank - index) % num_devices

        def add() -> tuple[jax.Array, jax.Array, jax.Array]:
            return _joined(sums, sums_of(k, v, block))

        return ((k, v), jax.lax.cond(_needed(k_lo_BT, rank, block), add, lambda: sums)), None

    own = sums_of(k, v, rank)
    (_, (out, top, total)), _ = jax.lax.scan(step, ((k, v), own), jnp.arange(1, num_devices))
    out = jnp.moveaxis(out / total[..., None], 3, 1).reshape(B, T, N, H).astype(q.dtype)
    out = checkpoint_name(out, "attn_out")
    lse = checkpoint_name(top + jnp.log(total), "attn_lse")
    return out, (q, k, v, k_lo_BT, out, lse)


def _backward(
    axis: str, num_devices: int, spec: AttentionSpec, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, k_lo_BT, out, lse = saved
    B, T, N, H = q.shape
    q_BTKGH, d_BTKGH = (x.reshape(B, T, k.shape[2], -1, H) for x in (q, d_out))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    delta = jnp.moveaxis(delta.reshape(B, T, k.shape[2], -1), 1, 3)
    rank = jax.lax.axis_index(axis)
    scale = score_scale(spec, H)

    def gradients(k: jax.Array, v: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, tanh = _logits(q_BTKGH, k, k_lo_BT, rank, block, spec)
        p = jnp.exp(logits - lse[..., None])
        dp = jnp.einsum("btkgh,bskh->bkgts", d_BTKGH, v, preferred_element_type=jnp.float32)
        ds = p * (dp - delta[..., None])
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = (ds * scale).astype(q.dtype)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return (
            dot("bkgts,bskh->btkgh", ds, k),
            dot("bkgts,btkgh->bskh", ds, q_BTKGH),
            dot("bkgts,btkgh->bskh", p.astype(q.dtype), d_BTKGH),
        )

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        travelling, dq = carry
        k, v, dk, dv = _to_next(travelling, axis, num_devices)
        block = (rank - index) % num_devices

        def add() -> tuple[jax.Array, jax.Array, jax.Array]:
            more = gradients(k, v, block)
            return dq + more[0], dk + more[1], dv + more[2]

        dq, dk, dv = jax.lax.cond(_needed(k_lo_BT, rank, block), add, lambda: (dq, dk, dv))
        return ((k, v, dk, dv), dq), None

    dq, dk, dv = gradients(k, v, rank)
    ((_, _, dk, dv), dq), _ = jax.lax.scan(step, ((k, v, dk, dv), dq), jnp.arange(1, num_devices))
    dk, dv = _to_next((dk, dv), axis, num_devices)  # the last way home
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_forward, _backward)


def _joined(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums (values, largest logit, weights) of two blocks of keys as those of one."""
    top = jnp.maximum(a[1], b[1])
    weight_a, weight_b = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    out = a[0] * weight_a[..., None] + b[0] * weight_b[..., None]
    return out, top, a[2] * weight_a + b[2] * weight_b


def _to_next(tree: tuple[jax.Array, ...], axis: str, num_devices: int) -> tuple[jax.Array, ...]:
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % num_devices) for i in range(num_devices)])


def _needed(k_lo_BT: jax.Array, rank: jax.Array, block: jax.Array) -> jax.Array:
    """Some local query sees some key of `block`."""
    return (block <= rank) & (jnp.min(k_lo_BT) < (block + 1) * k_lo_BT.shape[1])


def _logits(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    k_lo_BT: jax.Array,
    rank: jax.Array,
    block: jax.Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores [B, K, G, T, S] of the local queries against the keys of `block`, and the tanh of a soft cap."""
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores, tanh = scores * score_scale(spec, q_BTKGH.shape[-1]), None
    if spec.softcap is not None:
        tanh = jnp.tanh(scores / spec.softcap)
        scores = spec.softcap * tanh
    q_pos_BT = (rank * T + jnp.arange(T, dtype=jnp.int32))[None]
    k_pos_BTS = (block * S + jnp.arange(S, dtype=jnp.int32))[None, None]
    visible = (k_pos_BTS <= q_pos_BT[:, :, None]) & (k_pos_BTS >= k_lo_BT[:, :, None])
    return jnp.where(visible[:, None, None], scores, MASKED), tanh
