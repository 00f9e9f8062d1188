"""The packing plan: which keys each query may see, as one range per query, and which blocks that makes.

In a causal row of contiguous documents query t sees exactly the keys [k_lo(t), t] and key j is seen by exactly the
queries [j, q_hi(j)]. Both never decrease along the row, so the blocks that a tile has to visit are one interval, and
the blocks that need no mask are another inside it. The plan costs O(B·T) and is made once a batch, outside the layers.

B rows, T query time, S key time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pretrain.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What attention means, apart from the packing: static and hashable.

    `window` counts the query itself: query t sees keys in (t - window, t]. Without `causal` the window is two-sided.
    `scale` defaults to 1/sqrt(H). `softcap` c replaces a score s by c·tanh(s/c).
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.causal, bool):
            faults.append(f"causal must be True or False, got {self.causal!r}; give one of them")
        if self.window is not None and not (_is_whole(self.window) and self.window >= 1):
            faults.append(
                f"window counts the query itself and must be an integer >= 1, got {self.window!r}; use None for none"
            )
        for name, unset in (("softcap", "none"), ("scale", "1/sqrt(head width)")):
            value = getattr(self, name)
            if value is None:
                continue
            number = _is_whole(value) or isinstance(value, float | np.floating)
            # `not 0 < value` and not `value <= 0`: NaN is wrong.
            if not (number and 0 < value < math.inf):
                faults.append(f"{name} must be a finite number > 0, got {value!r}; use None for {unset}")
        if faults:
            raise ConfigError(*faults)


def _is_whole(value: object) -> bool:
    """An integer; to Python True is one too."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_lo_BT", "q_hi_BS", "work"],
    meta_fields=["causal", "window", "packed"],
)
@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Key and query ranges of a batch of rows, int32; positions are rows of the key sequence.

    k_lo_BT: first key that a query may see. q_hi_BS: last query that may see a key. Without `causal`, query t sees
    keys [k_lo(t), q_hi(t)]: the relation is symmetric. work: what the kernels of one implementation make of the plan,
    made ahead (api.prepare_plan); batch rows lead, so that the parts of several shards concatenate. packed: rows may
    hold several documents; without it causality and window alone say what is seen, which every implementation knows.
    """

    k_lo_BT: Array
    q_hi_BS: Array
    work: tuple = ()
    causal: bool = True
    window: int | None = None
    packed: bool = True

    def rows(self, q_offset: int | Array, num_queries: int) -> "PackPlan":
        """The plan of the queries [q_offset, q_offset + num_queries) against all keys; offsets may be [B]."""
        if isinstance(q_offset, int) and q_offset == 0 and num_queries == self.k_lo_BT.shape[1]:
            return self
        if jnp.ndim(q_offset) == 1:
            num_keys = self.k_lo_BT.shape[1]
            k_lo_BS = jnp.broadcast_to(self.k_lo_BT, (q_offset.shape[0], num_keys))
            # Queries behind the last key pad a row; a slice would move the real ones before them.
            place_BT = q_offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None]
            k_lo_BT = jnp.take_along_axis(k_lo_BS, jnp.minimum(place_BT, num_keys - 1), axis=1)
        else:
            k_lo_BT = lax.dynamic_slice_in_dim(self.k_lo_BT, q_offset, num_queries, axis=1)
        return dataclasses.replace(self, k_lo_BT=k_lo_BT, work=())

    def last_keys_BT(self, q_offset: int | Array) -> Array:
        """Last key that each of the (local) queries may see."""
        if not self.causal:
            return lax.dynamic_slice_in_dim(self.q_hi_BS, q_offset, self.k_lo_BT.shape[1], axis=1)
        return query_positions_BT(q_offset, *self.k_lo_BT.shape)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lo", "full_lo", "full_hi", "hi"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Half-open block ranges, int32 [B, blocks]: [lo, hi) holds an allowed pair, [full_lo, full_hi) nothing else.

    0 <= lo <= full_lo <= full_hi <= hi, and lo == hi is an empty range.
    """

    lo: Array
    full_lo: Array
    full_hi: Array
    hi: Array


