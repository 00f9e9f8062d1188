"""Mosaic TPU kernels: forward, dq, and dk/dv, each over a work list of the blocks that the packing leaves.

Tiles are transposed, [keys, queries]: what belongs to a query (its range, maximum, sum, log-sum-exp, delta) is a row
vector that stays a row vector in memory and in registers, and reductions over keys run along sublanes. The G query
heads of a group are folded into X = G·block_q columns, so that keys and values are loaded once a group.

B rows, T query time, S key time, N query heads, K key-value heads, G = N/K, H head width, X = G·block_q columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pretrain.kernels.attention import worklist
from pretrain.kernels.attention.configs import TpuBlocks
from pretrain.kernels.attention.math import LN2, LOG2E, MASKED, logits_base2, score_gradient, visible
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, bounds_of_queries, query_positions_BT
from pretrain.kernels.attention.worklist import WorkList

LANES = 128
# In the order of `TpuBlocks.tiles`.
KERNELS = ("forward", "dq", "dk/dv")


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels need to know at trace time."""

    scale: float
    softcap: float | None
    slice_k: int
    interpret: object
    count: bool = False
    num_keys: int | None = None  # where the last block reaches beyond the keys


# Score tiles [slice_k, X] in float32 that are live at once beside what is buffered, by kernel and bytes of an element.
# Rounded up from what libtpu 0.0.42.1 reports (used_scoped_memory) over widths 64 to 256, 128 to 8192 columns, 128 to
# 2048 keys, with and without soft cap. Products of float32 in full precision are split into bfloat16 pieces, which for
# dk/dv are pieces of q and do as well.
TILES_IN_FLIGHT = {
    ("forward", 2): 1.5, ("forward", 4): 2.75, ("dq", 2): 2.25, ("dq", 4): 3.0, ("dk/dv", 2): 3.5, ("dk/dv", 4): 6.5,
}  # fmt: skip
PIECES_OF_QUERIES = 5.5


