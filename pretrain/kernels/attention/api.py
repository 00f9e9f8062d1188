"""The attention op: checks, dispatch that says what it took and why, and one signature for every implementation.

B rows, T query time, S key time, N query heads, K key-value heads, G = N/K, H head width.
"""

import dataclasses
import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pretrain import compat
from pretrain.config import ConfigError
from pretrain.kernels.attention import hopper, reference, tpu, worklist
from pretrain.kernels.attention.configs import (
    HOPPER_SHARED_BYTES,
    TPU_CHIPS,
    VMEM_LIMIT_BYTES,
    HopperBlocks,
    TpuBlocks,
    hopper_blocks,
    tpu_blocks,
)
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, allowed_BTS, make_plan

logger = logging.getLogger(__name__)

# In the order in which `auto` asks them; tpu_interpret and reference are taken only by name.
AUTO_ORDER = ("pallas_tpu", "pallas_hopper", "cudnn", "xla")
IMPLEMENTATIONS = ("pallas_tpu", "tpu_interpret", "pallas_hopper", "cudnn", "xla", "reference")

KERNEL_WIDTHS = (64, 128, 256)
GPUS = ("cuda", "gpu")
HOPPER = (9, 0)
# cuDNN's fused attention begins here.
AMPERE = (8, 0)
# The compute capability of chips whose devices do not tell it, as those that programs are compiled for without having
# one: by a word of the chip's name (NVIDIA's table at developer.nvidia.com/cuda-gpus).
CAPABILITY_OF_NAME = {
    **dict.fromkeys(("V100",), (7, 0)),
    **dict.fromkeys(("T4",), (7, 5)),
    **dict.fromkeys(("A100", "A800", "A30"), (8, 0)),
    **dict.fromkeys(("A10", "A10G", "A16", "A40", "A5000", "A6000", "3090"), (8, 6)),
    **dict.fromkeys(("L4", "L20", "L40", "L40S", "4090"), (8, 9)),
    **dict.fromkeys(("H100", "H200", "H800", "H20", "GH200"), HOPPER),
    **dict.fromkeys(("B100", "B200", "GB200"), (10, 0)),
    **dict.fromkeys(("B300", "GB300"), (10, 3)),
    **dict.fromkeys(("5090",), (12, 0)),
}
HOPPER_NAMES = ", ".join(name for name, capability in CAPABILITY_OF_NAME.items() if capability == HOPPER)
# Segment ids exist only in functions that jax does not export; refused, so that documents never see one another.
PACKED_BY_CUDNN = (
    "packed rows: jax.nn.dot_product_attention takes no segment ids, only a mask of queries by keys, whose memory and "
    "time are those of the whole square; rows of one document without segment ids it serves"
)
# Up to this many query rows of one key-value head are one tile against a cache.
DECODE_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What dispatch looks at: all static.

    offset: "none" (T = S), "static", "traced", or "rows" (one a batch row, as in decoding).
    compute_capability: of a CUDA device that tells it; None for others, whose names are asked.
    """

    platform: str
    device_kind: str
    dtype: str
    batch: int
    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    width: int
    spec: AttentionSpec
    packed: bool = False
    sinks: bool = False
    offset: str = "none"
    return_lse: bool = False
    compute_capability: tuple[int, int] | None = None

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of a CUDA GPU; None for everything else, and for names never heard of."""
        if self.platform not in GPUS:
            return None
        words = re.findall(r"[A-Za-z0-9]+", self.device_kind)
        named = [CAPABILITY_OF_NAME[word] for word in words if word in CAPABILITY_OF_NAME]
        return self.compute_capability or (named[0] if named else None)

    @property
    def target(self) -> str:
        """What is traced for, in words."""
        told = "" if self.capability is None else " of compute capability {}.{}".format(*self.capability)
        return f"{self.platform} {self.device_kind}{told}"

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def decoding(self) -> bool:
        """A few queries of each row against its longer cache; a shard of a training row has one offset."""
        return self.offset == "rows" and self.group * self.num_queries <= DECODE_ROWS < self.num_keys