def make_plan(
    segment_ids_BS: Int[Array, "B S"] | np.ndarray | None,
    spec: AttentionSpec,
    *,
    seq_len: int,
    batch: int = 1,
    pad_id: int | None = 0,
) -> PackPlan:
    """The plan of a batch. Runs of equal ids are documents; positions with `pad_id` see only themselves.

    Without segment ids every row is one document of `seq_len` and the plan has `batch` rows.
    Raises ConfigError on an empty batch or row, on what is no array of integers [B, seq_len], and on ids that decrease
    along a row, where they are known before tracing.
    """
    if segment_ids_BS is not None and not isinstance(segment_ids_BS, np.ndarray | jax.Array):
        raise ConfigError(
            f"segment ids must be an array, got {type(segment_ids_BS).__name__}; convert them by np.asarray"
        )
    if segment_ids_BS is not None and segment_ids_BS.ndim == 2:
        batch = segment_ids_BS.shape[0]
    if seq_len < 1 or batch < 1:
        raise ConfigError(
            f"a plan must have at least one row and one key, got batch {batch} and seq_len {seq_len}; "
            "leave empty batches out"
        )
    if segment_ids_BS is None:
        pos_BS = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32)[None], (batch, seq_len))
        start_BS, end_BS = jnp.zeros_like(pos_BS), jnp.full_like(pos_BS, seq_len - 1)
        pad_BS = jnp.zeros(pos_BS.shape, bool)
    else:
        if segment_ids_BS.ndim != 2 or segment_ids_BS.shape[1] != seq_len:
            raise ConfigError(
                f"segment ids must have shape [B, {seq_len}], got {segment_ids_BS.shape}; give one id for each key"
            )
        if not jnp.issubdtype(segment_ids_BS.dtype, jnp.integer):
            raise ConfigError(f"segment ids must be integers, got {segment_ids_BS.dtype}; cast them to int32")
        if not isinstance(segment_ids_BS, jax.core.Tracer):
            check_segments(np.asarray(segment_ids_BS), pad_id=pad_id)
        segment_ids_BS = jnp.asarray(segment_ids_BS)
        pos_BS = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32)[None], segment_ids_BS.shape)
        changed = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
        edge = jnp.ones_like(changed[:, :1], shape=(changed.shape[0], 1))
        first_BS = jnp.concatenate([edge, changed], axis=1)
        last_BS = jnp.concatenate([changed, edge], axis=1)
        start_BS = lax.cummax(jnp.where(first_BS, pos_BS, 0), axis=1)
        end_BS = lax.cummin(jnp.where(last_BS, pos_BS, seq_len - 1), axis=1, reverse=True)
        pad_BS = jnp.zeros(pos_BS.shape, bool) if pad_id is None else segment_ids_BS == pad_id
    if spec.window is not None:
        # A window longer than the row is no window; the minimum also keeps int32 from overflowing.
        window = min(spec.window, seq_len)
        start_BS = jnp.maximum(start_BS, pos_BS - (window - 1))
        end_BS = jnp.minimum(end_BS, pos_BS + (window - 1))
    return PackPlan(
        jnp.where(pad_BS, pos_BS, start_BS),
        jnp.where(pad_BS, pos_BS, end_BS),
        causal=spec.causal,
        window=spec.window,
        packed=segment_ids_BS is not None,
    )


def query_positions_BT(q_offset: int | Array, batch: int, num_queries: int) -> Int[Array, "B T"]:
    """Rows of the queries among the keys, for one offset or one a batch row."""
    offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))
    return offset_B[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None]


def check_segments(segment_ids_BS: np.ndarray, *, pad_id: int | None = 0) -> None:
    """Refuses rows whose ids decrease or whose padding splits a document; a host check, O(B·S).

    Raises ConfigError that names the first offending place.
    """
    changed = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    real = np.ones_like(segment_ids_BS, bool) if pad_id is None else segment_ids_BS != pad_id
    lowest = np.iinfo(np.int64).min
    seen = np.maximum.accumulate(np.where(real, segment_ids_BS.astype(np.int64), lowest), axis=1)
    # At the start of a run the id must be above everything before it: equal means a document that comes back.
    bad = changed & real[:, 1:] & (segment_ids_BS[:, 1:] <= seen[:, :-1])
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ConfigError(
            f"segment ids must be sorted along a row, got {int(segment_ids_BS[row, column + 1])} at [{row}, "
            f"{column + 1}] after {int(seen[row, column])}; number the documents of a row 1, 2, ... in order"
        )