def kernel_vmem_bytes(
    kernel: str, *, group: int, block_q: int, block_k: int, slice_k: int, width: int, itemsize: int
) -> int:
    """An upper bound on the vector memory of one kernel for `group` heads of `width` on a key-value head."""
    lanes, columns = max(width, LANES), group * block_q
    queries, keys = columns * lanes * itemsize, block_k * lanes * itemsize
    # Rows of columns and of ranges: eight sublanes are the least.
    vectors, ranges = -(-group // 8) * 8 * block_q * 4, 2 * 8 * block_q * 4
    match kernel:
        case "forward":  # q, k, v, o, lse; maximum, sum and output are carried
            buffered = 2 * queries + 2 * keys + vectors + ranges
            carried = (width + 16) * columns * 4
        case "dq":  # q, do, dq, k, v, lse, delta
            buffered = 3 * queries + 2 * keys + 2 * vectors + ranges
            carried = width * columns * 4
        case "dk/dv":  # q, do, k, v, dk, dv, lse, delta
            buffered = 2 * queries + 4 * keys + 2 * vectors + ranges
            carried = 2 * block_k * lanes * 4
        case _:
            raise AssertionError(kernel)
    tile = min(slice_k, block_k) * columns * 4
    pieces = PIECES_OF_QUERIES * columns * width * 4 if (kernel, itemsize) == ("dk/dv", 4) else 0
    # What is buffered is there twice: one block is copied while the other is used.
    return int(2 * buffered + carried + TILES_IN_FLIGHT[kernel, itemsize] * tile + pieces)


def vmem_bytes(blocks: TpuBlocks, group: int, width: int, itemsize: int) -> dict[str, int]:
    """`kernel_vmem_bytes` of each kernel with its tiles."""
    return {
        kernel: kernel_vmem_bytes(
            kernel,
            group=group,
            block_q=block_q,
            block_k=block_k,
            slice_k=blocks.slice_k,
            width=width,
            itemsize=itemsize,
        )  # fmt: skip
        for kernel, (_, block_q, block_k) in zip(KERNELS, blocks.tiles, strict=True)
    }


def fitting(blocks: TpuBlocks, group: int, width: int, itemsize: int, limit_bytes: int) -> TpuBlocks:
    """The same tiles, halved down to 128 a side for as long as a kernel takes more than `limit_bytes`.

    The longer side of a tile goes first, the slices of keys last. What does not fit at 128 is returned as it is.
    """
    fields = (("block_q", "block_k"), ("block_q_dq", "block_k_dq"), ("block_q_dkv", "block_k_dkv"))
    while True:
        taken = vmem_bytes(blocks, group, width, itemsize)
        over = [names for kernel, names in zip(KERNELS, fields, strict=True) if taken[kernel] > limit_bytes]
        shorter = {}
        for name_q, name_k in over:
            block_q, block_k = getattr(blocks, name_q), getattr(blocks, name_k)
            name, side = (
                (name_q, block_q) if group * block_q > block_k and block_q > LANES else (name_k, block_k)
            )
            if side > LANES:
                shorter[name] = side // 2
        if over and not shorter and blocks.slice_k > LANES:
            shorter = {"slice_k": blocks.slice_k // 2}
        if not shorter:
            return blocks
        blocks = dataclasses.replace(blocks, **shorter)


def tpu_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    plan: PackPlan,
    work: tuple[WorkList, WorkList, WorkList],
    sinks_N: Float[Array, " N"] | None,
    spec: AttentionSpec,
    blocks: TpuBlocks,
    *,
    q_offset: int | Array,
    interpret: object = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp. T and S are multiples of the blocks; `plan` holds the local queries.

    work: the lists of `blocks.tiles`. interpret: as in pl.pallas_call.
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    scale = width**-0.5 if spec.scale is None else spec.scale
    static = _Static(scale, spec.softcap, blocks.slice_k, interpret)
    q = jnp.swapaxes(q_BTNH, 1, 2).reshape(batch, kv_heads, heads // kv_heads, time, width)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    rows = (query_positions_BT(q_offset, batch, time)[:, None], plan.k_lo_BT[:, None])
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, -1)
    o, lse2 = _attention(static, q, k, v, sinks, rows, work)
    o_BTNH = jnp.swapaxes(o.reshape(batch, heads, time, width), 1, 2)
    return o_BTNH, lse2.reshape(batch, heads, time) * LN2


def decode_columns(group: int, num_queries: int) -> int:
    """Columns of the one tile that holds all queries of a group: full lanes."""
    return -(-group * num_queries // LANES) * LANES


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(remedy: str, inputs):
    """The inputs themselves, refused as soon as anybody differentiates with respect to one of them."""
    return inputs


@without_gradient.defjvp
def _(remedy, primals, tangents):
    raise NotImplementedError(f"decode attention has no gradient, and one was asked for; {remedy}")


def tpu_decode(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    plan: PackPlan,
    sinks_N: Float[Array, " N"] | None,
    spec: AttentionSpec,
    *,
    block_k: int,
    slice_k: int,
    q_offset: int | Array,
    interpret: object = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The forward kernel for a few queries against a long cache: the queries of all heads of a group share one tile.

    The last block may reach beyond S. Keys behind a row's own offset are never fetched.
    Raises NotImplementedError when it is differentiated.
    """
    q_BTNH, k_BSKH, v_BSKH, sinks_N = without_gradient(
        "give one offset for the batch, or impl='xla'", (q_BTNH, k_BSKH, v_BSKH, sinks_N)
    )
    batch, time, heads, width = q_BTNH.shape
    num_keys, kv_heads = k_BSKH.shape[1:3]
    group = heads // kv_heads
    columns, num_blocks = decode_columns(group, time), -(-num_keys // block_k)
    # Columns of padding repeat the last one, so that they widen no range.
    column = jnp.minimum(jnp.arange(columns), group * time - 1)

    def fold(x_BT):
        return jnp.tile(x_BT, (1, group))[:, column]

    # Queries of padding may stand behind the last key: they see what it sees, and nothing that is not there.
    q_pos = fold(jnp.minimum(query_positions_BT(q_offset, batch, time), num_keys - 1))
    k_lo = fold(plan.k_lo_BT)
    bounds = bounds_of_queries(q_pos, k_lo, block_q=columns, block_k=block_k, num_keys=num_blocks * block_k)
    work = worklist.list_of(bounds, batch * num_blocks, side="q", block_q=columns, block_k=block_k)
    q = q_BTNH.reshape(batch, time, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, 1, group * time, width)[:, :, :, column]
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    sinks = None
    if sinks_N is not None:
        sinks = jnp.repeat(sinks_N.astype(jnp.float32).reshape(kv_heads, group), time, axis=1)[:, column]
    scale = width**-0.5 if spec.scale is None else spec.scale
    beyond = None if num_keys % block_k == 0 else num_keys
    static = _Static(scale, spec.softcap, slice_k, interpret, num_keys=beyond)
    o, lse2 = _forward(static, q, k, v, sinks, (q_pos[:, None], k_lo[:, None]), (work,))[:2]
    o = o[:, :, 0, : group * time].reshape(batch, kv_heads, group, time, width)
    o_BTNH = o.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)
    return o_BTNH, lse2[:, :, 0, : group * time].reshape(batch, heads, time) * LN2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, sinks, rows, work):
    return _forward(static, q, k, v, sinks, rows, work)[:2]


def _attention_fwd(static, q, k, v, sinks, rows, work):
    o, lse2 = _forward(static, q, k, v, sinks, rows, work)[:2]
    # Named so that a remat policy can keep them and the backward pass needs no second forward.
    o, lse2 = checkpoint_name(o, "attn_out"), checkpoint_name(lse2, "attn_lse")
    return (o, lse2), (q, k, v, sinks, rows, work, o, lse2)


def _attention_bwd(static, residuals, cotangents):
    q, k, v, sinks, rows, work, o, lse2 = residuals
    do, dlse2 = cotangents
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=4) - dlse2 * LOG2E
    dq, _ = _backward_q(static, q, k, v, do, lse2, delta, rows, work[1])
    dk, dv, _ = _backward_kv(static, q, k, v, do, lse2, delta, rows, work[2])
    dsinks = None
    if sinks is not None:
        dsinks = -(jnp.exp2(sinks[None, :, :, None] * LOG2E - lse2) * delta).sum(axis=(0, 3))
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# --- the parts that the three kernels share


def _unpack(word, bits: int):
    return lax.shift_right_logical(word, jnp.int32(bits)), word & ((1 << bits) - 1)


def _step(outer_ref, inner_ref):
    """(outer block, inner block, flags) of the current step."""
    # Here and not inside a pl.when: the interpreter knows no program_id there.
    step = pl.program_id(1)
    _, outer = _unpack(outer_ref[step], worklist.OUTER_BITS)
    inner, flags = _unpack(inner_ref[step], worklist.FLAG_BITS)
    return outer, inner, flags


def _when(flags, bit: int):
    return pl.when((flags & bit) != 0)


def _columns(ref, group: int):
    """A [G, block_q] or [1, block_q] block as one row of X columns."""
    rows = [ref[g : g + 1, :] for g in range(ref.shape[0])]
    rows = rows * (group // len(rows))
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _dot(x, y, contract: tuple[int, int]):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _logits(static: _Static, q_XH, k_CH, first_key, q_pos, k_lo, masked: bool):
    """Base-2 logits [C keys, X columns], and the tanh of the soft cap."""
    logits, tanh = logits_base2(_dot(k_CH, q_XH, (1, 1)), static.scale, static.softcap)
    if masked:
        k_pos = lax.broadcasted_iota(jnp.int32, (k_CH.shape[0], 1), 0) + first_key
        logits = jnp.where(visible(q_pos, k_lo, k_pos), logits, MASKED)
    return logits, tanh


def _each_slice(static: _Static, block_k: int, flags, body) -> None:
    """Calls body(slice start, masked) for the slices of a block: one copy of the code with a mask, one without."""
    size = min(static.slice_k, block_k)

    def run(masked: bool) -> None:
        def one(c, _):
            body(pl.multiple_of(c * size, size), size, masked)
            return _

        if block_k == size:
            body(0, size, masked)
        else:
            lax.fori_loop(0, block_k // size, one, None)

    @pl.when((flags & (worklist.COMPUTE | worklist.MASKED)) == (worklist.COMPUTE | worklist.MASKED))
    def _():
        run(True)

    @pl.when((flags & (worklist.COMPUTE | worklist.MASKED)) == worklist.COMPUTE)
    def _():
        run(False)


def _count(count_ref, flags) -> None:
    """The kernel's own record of the blocks it entered, one number a key-value head."""
    if count_ref is None:
        return
    head = pl.program_id(0)
    before = jnp.where(pl.program_id(1) == 0, 0, count_ref[head])
    count_ref[head] = before + ((flags & worklist.COMPUTE) != 0).astype(jnp.int32)


class _Specs:
    """Block specs by what they index: the outer block of the list on one side, the inner block on the other."""

    def __init__(self, work: WorkList, group: int, width: int):
        def side(of_queries: bool):
            from_outer = of_queries == (work.side == "q")

            def block(head, step, outer_ref, inner_ref):
                row, outer = _unpack(outer_ref[step], worklist.OUTER_BITS)
                inner, _ = _unpack(inner_ref[step], worklist.FLAG_BITS)
                return row, outer if from_outer else inner

            return block

        q_block, k_block = side(True), side(False)

        def queries(head, step, *refs):
            row, i = q_block(head, step, *refs)
            return row, head, 0, i, 0

        def vectors(head, step, *refs):
            row, i = q_block(head, step, *refs)
            return row, head, 0, i

        def ranges(head, step, *refs):
            row, i = q_block(head, step, *refs)
            return row, 0, i

        def keys(head, step, *refs):
            row, j = k_block(head, step, *refs)
            return row, head, j, 0

        self.queries = pl.BlockSpec((None, None, group, work.block_q, width), queries)
        self.vectors = pl.BlockSpec((None, None, group, work.block_q), vectors)
        self.ranges = pl.BlockSpec((None, 1, work.block_q), ranges)
        self.keys = pl.BlockSpec((None, None, work.block_k, width), keys)
        self.sinks = pl.BlockSpec((None, group, work.block_q), lambda head, step, *refs: (head, 0, 0))


def _like(x, shape=None, dtype=None):
    """An output shaped like x, varying over the same mesh axes as x inside shard_map."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=varying)


def _call(
    static: _Static, kernel, work: WorkList, kv_heads: int, in_specs, out_specs, out_shape, scratch, name
):
    out_specs, out_shape = list(out_specs), list(out_shape)
    if static.count:
        out_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        out_shape.append(jax.ShapeDtypeStruct((kv_heads,), jnp.int32))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kv_heads, work.num_steps[0]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        # Heads are independent; the counters of different heads share a word of scalar memory, so not when counting.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if static.count else "parallel", "arbitrary")
        ),
        interpret=static.interpret,
        name=name,
    )


# --- forward


def _forward_kernel(static: _Static, group: int, has_sinks: bool, *refs):
    outer_ref, inner_ref, q_pos_ref, k_lo_ref, q_ref, k_ref, v_ref, *refs = refs
    sinks_ref, refs = (refs[0], refs[1:]) if has_sinks else (None, refs)
    o_ref, lse_ref, *refs = refs
    count_ref, refs = (refs[0], refs[1:]) if static.count else (None, refs)
    m_ref, l_ref, acc_ref = refs
    _, block, flags = _step(outer_ref, inner_ref)
    block_k, block_q = k_ref.shape[0], q_pos_ref.shape[1]
    _count(count_ref, flags)

    @_when(flags, worklist.FIRST)
    def _():
        if sinks_ref is None:
            m_ref[...] = jnp.full(m_ref.shape, MASKED, jnp.float32)
            l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        else:
            m_ref[...] = _columns(sinks_ref, group) * LOG2E
            l_ref[...] = jnp.ones(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def body(start, size, masked):
        q_XH = q_ref[...].reshape(group * block_q, q_ref.shape[2])
        q_pos, k_lo = _columns(q_pos_ref, group), _columns(k_lo_ref, group)
        keys = pl.ds(start, size)
        t, _ = _logits(static, q_XH, k_ref[keys, :], block * block_k + start, q_pos, k_lo, masked)
        m_old = m_ref[...]
        m_new = jnp.maximum(m_old, t.max(axis=0, keepdims=True))
        p = jnp.exp2(t - m_new)
        alpha = jnp.exp2(m_old - m_new)
        m_ref[...] = m_new
        l_ref[...] = l_ref[...] * alpha + p.sum(axis=0, keepdims=True)
        v_CH = v_ref[keys, :]
        if masked and static.num_keys is not None:
            # Whatever lies there may be NaN, which a probability of zero does not make harmless.
            k_pos = lax.broadcasted_iota(jnp.int32, v_CH.shape, 0) + (block * block_k + start)
            v_CH = jnp.where(k_pos < static.num_keys, v_CH, 0)
        acc_ref[...] = acc_ref[...] * alpha + _dot(v_CH, p.astype(v_CH.dtype), (0, 0))

    _each_slice(static, block_k, flags, body)

    @_when(flags, worklist.LAST)
    def _():
        total = l_ref[...]
        o_HX = acc_ref[...] * (1.0 / total)
        o_ref[...] = o_HX.T.reshape(o_ref.shape).astype(o_ref.dtype)
        lse = m_ref[...] + jnp.log2(total)
        for g in range(group):
            lse_ref[g : g + 1, :] = lse[:, g * block_q : (g + 1) * block_q]


def _forward(static: _Static, q, k, v, sinks, rows, work):
    """o [B, K, G, T, H], base-2 log-sum-exp [B, K, G, T], and the block count of each key-value head if asked."""
    batch, kv_heads, group, time, width = q.shape
    work = work[0]
    specs = _Specs(work, group, width)
    columns = group * work.block_q
    in_specs = [specs.ranges, specs.ranges, specs.queries, specs.keys, specs.keys]
    operands = [*rows, q, k, v]
    if sinks is not None:
        # One column a query, like every other row vector: scalar memory would need a loop over heads.
        in_specs.append(specs.sinks)
        operands.append(jnp.broadcast_to(sinks.reshape(kv_heads, group, -1), (kv_heads, group, work.block_q)))
    return _call(
        static,
        functools.partial(_forward_kernel, static, group, sinks is not None),
        work,
        kv_heads,
        in_specs,
        [specs.queries, specs.vectors],
        [
            _like(q),
            _like(q, (batch, kv_heads, group, time), jnp.float32),
        ],
        [
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((width, columns), jnp.float32),
        ],
        "attention_forward",
    )(work.outer, work.inner, *operands)


# --- backward


def _tile_gradients(static, q_XH, do_XH, k_CH, v_CH, first_key, q_pos, k_lo, lse, delta, masked):
    """Probabilities and score gradients, both [C keys, X columns]."""
    t, tanh = _logits(static, q_XH, k_CH, first_key, q_pos, k_lo, masked)
    p = jnp.exp2(t - lse)
    return p, score_gradient(p, _dot(v_CH, do_XH, (1, 1)), delta, tanh)


def _backward_q_kernel(static: _Static, group: int, *refs):
    (
        outer_ref,
        inner_ref,
        q_pos_ref,
        k_lo_ref,
        q_ref,
        k_ref,
        v_ref,
        do_ref,
        lse_ref,
        delta_ref,
        dq_ref,
        *refs,
    ) = refs
    count_ref, refs = (refs[0], refs[1:]) if static.count else (None, refs)
    (acc_ref,) = refs
    _, block, flags = _step(outer_ref, inner_ref)
    block_k, columns = k_ref.shape[0], acc_ref.shape[1]
    _count(count_ref, flags)

    @_when(flags, worklist.FIRST)
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def body(start, size, masked):
        q_XH, do_XH = (ref[...].reshape(columns, -1) for ref in (q_ref, do_ref))
        q_pos, k_lo, lse, delta = (_columns(ref, group) for ref in (q_pos_ref, k_lo_ref, lse_ref, delta_ref))
        k_CH, v_CH = k_ref[pl.ds(start, size), :], v_ref[pl.ds(start, size), :]
        first_key = block * block_k + start
        _, ds = _tile_gradients(static, q_XH, do_XH, k_CH, v_CH, first_key, q_pos, k_lo, lse, delta, masked)
        acc_ref[...] += _dot(k_CH, ds.astype(k_CH.dtype), (0, 0))

    _each_slice(static, block_k, flags, body)

    @_when(flags, worklist.LAST)
    def _():
        dq_ref[...] = (acc_ref[...] * static.scale).T.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _backward_q(static: _Static, q, k, v, do, lse2, delta, rows, work: WorkList):
    _, kv_heads, group, _, width = q.shape
    specs = _Specs(work, group, width)
    out = _call(
        static,
        functools.partial(_backward_q_kernel, static, group),
        work,
        kv_heads,
        [
            *[specs.ranges, specs.ranges, specs.queries, specs.keys, specs.keys, specs.queries],
            *[specs.vectors, specs.vectors],
        ],
        [specs.queries],
        [_like(q)],
        [pltpu.VMEM((width, group * work.block_q), jnp.float32)],
        "attention_backward_q",
    )(work.outer, work.inner, *rows, q, k, v, do, lse2, delta)
    return out[0], out[1] if static.count else None


def _backward_kv_kernel(static: _Static, group: int, *refs):
    outer_ref, inner_ref, q_pos_ref, k_lo_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs = refs
    dk_ref, dv_ref, *refs = refs
    count_ref, refs = (refs[0], refs[1:]) if static.count else (None, refs)
    dk_acc_ref, dv_acc_ref = refs
    block, _, flags = _step(outer_ref, inner_ref)
    block_k, columns = k_ref.shape[0], group * q_pos_ref.shape[1]
    _count(count_ref, flags)

    @_when(flags, worklist.FIRST)
    def _():
        dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
        dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

    def body(start, size, masked):
        q_XH, do_XH = (ref[...].reshape(columns, -1) for ref in (q_ref, do_ref))
        q_pos, k_lo, lse, delta = (_columns(ref, group) for ref in (q_pos_ref, k_lo_ref, lse_ref, delta_ref))
        keys = pl.ds(start, size)
        first_key = block * block_k + start
        p, ds = _tile_gradients(
            static, q_XH, do_XH, k_ref[keys, :], v_ref[keys, :], first_key, q_pos, k_lo, lse, delta, masked
        )
        dv_acc_ref[keys, :] += _dot(p.astype(do_XH.dtype), do_XH, (1, 0))
        dk_acc_ref[keys, :] += _dot(ds.astype(q_XH.dtype), q_XH, (1, 0))

    _each_slice(static, block_k, flags, body)

    @_when(flags, worklist.LAST)
    def _():
        dk_ref[...] = (dk_acc_ref[...] * static.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _backward_kv(static: _Static, q, k, v, do, lse2, delta, rows, work: WorkList):
    _, kv_heads, group, _, width = q.shape
    specs = _Specs(work, group, width)
    accumulator = pltpu.VMEM((work.block_k, width), jnp.float32)
    out = _call(
        static,
        functools.partial(_backward_kv_kernel, static, group),
        work,
        kv_heads,
        [
            *[specs.ranges, specs.ranges, specs.queries, specs.keys, specs.keys, specs.queries],
            *[specs.vectors, specs.vectors],
        ],
        [specs.keys, specs.keys],
        [_like(k), _like(v)],
        [accumulator, accumulator],
        "attention_backward_kv",
    )(work.outer, work.inner, *rows, q, k, v, do, lse2, delta)
    return out[0], out[1], out[2] if static.count else None


def visited_blocks(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    plan: PackPlan,
    work,
    spec: AttentionSpec,
    blocks: TpuBlocks,
    *,
    interpret: object = False,
) -> dict[str, Array]:
    """Blocks that the forward, dq and dk/dv kernels entered, counted by the kernels, for each key-value head."""
    batch, time, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    scale = width**-0.5 if spec.scale is None else spec.scale
    static = _Static(scale, spec.softcap, blocks.slice_k, interpret, count=True)
    q = jnp.swapaxes(q_BTNH, 1, 2).reshape(batch, kv_heads, heads // kv_heads, time, width)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    rows = (query_positions_BT(0, batch, time)[:, None], plan.k_lo_BT[:, None])
    o, lse2, forward = _forward(static, q, k, v, None, rows, work)
    _, backward_q = _backward_q(static, q, k, v, o, lse2, lse2, rows, work[1])
    _, _, backward_kv = _backward_kv(static, q, k, v, o, lse2, lse2, rows, work[2])
    return {"forward": forward, "backward_q": backward_q, "backward_kv": backward_kv}
