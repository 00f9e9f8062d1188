"""Mosaic GPU kernels for Hopper: forward, dq, and dk/dv, each over the block ranges that the packing leaves.

A thread block has three warpgroups: one streams tiles into shared memory (TMA), two compute on them. The two own
different rows with ranges of their own; the stream covers both ranges, and a warpgroup passes over the tiles that
only the other needs. The two take turns: while one multiplies, the other exponentiates (FlashAttention-3,
arXiv 2407.08608, whose structure the forward has; the ranges are ours). Interior tiles run no mask code.

Products start as soon as their factors exist and are waited for as late as may be: the scores and their gradients are
in flight together, so that exponentials run under a product, and so are the sums of dk and dv. A product that would
go on into the next tile gains nothing: ptxas waits for it there.

The tests execute the bodies, barriers and all, in an emulator; what runs on the chip is measured in docs/kernels.md.

B rows, T query time, S key time, N query heads, K key-value heads, G = N/K, H head width, Q and C the queries and keys
of a tile.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pretrain import compat
from pretrain.kernels.attention.configs import HopperBlocks
from pretrain.kernels.attention.math import LN2, LOG2E, MASKED, exponents, score_gradient, visible
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, block_bounds

# 65536 registers a multiprocessor: 2·128·232 + 128·40 = 64512.
COMPUTE_REGISTERS = 232
STREAM_REGISTERS = 40
STREAM = 2  # the warpgroup that streams
# Where the running maximum starts: above what a masked score becomes, so that a row that is wholly masked in its first
# tiles gathers zeros, and below every real logit.
FLOOR = -1e30
# From this width on dk and dv of one tile do not fit the registers of one warpgroup: each makes one of them.
SPLIT_WIDTH = 256
# How Mosaic GPU lays out shared memory: arrays begin at multiples of this, and a kernel that has a maximum or a sum over
# a tile is given room for it (`CompilerParams.reduction_scratch_bytes`).
SHARED_ALIGNMENT = 1024
REDUCTION_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels need to know at trace time."""

    scale: float
    softcap: float | None
    blocks: HopperBlocks
    warpgroup_semantics: bool


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["forward", "dq", "dkv"], meta_fields=["blocks"]
)
@dataclasses.dataclass(frozen=True)
class TileRanges:
    """The block ranges of the three kernels, int32 [B, 4, outer blocks] each: lo, full_lo, full_hi, hi."""

    forward: Array
    dq: Array
    dkv: Array
    blocks: HopperBlocks


def tile_ranges(plan: PackPlan, blocks: HopperBlocks, q_offset: int | Array = 0) -> TileRanges:
    """What the kernels want of a plan; layers can share it. `plan` holds the local queries."""

    def of(side: str, block_q: int, block_k: int) -> Array:
        b = block_bounds(plan, side=side, block_q=block_q, block_k=block_k, q_offset=q_offset)
        return jnp.stack([b.lo, b.full_lo, b.full_hi, b.hi], axis=1)

    return TileRanges(
        of("q", blocks.block_q, blocks.block_k),
        of("q", blocks.block_q_dq, blocks.block_k_dq),
        of("k", blocks.block_q_dkv, blocks.block_k_dkv),
        blocks,
    )