def block_bounds(
    plan: PackPlan, *, block_q: int, block_k: int, side: str, q_offset: int | Array = 0
) -> Bounds:
    """Block ranges for each query block (side "q": over key blocks) or key block (side "k": over query blocks).

    `plan` holds the local queries (`PackPlan.rows`); they sit at q_offset.. of the key sequence. T and S must be
    multiples of the blocks. Causal plans only. Exact: no block is visited in vain.
    """
    if not plan.causal:
        raise ConfigError("block bounds exist for causal plans only, got causal=False; use impl='xla'")
    if side == "q":
        q_pos_BT = query_positions_BT(q_offset, *plan.k_lo_BT.shape)
        return bounds_of_queries(
            q_pos_BT, plan.k_lo_BT, block_q=block_q, block_k=block_k, num_keys=plan.q_hi_BS.shape[1]
        )
    if side != "k":
        raise ConfigError(f"side must be 'q' or 'k', got {side!r}; see block_bounds")
    batch, num_keys = plan.q_hi_BS.shape
    num_q, num_k = plan.k_lo_BT.shape[1] // block_q, num_keys // block_k
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))[:, None]
    first = jnp.arange(num_k, dtype=jnp.int32)[None] * block_k - offset
    q_hi = plan.q_hi_BS.reshape(batch, num_k, block_k) - offset[:, :, None]
    return _ordered(
        lo=jnp.maximum(first, 0) // block_q,
        full_lo=-(-(first + (block_k - 1)) // block_q),
        full_hi=(q_hi.min(axis=2) + 1) // block_q,
        hi=jnp.minimum(q_hi.max(axis=2) // block_q + 1, num_q),
        limit=num_q,
    )


def bounds_of_queries(
    q_pos_BT: Int[Array, "B T"], k_lo_BT: Int[Array, "B T"], *, block_q: int, block_k: int, num_keys: int
) -> Bounds:
    """Ranges of key blocks for blocks of queries at any positions (decoding folds heads into T)."""
    batch, num_queries = k_lo_BT.shape
    q_pos, k_lo = (x.reshape(batch, num_queries // block_q, block_q) for x in (q_pos_BT, k_lo_BT))
    return _ordered(
        lo=k_lo.min(axis=2) // block_k,
        full_lo=-(-k_lo.max(axis=2) // block_k),
        full_hi=(q_pos.min(axis=2) + 1) // block_k,
        hi=q_pos.max(axis=2) // block_k + 1,
        limit=num_keys // block_k,
    )


def _ordered(*, lo: Array, full_lo: Array, full_hi: Array, hi: Array, limit: int) -> Bounds:
    lo = jnp.clip(lo, 0, limit)
    hi = jnp.clip(hi, lo, limit)
    full_lo = jnp.clip(full_lo, lo, hi)
    return Bounds(lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi)


def allowed_BTS(plan: PackPlan, q_offset: int | Array, num_keys: int) -> Bool[Array, "B T S"]:
    """The mask itself, for the dense path and the tests; `plan` holds the local queries; O(B·T·S) booleans."""
    return key_mask_BTS(plan.k_lo_BT, plan.last_keys_BT(q_offset), num_keys)


def key_mask_BTS(
    first_BT: Int[Array, "B T"], last_BT: Int[Array, "B T"], num_keys: int
) -> Bool[Array, "B T S"]:
    """True from the first to the last key of each query."""
    k_pos = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (k_pos >= first_BT[:, :, None]) & (k_pos <= last_BT[:, :, None])


def visited_blocks(plan: PackPlan, *, block_q: int, block_k: int) -> Int[Array, " B"]:
    """Blocks that a forward visits in each row of the plan, for reports: compare with a plan without segments."""
    bounds = block_bounds(plan, block_q=block_q, block_k=block_k, side="q")
    return (bounds.hi - bounds.lo).sum(axis=1)