class Declined(ConfigError, NotImplementedError):
    """An implementation asked for by name cannot serve the problem; every reason, and what to take instead."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation taken, and for the others that `auto` asked, every reason why not."""

    impl: str
    declined: dict[str, list[str]]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {', '.join(why)}" for name, why in self.declined.items())
        return f"attention by {self.impl}" + (f" ({reasons})" if reasons else "")


def choose(problem: Problem, impl: str = "auto", config: TpuBlocks | HopperBlocks | None = None) -> Choice:
    """Which implementation serves `problem`. An explicit choice never falls back.

    Raises Declined (a NotImplementedError) with every reason when `impl` cannot do it.
    """
    if impl != "auto":
        reasons = reasons_against(impl, problem, config)
        if reasons:
            raise Declined(
                f"attention impl={impl!r} cannot do this: {'; '.join(reasons)}; take impl='xla', or auto"
            )
        return Choice(impl, {})
    declined = {}
    for name in AUTO_ORDER:
        reasons = reasons_against(name, problem, config)
        if not reasons:
            return Choice(name, declined)
        declined[name] = reasons
    raise AssertionError("xla serves every problem")


def reasons_against(impl: str, p: Problem, config: TpuBlocks | HopperBlocks | None = None) -> list[str]:
    """Why `impl` cannot serve `p`; empty when it can."""
    reasons = []
    match impl:
        case "xla" | "reference":
            pass
        case "pallas_tpu" | "tpu_interpret":
            if not p.spec.causal:
                reasons.append("its blocks follow the diagonal, got causal=False")
            if p.dtype not in ("float32", "bfloat16"):
                reasons.append(f"needs float32 or bfloat16, got {p.dtype}")
            if impl == "pallas_tpu":
                if p.platform != "tpu":
                    reasons.append(f"needs a TPU, got {p.platform}")
                elif config is None and p.device_kind not in TPU_CHIPS:
                    reasons.append(f"has tiles for {', '.join(TPU_CHIPS)}, got {p.device_kind} and no config")
                if p.width not in KERNEL_WIDTHS:
                    reasons.append(f"needs head width 64, 128 or 256, got {p.width}")
            if not reasons:
                blocks = _tpu_config(p, impl, config)
                reasons += _block_reasons(p, blocks, minimum=128 if impl == "pallas_tpu" else 8)
                if impl == "pallas_tpu":
                    reasons += _vmem_reasons(p, blocks)
        case "pallas_hopper":
            reasons += compat.mosaic_gpu_reasons()
            if not p.spec.causal:
                reasons.append("its blocks follow the diagonal, got causal=False")
            if p.capability != HOPPER:
                reasons.append(f"needs a Hopper GPU (compute capability 9.0: {HOPPER_NAMES}), got {p.target}")
            if p.dtype != "bfloat16":
                reasons.append(f"needs bfloat16, got {p.dtype}")
            if p.width not in KERNEL_WIDTHS:
                reasons.append(f"needs head width 64, 128 or 256, got {p.width}")
            if not reasons:
                reasons += _hopper_reasons(p, _hopper_config(p, config))
        case "cudnn":
            if p.capability is None or p.capability < AMPERE:
                reasons.append(f"needs a CUDA GPU of compute capability 8.0 or more, got {p.target}")
            if p.dtype not in ("bfloat16", "float16"):
                reasons.append(f"needs bfloat16 or float16, got {p.dtype}")
            limit = 256 if p.capability is not None and p.capability >= HOPPER else 128
            if p.width % 8 or p.width > limit:
                reasons.append(f"needs head width a multiple of 8 up to {limit}, got {p.width}")
            for present, what in (
                (p.packed, PACKED_BY_CUDNN),
                (p.spec.softcap is not None, "soft cap"),
                (p.sinks, "sinks"),
                (p.offset != "none", "query offset"),
                (p.return_lse, "log-sum-exp output"),
                (p.spec.window is not None and not p.spec.causal, "two-sided window"),
            ):
                if present:
                    reasons.append(f"has no {what}")
        case _:
            raise AssertionError(impl)
    return reasons