def hopper_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    k_lo_BT: Array,
    ranges: TileRanges,
    sinks_N: Float[Array, " N"] | None,
    spec: AttentionSpec,
    *,
    q_offset: int | Array,
    warpgroup_semantics: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp. T and S are multiples of two blocks; `k_lo_BT` is of the local queries."""
    batch, _, _, width = q_BTNH.shape
    scale = width**-0.5 if spec.scale is None else spec.scale
    static = _Static(scale, spec.softcap, ranges.blocks, warpgroup_semantics)
    offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32)
    bounds = (ranges.forward, ranges.dq, ranges.dkv)
    o_BTNH, lse2_BNT = _attention(static, q_BTNH, k_BSKH, v_BSKH, sinks, (k_lo_BT, offset_B), bounds)
    return o_BTNH, lse2_BNT * LN2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, sinks, rows, bounds):
    return _forward(static, q, k, v, sinks, rows, bounds[0])


def _attention_fwd(static, q, k, v, sinks, rows, bounds):
    o, lse2 = _forward(static, q, k, v, sinks, rows, bounds[0])
    # Named so that a remat policy can keep them and the backward pass needs no second forward.
    # On GPUs XLA's dynamic slice fusion runs the kernel twice where a scan keeps these, once for the stack of residuals
    # and once for what reads them (seen on an H200, an optimization barrier does not prevent it):
    # --xla_gpu_enable_dynamic_slice_fusion=false does.
    o, lse2 = checkpoint_name(o, "attn_out"), checkpoint_name(lse2, "attn_lse")
    return (o, lse2), (q, k, v, sinks, rows, bounds, o, lse2)


def _attention_bwd(static, residuals, cotangents):
    q, k, v, sinks, rows, bounds, o, lse2 = residuals
    do, dlse2 = cotangents
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=3).swapaxes(1, 2) - dlse2 * LOG2E
    dq = _backward_q(static, q, k, v, do, lse2, delta, rows, bounds[1])
    dk, dv = _backward_kv(static, q, k, v, do, lse2, delta, rows, bounds[2])
    dsinks = None
    if sinks is not None:
        dsinks = -(jnp.exp2(sinks[None, :, None] * LOG2E - lse2) * delta).sum(axis=(0, 2))
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# --- the parts that the three kernels share


def _tile_memory(streamed: int):
    """Makes shared memory in the layout that both TMA and the matrix unit want.

    `streamed` is the block that products contract over: 32 rows contract with a narrower swizzle only.
    """
    swizzle = 128 if streamed % 64 == 0 else 64
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=transforms)


def _call(static, body, name, out_type, scratch, grid, *operands):
    # Inside shard_map a kernel's outputs vary over the axes that its operands vary over, which the kernel forgets.
    axes = tuple(jax.typeof(operands[0]).manual_axis_type.varying)
    outputs = compat.mgpu_kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        num_threads=3,
        thread_name="warpgroup",
        name=name,
        warpgroup_semantics=static.warpgroup_semantics,
    )(*operands)
    return [_varying(x, axes) for x in outputs]


def _varying(x, axes):
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _across(x, shape, dim: int):
    """A vector of rows (dim 0) or of columns (dim 1) over the whole tile."""
    return lax.broadcast_in_dim(x, shape, [dim])


def _vector(ref, dim: int):
    """A row of shared memory as a vector along dimension `dim` of a tile in registers."""
    return compat.mgpu_load(ref, plgpu.Layout.WGMMA.reduce(1 - dim))


def _positions(shape, dim: int, start):
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA) + start


def _accumulate(sums, factors):
    """Each sum plus its product a @ b; all are in flight together and waited for once."""

    def multiply(acc_refs):
        for acc_ref, (a, b) in zip(acc_refs, factors, strict=True):
            plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in sums))


def _masked(x, queries: int, q_start, k_lo, k_start, edge):
    """Scores with the pairs hidden that may not be seen; `edge` says whether there are any."""

    def hide(x):
        q_pos = _positions(x.shape, queries, q_start)
        k_pos = _positions(x.shape, 1 - queries, k_start)
        return jnp.where(visible(q_pos, _across(k_lo, x.shape, queries), k_pos), x, MASKED)

    return lax.cond(edge, hide, lambda x: x, x)


def _tanh_of(static: _Static, x):
    """What `score_gradient` wants of `exponents`' result."""
    return None if static.softcap is None else x


def _meet(barrier) -> None:
    """Both computing warpgroups wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


class _Ring:
    """A ring of stages in shared memory that the streaming warpgroup fills and both others empty."""

    def __init__(self, stages: int, full, empty):
        self.stages, self.full, self.empty = stages, full, empty

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.stages))

    def before_filling(self, step) -> None:
        @pl.when(step >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[self.slot(step)])

    def wait(self, step) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step) -> None:
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])

    def pass_over(self, step) -> None:
        """Also a tile that one does not need is waited for: arriving twice would release the other's tile."""
        self.wait(step)
        self.release(step)


def _ring_barriers(name: str, stages: int, copies: int = 1) -> dict[str, plgpu.Barrier]:
    return {
        f"{name}_full": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        f"{name}_empty": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
    }


