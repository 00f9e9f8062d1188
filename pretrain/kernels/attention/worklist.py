"""The work list of a kernel: the visited blocks of a plan in order, so that the grid has no idle step.

Built from the block bounds by XLA, O(steps); a TPU kernel reads it from scalar memory. Every outer block has at least
one step, because an empty range (possible for keys under context sharding) must still write zeros.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pretrain.kernels.attention.plan import Bounds, PackPlan, block_bounds

# Bits of a step's flags.
FIRST, LAST, MASKED, COMPUTE = 1, 2, 4, 8
FLAG_BITS = 4
OUTER_BITS = 16

# Scalar memory holds about a megabyte; a table of a million-token batch overflowed it elsewhere (MaxText issue 4929).
MAX_TABLE_BYTES = 512 * 1024


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["outer", "inner", "num_steps"],
    meta_fields=["side", "block_q", "block_k"],
)
@dataclasses.dataclass(frozen=True)
class WorkList:
    """Steps in order: outer = batch row << 16 | outer block, inner = inner block << 4 | flags; int32 [max steps].

    num_steps has shape [1], so that the lists of several shards concatenate.
    """

    outer: Int[Array, " steps"]
    inner: Int[Array, " steps"]
    num_steps: Int[Array, " one"]
    side: str
    block_q: int
    block_k: int


def work_list(
    plan: PackPlan, *, side: str, block_q: int, block_k: int, q_offset: int | Array = 0
) -> WorkList:
    """The work list of one kernel. `plan` holds the local queries; see `block_bounds`."""
    bounds = block_bounds(plan, block_q=block_q, block_k=block_k, side=side, q_offset=q_offset)
    limit = max_steps(*plan.k_lo_BT.shape, plan.q_hi_BS.shape[1], side, block_q, block_k, q_offset)
    return list_of(bounds, limit, side=side, block_q=block_q, block_k=block_k)


def list_of(bounds: Bounds, limit: int, *, side: str, block_q: int, block_k: int) -> WorkList:
    """The work list of given bounds; `limit` is the length of its tables."""
    outer, inner, num_steps = _steps(bounds, limit)
    return WorkList(outer, inner, num_steps, side, block_q, block_k)


def max_steps(
    batch: int, num_queries: int, num_keys: int, side: str, block_q: int, block_k: int, q_offset: int | Array
) -> int:
    """The longest list any packing can give: what a single causal document visits, or everything."""
    num_q, num_k = num_queries // block_q, num_keys // block_k
    if not isinstance(q_offset, int):
        return batch * num_q * num_k
    if side == "q":
        steps = [min((q_offset + (i + 1) * block_q - 1) // block_k + 1, num_k) for i in range(num_q)]
    else:
        steps = [max(num_q - max(j * block_k - q_offset, 0) // block_q, 1) for j in range(num_k)]
    return batch * sum(steps)


def _steps(bounds: Bounds, max_steps: int) -> tuple[Array, Array, Array]:
    batch, num_outer = bounds.lo.shape
    lo, full_lo, full_hi, hi = (x.reshape(-1) for x in (bounds.lo, bounds.full_lo, bounds.full_hi, bounds.hi))
    count = jnp.maximum(hi - lo, 1)
    ends = jnp.cumsum(count)
    step = jnp.arange(max_steps, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, step, side="right").astype(jnp.int32), batch * num_outer - 1)
    place = step - (ends - count)[row]
    block = lo[row] + place
    compute = block < hi[row]
    masked = (block < full_lo[row]) | (block >= full_hi[row])
    flags = (
        jnp.where(place == 0, FIRST, 0)
        | jnp.where(place == count[row] - 1, LAST, 0)
        | jnp.where(masked, MASKED, 0)
        | jnp.where(compute, COMPUTE, 0)
    )
    # The block of a flush-only step may lie one past the end: it is fetched, never read.
    block = jnp.maximum(jnp.minimum(block, hi[row] - 1), 0)
    outer = ((row // num_outer) << OUTER_BITS) | (row % num_outer)
    return (
        outer.astype(jnp.int32),
        ((block << FLAG_BITS) | flags).astype(jnp.int32),
        ends[-1:].astype(jnp.int32),
    )