def _block_reasons(p: Problem, blocks: TpuBlocks, minimum: int) -> list[str]:
    if p.decoding:
        table = 8 * p.batch * -(-p.num_keys // _decode_tiles(blocks, p.num_keys)[0])
        if table > worklist.MAX_TABLE_BYTES:
            return [f"the work list of {p.batch} rows takes {table} bytes of scalar memory, more than the limit of "
                    f"{worklist.MAX_TABLE_BYTES}; decode fewer rows at a time"]  # fmt: skip
        return []
    reasons = []
    if p.offset != "none":
        for name, length, size in [
            *(("queries", p.num_queries, block_q) for _, block_q, _ in blocks.tiles),
            *(("keys", p.num_keys, block_k) for _, _, block_k in blocks.tiles),
        ]:
            if length % size or size < minimum:
                reasons.append(
                    f"with an offset {name} must come in multiples of {max(size, minimum)}, got {length}"
                )
    for name in ("block_q", "block_q_dq", "block_q_dkv"):
        if p.offset == "none" and (size := getattr(blocks, name)) < minimum:
            reasons.append(f"queries lie along lanes, so {name} must be at least {minimum}, got {size}")
    if p.offset == "rows":
        reasons.append("offsets of rows are for decoding, a few queries against a longer cache")
    offset = 0 if p.offset == "none" else jnp.zeros((), jnp.int32)
    row = max(
        8 * worklist.max_steps(1, *_padded(p.num_queries, p.num_keys, blocks), side, block_q, block_k, offset)
        for side, block_q, block_k in blocks.tiles
    )
    if row > worklist.MAX_TABLE_BYTES:
        reasons.append(f"the work list of one row takes {row} bytes of scalar memory, more than the limit of "
                       f"{worklist.MAX_TABLE_BYTES}; use longer blocks")  # fmt: skip
    return list(dict.fromkeys(reasons))


def _vmem_limit_bytes(device_kind: str) -> int:
    """Of a chip that the table does not know: the least of those that it does."""
    return VMEM_LIMIT_BYTES.get(TPU_CHIPS.get(device_kind, ""), min(VMEM_LIMIT_BYTES.values()))


def _vmem_reasons(p: Problem, blocks: TpuBlocks) -> list[str]:
    limit, itemsize = _vmem_limit_bytes(p.device_kind), jnp.dtype(p.dtype).itemsize
    if p.decoding:
        block_k, slice_k = _decode_tiles(blocks, p.num_keys)
        size = tpu.kernel_vmem_bytes(
            "forward", group=1, block_q=tpu.decode_columns(p.group, p.num_queries), block_k=block_k, slice_k=slice_k,
            width=p.width, itemsize=itemsize,
        )  # fmt: skip
        if size <= limit:
            return []
        return [f"its tiles of {block_k} keys take up to {size / 2**20:.1f} MiB of vector memory in {p.dtype}, more "
                f"than the {limit >> 20} of this chip; use shorter blocks or slices"]  # fmt: skip
    taken = tpu.vmem_bytes(blocks, p.group, p.width, itemsize)
    return [
        f"its {kernel} tiles of {block_q} queries of {p.group} heads by {block_k} keys take up to {size / 2**20:.1f} "
        f"MiB of vector memory in {p.dtype}, more than the {limit >> 20} of this chip; use shorter blocks or slices"
        for (kernel, size), (_, block_q, block_k) in zip(taken.items(), blocks.tiles, strict=True)
        if size > limit
    ]


def _hopper_reasons(p: Problem, blocks: HopperBlocks) -> list[str]:
    reasons = [
        f"its {kernel} tiles take {size} bytes of shared memory, more than the {HOPPER_SHARED_BYTES} of a thread "
        "block; use shorter blocks or fewer stages"
        for kernel, size in hopper.shared_memory_bytes(blocks, p.width).items()
        if size > HOPPER_SHARED_BYTES
    ]
    if p.offset == "rows":
        reasons.append("offsets of rows are for decoding, which it does not serve")
    size_q, size_k = blocks.multiple_of
    if p.offset != "none" and (p.num_queries % size_q or p.num_keys % size_k):
        reasons.append(f"with an offset queries and keys must come in multiples of {size_q} and {size_k}, got "
                       f"{p.num_queries} and {p.num_keys}")  # fmt: skip
    return reasons


def _hopper_config(p: Problem, config: TpuBlocks | HopperBlocks | None) -> HopperBlocks:
    if config is None:
        return hopper_blocks(p.width, p.packed, p.device_kind)
    if not isinstance(config, HopperBlocks):
        raise ConfigError(
            f"impl='pallas_hopper' takes HopperBlocks, got {type(config).__name__}; give none for the table's"
        )
    return config


def _tpu_config(p: Problem, impl: str, config: TpuBlocks | HopperBlocks | None) -> TpuBlocks:
    """The tiles to use: those given, or the table's, shortened to the memory, the row and a divisor under an offset.

    The table is of bfloat16; float32, and many heads on one key-value head, take shorter tiles where memory asks it.
    """
    if config is not None:
        if not isinstance(config, TpuBlocks):
            raise ConfigError(
                f"impl={impl!r} takes TpuBlocks, got {type(config).__name__}; give none for the table's"
            )
        return config
    # Interpreted there is no chip.
    chip = TPU_CHIPS[p.device_kind] if impl == "pallas_tpu" else "v5e"
    blocks = tpu_blocks(chip, p.width, p.group, p.packed)
    if impl == "pallas_tpu" and not p.decoding:
        itemsize = jnp.dtype(p.dtype).itemsize
        blocks = tpu.fitting(blocks, p.group, p.width, itemsize, _vmem_limit_bytes(p.device_kind))
    if p.decoding:  # all queries are one tile, and tiles of keys are as long as the cache lets them be
        return blocks
    blocks = blocks.limited_to(max(p.num_queries, 8 if impl == "tpu_interpret" else 128))
    if p.offset != "none":
        # The greatest power of two that divides the length.
        limits = {"q": p.num_queries & -p.num_queries, "k": p.num_keys & -p.num_keys}
        fields = {f.name: getattr(blocks, f.name) for f in dataclasses.fields(blocks)}
        fields = {
            name: max(8, min(size, limits["q" if "_q" in name else "k"])) for name, size in fields.items()
        }
        blocks = TpuBlocks(**fields)
    return blocks


def _decode_tiles(blocks: TpuBlocks, num_keys: int) -> tuple[int, int]:
    """(keys a tile, keys a slice of it) against a cache: as few tiles as the table's allow, of about one size.

    They need not divide the cache: what the last one holds beyond it is masked.
    """
    slice_k = min(blocks.slice_k, blocks.block_k)
    num_tiles = -(-num_keys // blocks.block_k)
    return -(-num_keys // (num_tiles * slice_k)) * slice_k, slice_k


def _padded(num_queries: int, num_keys: int, blocks: TpuBlocks) -> tuple[int, int]:
    """Lengths rounded up to all blocks, which are powers of two."""
    size_q = max(block_q for _, block_q, _ in blocks.tiles)
    size_k = max(block_k for _, _, block_k in blocks.tiles)
    if num_queries == num_keys:
        size_q = size_k = max(size_q, size_k)
    return -(-num_queries // size_q) * size_q, -(-num_keys // size_k) * size_k


@functools.cache
def announce(choice: str) -> None:
    """Once for each that differs, however many layers and steps are traced."""
    logger.info("%s", choice)


def target() -> tuple[str, str]:
    """(platform, device kind) that is traced for: the mesh in scope if it names one, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def _told_capability() -> tuple[int, int] | None:
    """The compute capability that the device traced for tells; AMD's tell names, and absent devices nothing."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    return _capability_of(jax.devices()[0])


def _capability_of(device: object) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return None if found is None else (int(found[1]), int(found[2]))


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
    config: TpuBlocks | HopperBlocks | None = None,
    interpret: object = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention of each query to the keys of its document.

    plan: from `make_plan`, over the S keys; make it once a batch. segment_ids is sugar for that.
    sinks_N: one logit a head that joins the softmax's denominator and carries no value; differentiable.
    q_offset: row of the first query among the keys; needed when T differs from S, and in context parallelism.
      One offset a batch row, [B], serves decoding: the queries of row b see the keys up to q_offset[b] + t. An integer
      of Python or NumPy is part of the program, an array of jax is an input to it.
    impl: auto, pallas_tpu, tpu_interpret (the TPU kernels interpreted anywhere), pallas_hopper, cudnn, xla, reference.
    config: tiles, instead of the table's, for an implementation asked for by name.
    interpret: another interpreter for tpu_interpret (pltpu.InterpretParams).
    return_lse: also the natural log-sum-exp of the scores, float32, differentiable.

    Runs on local arrays: on a mesh call it inside shard_map, with keys gathered over the context axis.
    Raises ConfigError on bad input before anything is traced, Declined when an implementation asked for by name cannot
    do this.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, plan, segment_ids, spec, sinks_N, q_offset, impl, config, interpret)
    q_offset = _known(q_offset)
    batch, num_queries = q_BTNH.shape[:2]
    packed = segment_ids is not None if plan is None else plan.packed
    problem = problem_of(
        q_BTNH,
        k_BSKH,
        spec,
        packed=packed,
        sinks=sinks_N is not None,
        q_offset=q_offset,
        return_lse=return_lse,
    )
    choice = choose(problem, impl, config)
    announce(str(choice))
    if plan is None:
        plan = make_plan(segment_ids, spec, seq_len=k_BSKH.shape[1], batch=batch)
    if plan.q_hi_BS.shape[0] != batch:
        plan = dataclasses.replace(
            plan,
            k_lo_BT=jnp.broadcast_to(plan.k_lo_BT, (batch, plan.k_lo_BT.shape[1])),
            q_hi_BS=jnp.broadcast_to(plan.q_hi_BS, (batch, plan.q_hi_BS.shape[1])),
            work=(),
        )
    offset = 0 if q_offset is None else q_offset
    q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset = _aligned((q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset))
    plan = plan.rows(offset, num_queries)
    match choice.impl:
        case "pallas_tpu" | "tpu_interpret":
            if choice.impl == "pallas_tpu":
                interpret = False
            elif interpret is None:
                interpret = True
            blocks = _tpu_config(problem, choice.impl, config)
            run = functools.partial(_on_tpu, spec, blocks, problem, interpret)
            o_BTNH, lse_BNT = run(q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset)
        case "pallas_hopper":
            blocks = _hopper_config(problem, config)
            o_BTNH, lse_BNT = _on_hopper(spec, blocks, q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset)
        case "cudnn":
            window = None if spec.window is None else (spec.window - 1, 0)
            o_BTNH, lse_BNT = _by_cudnn(q_BTNH, k_BSKH, v_BSKH, spec, window), None
        case "reference":
            mask_BTS = allowed_BTS(plan, offset, k_BSKH.shape[1])
            dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
            o_BTNH, lse_BNT = reference.definition(
                q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, spec, dtype=dtype
            )
            o_BTNH = o_BTNH.astype(q_BTNH.dtype)
        case "xla":
            o_BTNH, lse_BNT = reference.xla_attention(
                q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, spec, q_offset=offset
            )
    return (o_BTNH, lse_BNT) if return_lse else o_BTNH


def prepare_plan(
    plan: PackPlan,
    q_BTNH: jax.ShapeDtypeStruct,
    k_BSKH: jax.ShapeDtypeStruct,
    *,
    spec: AttentionSpec,
    impl: str = "auto",
    config: TpuBlocks | HopperBlocks | None = None,
) -> PackPlan:
    """The plan with the block ranges that `attention` will want, so that layers share them: once a batch.

    Only the shapes and dtypes of q and k are read. Without it each call makes its own.
    """
    problem = problem_of(q_BTNH, k_BSKH, spec, packed=plan.packed)
    choice = choose(problem, impl, config)
    match choice.impl:
        case "pallas_tpu" | "tpu_interpret":
            blocks = _tpu_config(problem, choice.impl, config)
            padded = _pad_plan(plan, *_padded(problem.num_queries, problem.num_keys, blocks))
            return dataclasses.replace(plan, work=_work(padded, blocks, 0))
        case "pallas_hopper":
            blocks = _hopper_config(problem, config)
            padded = _pad_plan(plan, *_padded_to_pairs(problem.num_queries, problem.num_keys, blocks))
            return dataclasses.replace(plan, work=(hopper.tile_ranges(padded, blocks),))
    return plan


def problem_of(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    spec: AttentionSpec,
    *,
    packed: bool,
    sinks: bool = False,
    q_offset: int | Array | None = None,
    return_lse: bool = False,
) -> Problem:
    """What dispatch looks at when `attention` is called with arrays of these shapes on the current target."""
    platform, device_kind = target()
    q_offset = _known(q_offset)
    if q_offset is None:
        offset = "none"
    elif isinstance(q_offset, int):
        offset = "none" if q_offset == 0 and q.shape[1] == k.shape[1] else "static"
    else:
        offset = "rows" if jnp.ndim(q_offset) == 1 else "traced"
    return Problem(
        platform=platform,
        device_kind=device_kind,
        dtype=jnp.dtype(q.dtype).name,
        batch=q.shape[0],
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        width=q.shape[3],
        spec=spec,
        packed=packed,
        sinks=sinks,
        offset=offset,
        return_lse=return_lse,
        compute_capability=_told_capability(),
    )


def _aligned(tree):
    """Inside shard_map: every array varies over the axes that any of them varies over.

    A kernel sees one block of everything; the transpose of the alignment sums gradients over the added axes.
    """
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))

    def align(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else None
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(align, tree)


def _work(plan: PackPlan, blocks: TpuBlocks, offset: int | Array) -> tuple[worklist.WorkList, ...]:
    lists = {}
    for tile in blocks.tiles:
        if tile not in lists:
            side, block_q, block_k = tile
            lists[tile] = worklist.work_list(
                plan, side=side, block_q=block_q, block_k=block_k, q_offset=offset
            )
    return tuple(lists[tile] for tile in blocks.tiles)


def _pad_plan(plan: PackPlan, num_queries: int, num_keys: int) -> PackPlan:
    """Positions of padding see only themselves: a padded tail costs its diagonal blocks and nothing more."""

    def pad(x: Array, length: int) -> Array:
        tail = jnp.arange(x.shape[1], length, dtype=x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(tail[None], (x.shape[0], tail.size))], axis=1)

    return dataclasses.replace(
        plan, k_lo_BT=pad(plan.k_lo_BT, num_queries), q_hi_BS=pad(plan.q_hi_BS, num_keys), work=plan.work
    )


def _on_tpu(spec, blocks, problem, interpret, q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset):
    """The TPU kernels with rows padded to the blocks, in parts of the batch whose work lists fit scalar memory."""
    if problem.decoding:
        block_k, slice_k = _decode_tiles(blocks, problem.num_keys)
        return tpu.tpu_decode(
            q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, spec, block_k=block_k, slice_k=slice_k, q_offset=offset,
            interpret=interpret,
        )  # fmt: skip
    num_queries, num_keys = problem.num_queries, problem.num_keys
    padded_q, padded_k = _padded(num_queries, num_keys, blocks)
    if padded_q != num_queries:
        widen = [(0, 0), (0, padded_q - num_queries), (0, 0), (0, 0)]
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, widen) for x in (q_BTNH, k_BSKH, v_BSKH))
        plan = _pad_plan(plan, padded_q, padded_k)
    bytes_per_row = 8 * max(
        worklist.max_steps(1, padded_q, padded_k, side, block_q, block_k, offset)
        for side, block_q, block_k in blocks.tiles
    )
    rows = max(1, worklist.MAX_TABLE_BYTES // bytes_per_row)
    lists = tuple(w for w in plan.work if isinstance(w, worklist.WorkList))
    outputs = []
    for start in range(0, problem.batch, rows):
        part = slice(start, start + rows)
        if rows >= problem.batch and _matches(lists, blocks):
            local, work = plan, lists
        else:
            local = dataclasses.replace(plan, k_lo_BT=plan.k_lo_BT[part], q_hi_BS=plan.q_hi_BS[part], work=())
            work = _work(local, blocks, offset)
        outputs.append(
            tpu.tpu_attention(
                q_BTNH[part],
                k_BSKH[part],
                v_BSKH[part],
                local,
                work,
                sinks_N,
                spec,
                blocks,
                q_offset=offset,
                interpret=interpret,
            )  # fmt: skip
        )
    o_BTNH, lse_BNT = (
        x[0] if len(x) == 1 else jnp.concatenate(x, axis=0) for x in zip(*outputs, strict=True)
    )
    return o_BTNH[:, :num_queries], lse_BNT[:, :, :num_queries]


def _padded_to_pairs(num_queries: int, num_keys: int, blocks: HopperBlocks) -> tuple[int, int]:
    """Lengths rounded up to two blocks, one for each computing warpgroup."""
    size_q, size_k = blocks.multiple_of
    padded_q, padded_k = (-(-n // size) * size for n, size in ((num_queries, size_q), (num_keys, size_k)))
    if num_queries == num_keys:
        padded_q = padded_k = max(padded_q, padded_k)
    return padded_q, padded_k


def _on_hopper(spec, blocks: HopperBlocks, q_BTNH, k_BSKH, v_BSKH, plan, sinks_N, offset):
    """The Hopper kernels with rows padded to two blocks."""
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    padded_q, padded_k = _padded_to_pairs(num_queries, num_keys, blocks)
    if (padded_q, padded_k) != (num_queries, num_keys):

        def widen(x, length):
            return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])

        q_BTNH, k_BSKH, v_BSKH = widen(q_BTNH, padded_q), widen(k_BSKH, padded_k), widen(v_BSKH, padded_k)
        plan = _pad_plan(plan, padded_q, padded_k)
    prepared = [w for w in plan.work if isinstance(w, hopper.TileRanges) and w.blocks == blocks]
    ranges = prepared[0] if prepared else hopper.tile_ranges(plan, blocks, offset)
    o_BTNH, lse_BNT = hopper.hopper_attention(
        q_BTNH, k_BSKH, v_BSKH, plan.k_lo_BT, ranges, sinks_N, spec, q_offset=offset
    )
    return o_BTNH[:, :num_queries], lse_BNT[:, :, :num_queries]


def _matches(work: tuple[worklist.WorkList, ...], blocks: TpuBlocks) -> bool:
    return tuple((w.side, w.block_q, w.block_k) for w in work) == blocks.tiles


def _by_cudnn(q_BTNH, k_BSKH, v_BSKH, spec: AttentionSpec, window: tuple[int, int] | None) -> Array:
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=spec.causal,
        scale=spec.scale,
        local_window_size=window,
        implementation="cudnn",
    )