def _forward_memory(blocks: HopperBlocks, width: int, dtype) -> dict[str, Any]:
    block_q, block_k, stages = blocks.block_q, blocks.block_k, blocks.stages
    tile_memory = _tile_memory(block_k)
    return {
        "q_smem": tile_memory((2, block_q, width), dtype),
        "k_smem": tile_memory((stages, block_k, width), dtype),
        "v_smem": tile_memory((stages, block_k, width), dtype),
        "k_lo_smem": plgpu.SMEM((2, block_q), jnp.int32),
        "lse_smem": plgpu.SMEM((2, block_q), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=2),
        "turn": plgpu.Barrier(num_arrivals=2),
        **_ring_barriers("k", stages),
        **_ring_barriers("v", stages),
    }


def _backward_q_memory(blocks: HopperBlocks, width: int, dtype) -> dict[str, Any]:
    block_q, block_k, stages = blocks.block_q_dq, blocks.block_k_dq, blocks.stages_bwd
    tile_memory = _tile_memory(block_k)
    return {
        "q_smem": tile_memory((2, block_q, width), dtype),
        "do_smem": tile_memory((2, block_q, width), dtype),
        "k_smem": tile_memory((stages, block_k, width), dtype),
        "v_smem": tile_memory((stages, block_k, width), dtype),
        "lse_smem": plgpu.SMEM((2, block_q), jnp.float32),
        "delta_smem": plgpu.SMEM((2, block_q), jnp.float32),
        "k_lo_smem": plgpu.SMEM((2, block_q), jnp.int32),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=5),
        **_ring_barriers("k", stages),
        **_ring_barriers("v", stages),
    }


def _backward_kv_memory(blocks: HopperBlocks, width: int, dtype) -> dict[str, Any]:
    block_q, block_k, stages = blocks.block_q_dkv, blocks.block_k_dkv, blocks.stages_bwd
    split = width >= SPLIT_WIDTH
    own_tiles = 1 if split else 2
    tile_memory = _tile_memory(block_q)
    return {
        "k_smem": tile_memory((own_tiles, block_k, width), dtype),
        "v_smem": tile_memory((own_tiles, block_k, width), dtype),
        "q_smem": tile_memory((stages, block_q, width), dtype),
        "do_smem": tile_memory((stages, block_q, width), dtype),
        "lse_smem": plgpu.SMEM((stages, block_q), jnp.float32),
        "delta_smem": plgpu.SMEM((stages, block_q), jnp.float32),
        "k_lo_smem": plgpu.SMEM((stages, block_q), jnp.int32),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=1 if split else 2),
        "turn": plgpu.Barrier(num_arrivals=2),
        **_ring_barriers("q", stages, copies=3),
        **_ring_barriers("do", stages, copies=2),
    }


