"""Decode attention: a few queries of each row against its cache, by blocks of keys until the longest row ends.

The work follows what the caches hold and not how long they may grow. A block that holds nothing for a row changes
none of that row's bits (its sums gain exact zeros, its maximum stays), so a row's result depends on the row alone,
whatever it is batched with. A cache shorter than the text is a ring: entry j holds the newest position p with
p = j modulo the length of the cache.

B rows, T query time, S entries of the cache, N query heads, K key-value heads, G = N/K, H head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.kernels.attention.api import (
    AUTO_ORDER,
    Choice,
    Declined,
    announce,
    attention,
    problem_of,
    reasons_against,
)
from pretrain.kernels.attention.math import MASKED
from pretrain.kernels.attention.plan import AttentionSpec
from pretrain.kernels.attention.reference import score_scale
from pretrain.kernels.attention.tpu import without_gradient

# Keys in a block at most: the granularity of the work. Blocks are multiples of the alignment.
BLOCK_KEYS = 128
_ALIGNMENT = 16
# What may be asked for: what `auto` asks, in that order, and what is taken by name only.
IMPLEMENTATIONS = (*AUTO_ORDER, "tpu_interpret")


def held_positions(
    lengths_B: Int[Array, " B"], first: int | Array, count: int, size: int
) -> Int[Array, "B C"]:
    """The text position in each of the entries [first, first + count) of a ring of `size`; negative where none."""
    entry_C = first + jnp.arange(count, dtype=jnp.int32)
    newest_B1 = lengths_B[:, None] - 1
    return newest_B1 - jnp.mod(newest_B1 - entry_C[None], size)


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    starts_B: Int[Array, " B"],
    lengths_B: Int[Array, " B"],
    *,
    spec: AttentionSpec,
    max_length: int,
    sinks_N: Float[Array, " N"] | None = None,
    impl: str = "auto",
    block_keys: int = BLOCK_KEYS,
) -> Float[Array, "B T N H"]:
    """Query t of row b stands at position starts_B[b] + t and sees the positions up to itself.

    `lengths_B` counts the positions that a row has been given, the queries' own keys included; none passes
    `max_length`. A row of length 0 gives zeros, or numbers that mean nothing. Softmax is in float32.
    sinks_N: one logit a head that joins the softmax's denominator and carries no value.

    What was taken, and why the others were not, is logged once for each distinct choice.

    Raises:
      ConfigError: shapes that do not belong together, all faults at once.
      NotImplementedError: an implementation asked for by name cannot do this, or the result is differentiated.
    """
    _check(q_BTNH, k_BKSH, v_BKSH, sinks_N, spec, max_length, impl)
    choice = choose_decode(q_BTNH, k_BKSH, spec, max_length, impl, sinks=sinks_N is not None)
    announce(f"decode {choice}")
    q_BTNH, k_BKSH, v_BKSH, sinks_N = without_gradient(
        "attention() has one", (q_BTNH, k_BKSH, v_BKSH, sinks_N)
    )
    if choice.impl == "xla":
        return _by_blocks(q_BTNH, k_BKSH, v_BKSH, sinks_N, starts_B, lengths_B, spec, block_keys)
    k_BSKH, v_BSKH = (jnp.swapaxes(x, 1, 2).astype(q_BTNH.dtype) for x in (k_BKSH, v_BKSH))
    return attention(q_BTNH, k_BSKH, v_BSKH, spec=spec, sinks_N=sinks_N, q_offset=starts_B, impl=choice.impl)


def choose_decode(
    q_BTNH: jax.ShapeDtypeStruct | Array,
    k_BKSH: jax.ShapeDtypeStruct | Array,
    spec: AttentionSpec,
    max_length: int,
    impl: str = "auto",
    *,
    sinks: bool = False,
) -> Choice:
    """Which implementation serves these shapes, and why the others do not; the kernels are those of `attention`.

    Raises Declined (a NotImplementedError) with every reason when `impl` cannot do it.
    """
    B, K, S, H = k_BKSH.shape
    k = jax.ShapeDtypeStruct((B, S, K, H), k_BKSH.dtype)
    problem = dataclasses.replace(problem_of(q_BTNH, k, spec, packed=False, sinks=sinks), offset="rows")
    declined: dict[str, list[str]] = {}
    for name in AUTO_ORDER if impl == "auto" else (impl,):
        if name == "xla":
            return Choice(name, declined)
        reasons = reasons_against(name, problem)
        if name in ("pallas_tpu", "tpu_interpret") and k_BKSH.shape[2] < max_length:
            reasons.append(f"reads keys in order, got a ring of {k_BKSH.shape[2]} for texts of {max_length}")
        if not reasons:
            return Choice(name, declined)
        declined[name] = reasons
    raise Declined(
        f"decode attention impl={impl!r} cannot do this: {'; '.join(declined[impl])}; take impl='xla', or auto"
    )


def _by_blocks(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    sinks_N: Array | None,
    starts_B: Array,
    lengths_B: Array,
    spec: AttentionSpec,
    block_keys: int,
) -> Array:
    """The softmax is carried from block to block of keys; the loop ends with the longest row."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # Blocks of about one size: 160 keys are twice 80, and not 128 and 128 of which 96 are seen twice.
    unit = min(_ALIGNMENT, block_keys)
    block = min(-(-S // (-(-S // block_keys) * unit)) * unit, S)
    q_BKXH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    position_BX = jnp.repeat(starts_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None], N // K, axis=1)
    scale = score_scale(spec, H)

    def visit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, o = state
        # The last block of a cache that blocks do not divide starts earlier and leaves out what was seen.
        first = jnp.minimum(i * block, S - block)
        k, v = (lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in (k_BKSH, v_BKSH))
        k, v = k.astype(q_BKXH.dtype), v.astype(q_BKXH.dtype)
        scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k, preferred_element_type=jnp.float32) * scale
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        held_BS = held_positions(lengths_B, first, block, S)
        fresh_S = first + jnp.arange(block, dtype=jnp.int32) >= i * block
        seen_BXS = (
            (held_BS >= 0)[:, None] & (held_BS[:, None] <= position_BX[:, :, None]) & fresh_S[None, None]
        )
        if spec.window is not None:
            seen_BXS &= held_BS[:, None] > position_BX[:, :, None] - spec.window
        seen = seen_BXS[:, None]
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=3, keepdims=True))
        p = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        keep = jnp.exp(top - new_top)
        part = jnp.einsum("BKXS,BKSH->BKXH", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_top, total * keep + p.sum(axis=3, keepdims=True), o * keep + part

    top = jnp.full((*q_BKXH.shape[:3], 1), MASKED, jnp.float32)
    total = jnp.zeros_like(top)
    if sinks_N is not None:
        sink_KX = jnp.tile(sinks_N.astype(jnp.float32).reshape(K, 1, N // K), (1, T, 1)).reshape(K, -1)
        sink = jnp.broadcast_to(sink_KX[None, :, :, None], top.shape)
        # A sink of -inf is none.
        top = jnp.maximum(top, sink)
        total = jnp.exp(sink - top)
    state = _varying_like(q_BTNH, (top, total, jnp.zeros(q_BKXH.shape, jnp.float32)))
    first, last = _blocks_to_visit(starts_B, lengths_B, spec.window, S, block)
    _, total, o = lax.fori_loop(first, last, visit, state)
    o_BKXH = o / jnp.where(total > 0, total, 1.0)
    o_BKTGH = o_BKXH.reshape(B, K, T, N // K, H)
    return o_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _blocks_to_visit(
    starts_B: Array, lengths_B: Array, window: int | None, size: int, block: int
) -> tuple[Array | int, Array]:
    """From the first block that a window reaches (a ring that has come round: from its beginning) to the last held."""
    longest = lengths_B.max()
    last = (jnp.minimum(longest, size) + block - 1) // block
    if window is None:
        return 0, last
    reached_B = jnp.where(lengths_B > 0, jnp.maximum(starts_B - window + 1, 0), size)
    return jnp.where(longest > size, 0, jnp.minimum(reached_B.min() // block, last)), last


def _varying_like(x: Array, tree):
    """Inside shard_map a loop's state varies over the mesh axes that its inputs vary over."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying)
    return jax.tree.map(lambda a: lax.pcast(a, axes, to="varying") if axes else a, tree)


def _check(q_BTNH, k_BKSH, v_BKSH, sinks_N, spec: AttentionSpec, max_length: int, impl: str) -> None:
    faults = []
    q, k, v = (tuple(x.shape) for x in (q_BTNH, k_BKSH, v_BKSH))
    if len(q) != 4 or len(k) != 4 or 0 in (*q, *k):
        raise ConfigError(
            f"q and the cache must be [B, T, N, H] and [B, K, S, H], none of them zero, got {q} and {k}; leave the "
            "call out where there is nothing to attend"
        )
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        faults.append(
            f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)} for a cache, got {impl!r}; use auto"
        )
    if not spec.causal:
        faults.append("decoding is causal, got causal=False; use attention() for two-sided rows")
    if k != v:
        faults.append(f"k and v must have one shape, got {k} and {v}; pad the narrower")
    if q[0] != k[0] or q[3] != k[3]:
        faults.append(f"q [B, T, N, H] and k [B, K, S, H] must agree in B and H, got {q} and {k}")
    if q[2] % k[1]:
        faults.append(
            f"query heads must be a multiple of key-value heads, got {q[2]} and {k[1]}; repeat the latter"
        )
    if sinks_N is not None and sinks_N.shape != (q[2],):
        faults.append(f"sinks must have one logit a query head, [{q[2]}], got {sinks_N.shape}; reshape them")
    needed = max_length if spec.window is None else min(max_length, spec.window + q[1] - 1)
    if k[2] < needed:
        faults.append(
            f"a cache must hold {needed} positions for texts of {max_length}, window {spec.window} and {q[1]} new "
            f"tokens, got {k[2]}; make it longer"
        )
    if faults:
        raise ConfigError(*faults)