def _known(q_offset):
    """An offset of NumPy as the integer that it is, for it is known when the program is traced; others unchanged."""
    known = isinstance(q_offset, np.integer | np.ndarray) and np.ndim(q_offset) == 0
    return int(q_offset) if known else q_offset


def _check(q, k, v, plan, segment_ids, spec, sinks, q_offset, impl, config, interpret) -> None:
    """Every rule on the arguments, all faults at once."""
    faults = [
        f"{name} must be an array, got {type(x).__name__}; convert it by jnp.asarray"
        for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks), ("segment ids", segment_ids))
        if not (_is_array(x) or (x is None and name in ("sinks", "segment ids")))
    ]
    if not isinstance(spec, AttentionSpec):
        faults.append(f"spec must be an AttentionSpec, got {type(spec).__name__}; see plan.py")
    if not isinstance(plan, PackPlan | None):
        faults.append(f"plan must be a PackPlan, got {type(plan).__name__}; make one with make_plan")
    if faults:  # what follows asks these for their shapes and fields
        raise ConfigError(*faults)
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        faults.append(f"impl must be auto or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if config is not None and impl not in ("pallas_tpu", "tpu_interpret", "pallas_hopper"):
        faults.append(
            f"config is for an implementation with tiles, got impl={impl!r}; name one, or give no config"
        )
    if interpret is not None and impl != "tpu_interpret":
        faults.append(f"interpret is for impl='tpu_interpret', got {impl!r}; leave it out")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ConfigError(
            f"q, k, v must be [B, T, N, H], [B, S, K, H] twice, got {q.shape}, {k.shape}, {v.shape}; "
            "split the heads into a dimension of their own"
        )
    for rule, sizes in (
        ("q must have at least one row, query and head", q.shape[:3]),
        ("k must have at least one row, key and head", k.shape[:3]),
    ):
        if 0 in sizes:
            faults.append(f"{rule}, got {sizes}; leave the call out where there is nothing to attend")
    if k.shape != v.shape:
        faults.append(f"k and v must have one shape, got {k.shape} and {v.shape}; pad the narrower")
    if q.shape[0] != k.shape[0]:
        faults.append(
            f"q and k must have the same batch, got {q.shape[0]} and {k.shape[0]}; broadcast one of them"
        )
    if q.shape[3] < 1:
        faults.append(f"head width must be >= 1, got {q.shape[3]}; our kernels take {KERNEL_WIDTHS}, XLA any")
    if q.shape[3] != k.shape[3]:
        faults.append(
            f"q and k must have one head width, got {q.shape[3]} and {k.shape[3]}; project to one width"
        )
    if k.shape[2] and q.shape[2] % k.shape[2]:
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
        faults.append(
            f"sinks must have one logit a query head, [{q.shape[2]}], got {sinks.shape}; reshape them"
        )
    if sinks is not None and not jnp.issubdtype(sinks.dtype, jnp.floating):
        faults.append(f"sinks must be floating point, got {sinks.dtype}; cast them to float32")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        faults.append(f"segment ids must be integers, got {segment_ids.dtype}; cast them to int32")
    if segment_ids is not None and segment_ids.shape != k.shape[:2]:
        faults.append(
            f"segment ids must have one id for each key, {k.shape[:2]}, got {segment_ids.shape}; give those of all keys"
        )
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
    if q_offset is not None:
        faults += _offset_faults(q_offset, q.shape[0], q.shape[1], k.shape[1], spec)
    if faults:
        raise ConfigError(*faults)


def _is_array(x: Any) -> bool:
    """Arrays of jax and NumPy, tracers, and shapes that stand for them."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _offset_faults(
    q_offset: Any, batch: int, num_queries: int, num_keys: int, spec: AttentionSpec
) -> list[str]:
    """What is wrong with an offset; its values are judged where they are known before tracing."""
    # bool is an int to Python and no row of anything.
    whole = isinstance(q_offset, int) and not isinstance(q_offset, bool)
    offset: Any = np.asarray(q_offset) if whole else q_offset
    if not _is_array(offset) or not jnp.issubdtype(offset.dtype, jnp.integer):
        of = f"an array of {offset.dtype}" if _is_array(offset) else f"{offset!r}"
        return [f"q_offset must be an integer or an array of integers, got {of}; cast it to int32"]
    if offset.shape not in ((), (batch,)):
        return [
            f"q_offset must be one integer, or one a batch row, [{batch}], got shape {offset.shape}; give one"
        ]
    faults = []
    if offset.shape and not spec.causal:
        faults.append(
            "one offset a row is for causal attention, got causal=False; use one offset for the batch"
        )
    known = isinstance(offset, np.ndarray | np.generic) or (
        isinstance(offset, jax.Array) and not isinstance(offset, Tracer) and offset.is_fully_addressable
    )
    if known:
        # Rows that are decoded together end apart: the queries behind a row's own pad it and see no key of theirs.
        last = num_keys - (1 if offset.shape else num_queries)
        values = np.asarray(offset)
        if ((values < 0) | (values > last)).any():
            faults.append(
                f"q_offset must lie in [0, {last}], got {values.tolist()}; every query needs its own key"
            )
    return faults