def shared_memory_bytes(blocks: HopperBlocks, width: int) -> dict[str, int]:
    """What a thread block of each kernel takes of shared memory for bfloat16 heads of `width`, as Mosaic counts it."""

    def taken(memory: dict[str, Any], reduces: bool) -> int:
        arrays = [x for x in memory.values() if not isinstance(x, plgpu.Barrier)]
        # One number, or a tuple of one, by the version of jax.
        barriers = sum(int(np.prod(x.num_barriers)) for x in memory.values() if isinstance(x, plgpu.Barrier))
        sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
        aligned = sum(-(-size // SHARED_ALIGNMENT) * SHARED_ALIGNMENT for size in sizes)
        return aligned + 8 * barriers + reduces * REDUCTION_BYTES

    return {
        "forward": taken(_forward_memory(blocks, width, jnp.bfloat16), True),
        "dq": taken(_backward_q_memory(blocks, width, jnp.bfloat16), False),
        "dk/dv": taken(_backward_kv_memory(blocks, width, jnp.bfloat16), False),
    }


def _range(bounds_ref, row, block):
    """(lo, full_lo, full_hi, hi) of one outer block."""
    # Inside shard_map what is read varies over mesh axes and nothing else in a kernel does: a sum forgets them, as the
    # bounds of a loop must.
    return tuple(bounds_ref[row, i, block] + 0 for i in range(4))


def _each(start, stop, body) -> None:
    def step(i, carry):
        body(i)
        return carry

    lax.fori_loop(start, stop, step, jnp.int32(0))


# --- forward


def _forward(static: _Static, q, k, v, sinks, rows, bounds):
    """o [B, T, N, H] and base-2 log-sum-exp [B, N, T]."""
    batch, time, heads, width = q.shape
    group, dtype = heads // k.shape[2], q.dtype
    block_q, block_k, stages = static.blocks.block_q, static.blocks.block_k, static.blocks.stages
    num_tiles = time // (2 * block_q)

    def kernel(q_ref, k_ref, v_ref, k_lo_ref, offset_ref, bounds_ref, *refs, q_smem, k_smem, v_smem, k_lo_smem,
               lse_smem, loaded, turn, k_full, k_empty, v_full, v_empty):  # fmt: skip
        sinks_ref, (o_ref, lse_ref) = (None, refs) if sinks is None else (refs[0], refs[1:])
        row, head, warpgroup = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        # The last tiles of a causal row have the most work and go first.
        tile = num_tiles - 1 - lax.axis_index("tile")
        ranges = [_range(bounds_ref, row, 2 * tile + i) for i in range(2)]
        first, last = jnp.minimum(ranges[0][0], ranges[1][0]), jnp.maximum(ranges[0][3], ranges[1][3])
        keys, values = _Ring(stages, k_full, k_empty), _Ring(stages, v_full, v_empty)

        @pl.when(warpgroup != STREAM)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            start = (2 * tile + warpgroup) * block_q
            own = pl.ds(start, block_q)
            q_tile, mine = q_smem.at[warpgroup], loaded.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[row, own, head], q_tile, mine)
            plgpu.copy_gmem_to_smem(k_lo_ref.at[row, own], k_lo_smem.at[warpgroup], mine)
            plgpu.barrier_wait(mine)
            k_lo = _vector(k_lo_smem.at[warpgroup], 0)
            lo, full_lo, full_hi, hi = _range(bounds_ref, row, 2 * tile + warpgroup)
            q_start = start + offset_ref[row]

            def take_turns():
                _meet(turn)

            def pass_over(block):
                keys.pass_over(block - first)
                values.pass_over(block - first)
                take_turns()
                take_turns()

            def visit(block, carry):
                acc_QH, top_Q, total_Q = carry
                step = block - first
                slot = keys.slot(step)
                keys.wait(step)

                def multiply(acc_ref):
                    plgpu.wgmma(acc_ref, q_tile, k_smem.at[slot].T)
                    take_turns()
                    return acc_ref[...]

                products_QC = pl.run_scoped(multiply, plgpu.ACC((block_q, block_k), jnp.float32))
                keys.release(step)
                x_QC, factor = exponents(products_QC, static.scale, static.softcap)
                x_QC = _masked(
                    x_QC, 0, q_start, k_lo, block * block_k, (block < full_lo) | (block >= full_hi)
                )
                new_top_Q = jnp.maximum(top_Q, x_QC.max(axis=1) * factor)
                p_QC = jnp.exp2(x_QC * factor - _across(new_top_Q, x_QC.shape, 0))
                alpha_Q = jnp.exp2(top_Q - new_top_Q)
                total_Q = total_Q * alpha_Q + p_QC.sum(axis=1)
                acc_QH = acc_QH * _across(alpha_Q, acc_QH.shape, 0)
                # Nothing of this may move behind the barrier, where it would run in the other's turn.
                acc_QH, new_top_Q, total_Q, p_QC = lax.optimization_barrier(
                    (acc_QH, new_top_Q, total_Q, p_QC.astype(dtype))
                )
                plgpu.barrier_arrive(turn)
                values.wait(step)
                plgpu.barrier_wait(turn)
                (acc_QH,) = _accumulate([acc_QH], [(p_QC, v_smem.at[slot])])
                values.release(step)
                return acc_QH, new_top_Q, total_Q

            vector = plgpu.Layout.WGMMA.reduce(1)
            if sinks_ref is None:
                top_Q, total_Q = jnp.full((block_q,), FLOOR, jnp.float32), jnp.zeros((block_q,), jnp.float32)
            else:
                # A sink of -inf is none: it starts at the floor, with nothing in the sum.
                sink = sinks_ref[head] * LOG2E
                top = jnp.maximum(sink, jnp.float32(FLOOR))
                weight = jnp.where(sink > FLOOR, jnp.float32(1.0), jnp.float32(0.0))
                top_Q, total_Q = jnp.broadcast_to(top, (block_q,)), jnp.broadcast_to(weight, (block_q,))
            carry = (
                _zeros((block_q, width)),
                plgpu.layout_cast(top_Q, vector),
                plgpu.layout_cast(total_Q, vector),
            )

            # The second warpgroup runs half a step behind the first.
            pl.when(warpgroup == 1)(take_turns)
            _each(first, lo, pass_over)
            acc_QH, top_Q, total_Q = lax.fori_loop(lo, hi, visit, carry)
            _each(hi, last, pass_over)
            pl.when(warpgroup == 0)(take_turns)

            q_tile[...] = (acc_QH * _across(1.0 / total_Q, acc_QH.shape, 0)).astype(dtype)
            lse_smem.at[warpgroup][...] = top_Q + jnp.log(total_Q) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, o_ref.at[row, own, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, own])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == STREAM)
        def _():
            plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def stream(block):
                step = block - first
                slot, tile_of_keys = keys.slot(step), pl.ds(block * block_k, block_k)
                for ring, source, target in ((keys, k_ref, k_smem), (values, v_ref, v_smem)):
                    ring.before_filling(step)
                    plgpu.copy_gmem_to_smem(
                        source.at[row, tile_of_keys, kv_head], target.at[slot], ring.full.at[slot]
                    )

            _each(first, last, stream)

    scratch = _forward_memory(static.blocks, width, dtype)
    out_type = [jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)]
    # Heads vary fastest, so that the keys of a group stay in the cache.
    grid = {"head": heads, "tile": num_tiles, "row": batch}
    operands = (q, k, v, *rows, bounds) + (() if sinks is None else (sinks,))
    return tuple(_call(static, kernel, "attention_forward", out_type, scratch, grid, *operands))


