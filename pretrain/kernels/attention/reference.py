"""Attention in plain jnp: the definition, which is the oracle of every kernel, and the XLA path that CPUs run.

The XLA path is dense for short rows (the probabilities are kept for the backward pass) and works through blocks of
queries for long ones (memory O(T·block), blocks above the diagonal or outside the window are never formed).

B rows, T query time, S key time, N query heads, K key-value heads, G = N/K, H head width, X = G·T folded rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pretrain.kernels.attention.math import MASKED
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, allowed_BTS, key_mask_BTS

# Rows up to this length go through one dense block; measured on two CPU cores, see the commit.
DENSE_LIMIT = 2048
QUERY_CHUNK = 512
# More blocks than this are looped over by lax.map instead of being unrolled, to bound compile time.
MAX_UNROLLED = 16


def definition(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    sinks_N: Float[Array, " N"] | None,
    spec: AttentionSpec,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The output and the natural log-sum-exp, computed in `dtype` by the formula of the textbook."""
    q_BTNH, k_BSKH, v_BSKH = (x.astype(dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = jnp.repeat(k_BSKH, group, axis=2), jnp.repeat(v_BSKH, group, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest") * score_scale(
        spec, q_BTNH.shape[3]
    )
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = jnp.where(mask_BTS[:, None], scores, MASKED)
    if sinks_N is not None:
        sink = jnp.broadcast_to(sinks_N.astype(dtype)[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], axis=3)
    lse_BNT = jax.nn.logsumexp(scores, axis=3)
    p_BNTS = jnp.exp(scores[..., : k_BSNH.shape[1]] - lse_BNT[..., None])
    return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH, precision="highest"), lse_BNT


def score_scale(spec: AttentionSpec, width: int) -> float:
    """The factor of q·k: `spec.scale`, or 1/sqrt(H)."""
    return width**-0.5 if spec.scale is None else spec.scale


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    plan: PackPlan,
    sinks_N: Float[Array, " N"] | None,
    spec: AttentionSpec,
    *,
    q_offset: int | Array = 0,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp by XLA. `plan` holds the local queries; `chunk` is the block of queries.

    q_offset: row of the first query among the keys, a scalar or one for each batch row.
    """
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if chunk is None:
        chunk = num_queries if num_queries <= DENSE_LIMIT else QUERY_CHUNK
    if chunk >= num_queries:
        mask = allowed_BTS(plan, q_offset, num_keys)
        return _dense(spec, q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
    # Only o and lse of a block survive to the backward pass, which forms the block's probabilities again.
    block = jax.checkpoint(functools.partial(_dense, spec))
    last_BT = plan.last_keys_BT(q_offset)
    num_blocks = -(-num_queries // chunk)
    if num_blocks <= MAX_UNROLLED:
        outputs, lses = [], []
        for start in range(0, num_queries, chunk):
            stop = min(start + chunk, num_queries)
            lo, hi = _static_keys(plan, q_offset, start, stop, num_keys)
            mask = key_mask_BTS(plan.k_lo_BT[:, start:stop] - lo, last_BT[:, start:stop] - lo, hi - lo)
            o, lse = block(q_BTNH[:, start:stop], k_BSKH[:, lo:hi], v_BSKH[:, lo:hi], mask, sinks_N)
            outputs.append(o)
            lses.append(lse)
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=2)

    padding = num_blocks * chunk - num_queries
    # Rows of padding repeat the last query's range, so that no row of the block is empty.
    q, k_lo, last = (
        _blocks(jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge"), chunk)
        for x in (q_BTNH, plan.k_lo_BT, last_BT)
    )
    o, lse = lax.map(
        lambda x: block(x[0], k_BSKH, v_BSKH, key_mask_BTS(x[1], x[2], num_keys), sinks_N), (q, k_lo, last)
    )
    o = jnp.moveaxis(o, 0, 1).reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])
    lse = jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], -1)
    return o[:, :num_queries], lse[:, :, :num_queries]


def _blocks(x: Array, chunk: int) -> Array:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _static_keys(
    plan: PackPlan, q_offset: int | Array, start: int, stop: int, num_keys: int
) -> tuple[int, int]:
    """Keys that the queries [start, stop) can reach whatever the packing, when the offset is known."""
    if not isinstance(q_offset, int):
        return 0, num_keys
    lo = 0 if plan.window is None else max(0, q_offset + start - plan.window + 1)
    if plan.causal:
        return lo, min(num_keys, q_offset + stop)
    return lo, num_keys if plan.window is None else min(num_keys, q_offset + stop - 1 + plan.window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(
    spec: AttentionSpec, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, sinks_N: Array | None
) -> tuple[Array, Array]:
    return _dense_forward(spec, q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N)[0]


def _fold(x_BTNH: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G·T, H]: the heads of a group become rows, so one matmul serves them."""
    batch, time, heads, width = x_BTNH.shape
    x = x_BTNH.reshape(batch, time, num_kv_heads, heads // num_kv_heads, width)
    return x.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, width)


def _unfold(x_BKXH: Array, time: int) -> Array:
    batch, kv_heads, rows, width = x_BKXH.shape
    x = x_BKXH.reshape(batch, kv_heads, rows // time, time, width)
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, time, -1, width)


def _dense_forward(spec, q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N):
    batch, time, heads, width = q_BTNH.shape
    kv_heads, keys = k_BSKH.shape[2], k_BSKH.shape[1]
    group = heads // kv_heads
    q_BKXH = _fold(q_BTNH, kv_heads)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores * score_scale(spec, width)
    tanh = None
    if spec.softcap is not None:
        tanh = jnp.tanh(scores / spec.softcap)
        scores = spec.softcap * tanh
    scores = scores.reshape(batch, kv_heads, group, time, keys)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    top = scores.max(axis=4, keepdims=True)
    if sinks_N is not None:
        sink = sinks_N.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        top = jnp.maximum(top, sink)
    p = jnp.exp(scores - top)
    total = p.sum(axis=4, keepdims=True)
    if sinks_N is not None:
        total = total + jnp.exp(sink - top)
    p_BKXS = (p * (1.0 / total)).reshape(batch, kv_heads, group * time, keys)
    lse_BNT = (top + jnp.log(total)).reshape(batch, heads, time)
    o_BKXH = jnp.einsum(
        "BKXS,BKSH->BKXH", p_BKXS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
    )
    outputs = (_unfold(o_BKXH, time).astype(q_BTNH.dtype), lse_BNT)
    return outputs, (q_BKXH, k_BKSH, v_BKSH, p_BKXS, o_BKXH, tanh, sinks_N, lse_BNT)


def _dense_backward(spec, residuals, cotangents):
    q_BKXH, k_BKSH, v_BKSH, p_BKXS, o_BKXH, tanh, sinks_N, lse_BNT = residuals
    do_BTNH, dlse_BNT = cotangents
    batch, time, heads, width = do_BTNH.shape
    kv_heads = k_BKSH.shape[1]
    do_BKXH = _fold(do_BTNH, kv_heads)
    narrow = do_BKXH.dtype
    delta = (o_BKXH * do_BKXH.astype(jnp.float32)).sum(axis=3) - dlse_BNT.reshape(batch, kv_heads, -1)
    dv = jnp.einsum("BKXS,BKXH->BKSH", p_BKXS.astype(narrow), do_BKXH, preferred_element_type=jnp.float32)
    dp = jnp.einsum("BKXH,BKSH->BKXS", do_BKXH, v_BKSH, preferred_element_type=jnp.float32)
    ds = p_BKXS * (dp - delta[..., None])
    if tanh is not None:
        ds = ds * (1.0 - tanh * tanh)
    ds = (ds * score_scale(spec, width)).astype(narrow)
    dq = jnp.einsum("BKXS,BKSH->BKXH", ds, k_BKSH, preferred_element_type=jnp.float32)
    dk = jnp.einsum("BKXS,BKXH->BKSH", ds, q_BKXH, preferred_element_type=jnp.float32)
    dsinks_N = None
    if sinks_N is not None:
        weight_BNT = jnp.exp(sinks_N.astype(jnp.float32)[None, :, None] - lse_BNT)
        dsinks_N = -(weight_BNT * delta.reshape(batch, heads, time)).sum(axis=(0, 2)).astype(sinks_N.dtype)
    dq = _unfold(dq, time).astype(q_BKXH.dtype)
    dk, dv = (x.transpose(0, 2, 1, 3) for x in (dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype)))
    return dq, dk, dv, None, dsinks_N


_dense.defvjp(_dense_forward, _dense_backward)
