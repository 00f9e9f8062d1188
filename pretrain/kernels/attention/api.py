"""The attention op: checks, dispatch that says what it took and why, and one signature for every implementation.

B rows, T query time, S key time, N query heads, K key-value heads, G = N/K, H head width.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.kernels.attention import reference
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, make_plan

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("xla", "reference")


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    plan: PackPlan | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    spec: AttentionSpec = AttentionSpec(),
    sinks_N: Float[Array, " N"] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention of each query to the keys of its document.

    plan: from `make_plan`, over the S keys; make it once a batch. segment_ids is sugar for that.
    sinks_N: one logit a head that joins the softmax's denominator and carries no value; differentiable.
    q_offset: row of the first query among the keys; needed when T differs from S, and in context parallelism.
      One offset a batch row, [B], serves decoding.
    return_lse: also the natural log-sum-exp of the scores, float32, differentiable.

    Raises ConfigError on bad input before anything is traced, NotImplementedError when an implementation asked for by
    name cannot do this.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, plan, segment_ids, spec, sinks_N, q_offset, impl)
    batch, num_queries = q_BTNH.shape[:2]
    num_keys = k_BSKH.shape[1]
    if plan is None:
        plan = make_plan(segment_ids, spec, seq_len=num_keys, batch=batch)
    offset = 0 if q_offset is None else q_offset
    if jnp.ndim(offset) == 1:
        take = jax.vmap(lambda k_lo_S, start: lax.dynamic_slice_in_dim(k_lo_S, start, num_queries))
        plan = dataclasses.replace(plan, k_lo_BT=take(plan.k_lo_BT, jnp.asarray(offset)))
    else:
        plan = plan.rows(offset, num_queries)
    if plan.k_lo_BT.shape[0] != batch:
        plan = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, x.shape[1])), plan)
    if impl == "reference":
        mask = reference._mask(plan.k_lo_BT, reference._last_key(plan, offset), num_keys)
        dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        o_BTNH, lse_BNT = reference.definition(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, spec, dtype=dtype)
        o_BTNH = o_BTNH.astype(q_BTNH.dtype)
    else:
        o_BTNH, lse_BNT = reference.xla_attention(q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, spec, q_offset=offset)
    return (o_BTNH, lse_BNT) if return_lse else o_BTNH


def _check(q, k, v, plan, segment_ids, spec, sinks, q_offset, impl) -> None:
    """Every rule on the arguments, all faults at once."""
    faults = []
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        faults.append(f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ConfigError(
            f"q, k, v must be [B, T, N, H], [B, S, K, H] twice, got {q.shape}, {k.shape}, {v.shape}; "
            "split the heads into a dimension of their own"
        )
    if k.shape != v.shape:
        faults.append(f"k and v must have one shape, got {k.shape} and {v.shape}; pad the narrower")
    if q.shape[0] != k.shape[0]:
        faults.append(f"q and k must have the same batch, got {q.shape[0]} and {k.shape[0]}; broadcast one of them")
    if q.shape[3] != k.shape[3]:
        faults.append(f"q and k must have one head width, got {q.shape[3]} and {k.shape[3]}; project to one width")
    if q.shape[2] % k.shape[2]:
        faults.append(
            f"query heads must be a multiple of key-value heads, got {q.shape[2]} and {k.shape[2]}; "
            f"use a divisor of {q.shape[2]} for the key-value heads"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
            faults.append(f"{name} must be bfloat16, float16 or float32, got {x.dtype}; cast it")
    if not q.dtype == k.dtype == v.dtype:
        faults.append(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if sinks is not None and sinks.shape != (q.shape[2],):
        faults.append(f"sinks must have one logit a query head, [{q.shape[2]}], got {sinks.shape}; reshape them")
    if plan is not None and segment_ids is not None:
        faults.append("give a plan or segment ids, not both; drop segment_ids")
    if plan is not None:
        if plan.q_hi_BS.shape[1] != k.shape[1] or plan.q_hi_BS.shape[0] not in (1, k.shape[0]):
            faults.append(
                f"the plan must cover the keys [{k.shape[0]}, {k.shape[1]}], got {plan.q_hi_BS.shape}; "
                "make it from the segment ids of all keys"
            )
        if (plan.causal, plan.window) != (spec.causal, spec.window):
            faults.append(
                f"plan and spec must agree, got causal {plan.causal} and {spec.causal}, window {plan.window} and "
                f"{spec.window}; make the plan with this spec"
            )
    if q_offset is None and q.shape[1] != k.shape[1]:
        faults.append(
            f"q_offset must be given when queries and keys differ in number, got {q.shape[1]} and {k.shape[1]}; "
            "it is the row of the first query among the keys"
        )
    if isinstance(q_offset, int) and not 0 <= q_offset <= k.shape[1] - q.shape[1]:
        faults.append(
            f"q_offset must lie in [0, {k.shape[1] - q.shape[1]}], got {q_offset}; every query needs its own key"
        )
    if faults:
        raise ConfigError("; ".join(faults))