# --- backward


def _backward_q(static: _Static, q, k, v, do, lse2, delta, rows, bounds):
    batch, time, heads, width = q.shape
    group, dtype = heads // k.shape[2], q.dtype
    block_q, block_k, stages = static.blocks.block_q_dq, static.blocks.block_k_dq, static.blocks.stages_bwd
    num_tiles = time // (2 * block_q)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, k_lo_ref, offset_ref, bounds_ref, dq_ref, *,
               q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem, k_lo_smem, loaded, k_full, k_empty, v_full,
               v_empty):  # fmt: skip
        row, head, warpgroup = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = num_tiles - 1 - lax.axis_index("tile")
        ranges = [_range(bounds_ref, row, 2 * tile + i) for i in range(2)]
        first, last = jnp.minimum(ranges[0][0], ranges[1][0]), jnp.maximum(ranges[0][3], ranges[1][3])
        keys, values = _Ring(stages, k_full, k_empty), _Ring(stages, v_full, v_empty)

        @pl.when(warpgroup != STREAM)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            start = (2 * tile + warpgroup) * block_q
            own = pl.ds(start, block_q)
            q_tile, do_tile, mine = q_smem.at[warpgroup], do_smem.at[warpgroup], loaded.at[warpgroup]
            for source, target in (
                (q_ref.at[row, own, head], q_tile),
                (do_ref.at[row, own, head], do_tile),
                (lse_ref.at[row, head, own], lse_smem.at[warpgroup]),
                (delta_ref.at[row, head, own], delta_smem.at[warpgroup]),
                (k_lo_ref.at[row, own], k_lo_smem.at[warpgroup]),
            ):
                plgpu.copy_gmem_to_smem(source, target, mine)
            plgpu.barrier_wait(mine)
            lse_Q, delta_Q, k_lo_Q = (
                _vector(ref.at[warpgroup], 0) for ref in (lse_smem, delta_smem, k_lo_smem)
            )
            lo, full_lo, full_hi, hi = _range(bounds_ref, row, 2 * tile + warpgroup)
            q_start = start + offset_ref[row]

            def pass_over(block):
                keys.pass_over(block - first)
                values.pass_over(block - first)

            def visit(block, dq_QH):
                step = block - first
                slot, shape = keys.slot(step), (block_q, block_k)

                def gradient(s_ref, dp_ref):
                    keys.wait(step)
                    plgpu.wgmma(s_ref, q_tile, k_smem.at[slot].T)
                    values.wait(step)
                    plgpu.wgmma(dp_ref, do_tile, v_smem.at[slot].T)
                    # The exponentials run under the second product.
                    x_QC, factor = exponents(
                        plgpu.wgmma_accumulator_load(s_ref, wait_n=1), static.scale, static.softcap
                    )
                    edge = (block < full_lo) | (block >= full_hi)
                    shown_QC = _masked(x_QC, 0, q_start, k_lo_Q, block * block_k, edge)
                    p_QC = jnp.exp2(shown_QC * factor - _across(lse_Q, shape, 0))
                    dp_QC = dp_ref[...]
                    values.release(step)
                    return score_gradient(p_QC, dp_QC, _across(delta_Q, shape, 0), _tanh_of(static, x_QC))

                ds_QC = pl.run_scoped(gradient, *[plgpu.ACC(shape, jnp.float32)] * 2)
                (dq_QH,) = _accumulate([dq_QH], [(ds_QC.astype(dtype), k_smem.at[slot])])
                keys.release(step)
                return dq_QH

            _each(first, lo, pass_over)
            dq_QH = lax.fori_loop(lo, hi, visit, _zeros((block_q, width)))
            _each(hi, last, pass_over)
            q_tile[...] = (dq_QH * static.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, own, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == STREAM)
        def _():
            plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def stream(block):
                step = block - first
                slot, tile_of_keys = keys.slot(step), pl.ds(block * block_k, block_k)
                for ring, source, target in ((keys, k_ref, k_smem), (values, v_ref, v_smem)):
                    ring.before_filling(step)
                    plgpu.copy_gmem_to_smem(
                        source.at[row, tile_of_keys, kv_head], target.at[slot], ring.full.at[slot]
                    )

            _each(first, last, stream)

    scratch = _backward_q_memory(static.blocks, width, dtype)
    grid = {"head": heads, "tile": num_tiles, "row": batch}
    (dq,) = _call(static, kernel, "attention_backward_q", [jax.ShapeDtypeStruct(q.shape, dtype)], scratch, grid,
                  q, k, v, do, lse2, delta, *rows, bounds)  # fmt: skip
    return dq


def _backward_kv(static: _Static, q, k, v, do, lse2, delta, rows, bounds):
    """dk and dv [B, S, K, H]; the heads of a group are summed in registers, in order."""
    batch, _, heads, width = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group, dtype = heads // kv_heads, q.dtype
    block_q, block_k, stages = static.blocks.block_q_dkv, static.blocks.block_k_dkv, static.blocks.stages_bwd
    split = width >= SPLIT_WIDTH
    own_tiles = 1 if split else 2
    num_tiles = num_keys // (own_tiles * block_k)
    shape = (block_k, block_q)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, k_lo_ref, offset_ref, bounds_ref, dk_ref, dv_ref, *,
               k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, k_lo_smem, loaded, turn, q_full, q_empty,
               do_full, do_empty):  # fmt: skip
        row, kv_head, warpgroup = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        # The first keys of a causal row have the most work, and go first.
        tile = lax.axis_index("tile")
        ranges = [_range(bounds_ref, row, own_tiles * tile + i) for i in range(own_tiles)]
        first = functools.reduce(jnp.minimum, [r[0] for r in ranges])
        last = functools.reduce(jnp.maximum, [r[3] for r in ranges])
        span = last - first
        queries, cotangents = _Ring(stages, q_full, q_empty), _Ring(stages, do_full, do_empty)

        @pl.when(warpgroup != STREAM)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            place = 0 if split else warpgroup
            block = tile if split else 2 * tile + warpgroup
            own = pl.ds(block * block_k, block_k)
            k_tile, v_tile, mine = k_smem.at[place], v_smem.at[place], loaded.at[warpgroup]
            if split:
                # Each warpgroup loads one of the two tiles and waits for both.
                pl.when(warpgroup == 0)(
                    lambda: plgpu.copy_gmem_to_smem(k_ref.at[row, own, kv_head], k_tile, loaded.at[0])
                )
                pl.when(warpgroup == 1)(
                    lambda: plgpu.copy_gmem_to_smem(v_ref.at[row, own, kv_head], v_tile, loaded.at[1])
                )
                plgpu.barrier_wait(loaded.at[0])
                plgpu.barrier_wait(loaded.at[1])
            else:
                plgpu.copy_gmem_to_smem(k_ref.at[row, own, kv_head], k_tile, mine)
                plgpu.copy_gmem_to_smem(v_ref.at[row, own, kv_head], v_tile, mine)
                plgpu.barrier_wait(mine)
            lo, full_lo, full_hi, hi = _range(bounds_ref, row, block)
            offset = offset_ref[row]

            def visit(step, q_block, sums, *, make_dk: bool, make_dv: bool):
                slot = queries.slot(step)

                def scores(s_ref, *dp_refs):
                    """Probabilities and, given room for them, the gradients of the scores."""
                    queries.wait(step)
                    plgpu.wgmma(s_ref, k_tile, q_smem.at[slot].T)
                    cotangents.wait(step)
                    if make_dk:
                        plgpu.wgmma(dp_refs[0], v_tile, do_smem.at[slot].T)
                    x_CQ, factor = exponents(
                        plgpu.wgmma_accumulator_load(s_ref, wait_n=int(make_dk)), static.scale, static.softcap
                    )
                    edge = (q_block < full_lo) | (q_block >= full_hi)
                    k_lo_Q = _vector(k_lo_smem.at[slot], 1)
                    shown_CQ = _masked(x_CQ, 1, q_block * block_q + offset, k_lo_Q, block * block_k, edge)
                    p_CQ = jnp.exp2(shown_CQ * factor - _across(_vector(lse_smem.at[slot], 1), shape, 1))
                    if not make_dk:
                        return p_CQ.astype(dtype), None
                    delta_CQ = _across(_vector(delta_smem.at[slot], 1), shape, 1)
                    ds_CQ = score_gradient(p_CQ, dp_refs[0][...], delta_CQ, _tanh_of(static, x_CQ))
                    return p_CQ.astype(dtype), ds_CQ.astype(dtype)

                rooms = [plgpu.ACC(shape, jnp.float32)] * (1 + make_dk)
                p_CQ, ds_CQ = pl.run_scoped(scores, *rooms)
                factors = [(ds_CQ, q_smem.at[slot])] * make_dk + [(p_CQ, do_smem.at[slot])] * make_dv
                sums = _accumulate(sums, factors)
                queries.release(step)
                cotangents.release(step)
                return tuple(sums)

            def sweep(**which):
                """Over the heads of the group and the query blocks that see these keys."""

                def of_head(g, sums):
                    begin = g * span - first

                    def pass_over(q_block):
                        queries.pass_over(begin + q_block)
                        cotangents.pass_over(begin + q_block)

                    _each(first, lo, pass_over)
                    sums = lax.fori_loop(lo, hi, lambda i, sums: visit(begin + i, i, sums, **which), sums)
                    _each(hi, last, pass_over)
                    return sums

                return lax.fori_loop(0, group, of_head, (_zeros((block_k, width)),) * sum(which.values()))

            def write(target, value, out_ref):
                target[...] = value.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(target, out_ref.at[row, own, kv_head])

            if split:

                @pl.when(warpgroup == 0)
                def _():
                    (dk_CH,) = sweep(make_dk=True, make_dv=False)
                    # The other may still multiply by this tile.
                    _meet(turn)
                    write(k_tile, dk_CH * static.scale, dk_ref)

                @pl.when(warpgroup == 1)
                def _():
                    (dv_CH,) = sweep(make_dk=False, make_dv=True)
                    _meet(turn)
                    write(v_tile, dv_CH, dv_ref)

            else:
                dk_CH, dv_CH = sweep(make_dk=True, make_dv=True)
                write(k_tile, dk_CH * static.scale, dk_ref)
                write(v_tile, dv_CH, dv_ref)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == STREAM)
        def _():
            plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")

            def stream(step):
                slot = queries.slot(step)
                head = kv_head * group + lax.div(step, span)
                tile_of_queries = pl.ds((first + lax.rem(step, span)) * block_q, block_q)
                wide, narrow = (row, tile_of_queries, head), (row, head, tile_of_queries)
                queries.before_filling(step)
                full = queries.full.at[slot]
                plgpu.copy_gmem_to_smem(q_ref.at[wide], q_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(lse_ref.at[narrow], lse_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(k_lo_ref.at[row, tile_of_queries], k_lo_smem.at[slot], full)
                cotangents.before_filling(step)
                full = cotangents.full.at[slot]
                plgpu.copy_gmem_to_smem(do_ref.at[wide], do_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(delta_ref.at[narrow], delta_smem.at[slot], full)

            _each(0, span * group, stream)

    scratch = _backward_kv_memory(static.blocks, width, dtype)
    grid = {"head": kv_heads, "tile": num_tiles, "row": batch}
    out_type = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v)]
    return tuple(
        _call(
            static,
            kernel,
            "attention_backward_kv",
            out_type,
            scratch,
            grid,
            q,
            k,
            v,
            do,
            lse2,
            delta,
            *rows,
            bounds,
        )  # fmt: skip
    )
