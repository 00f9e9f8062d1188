"""Measures block sizes of our attention kernels on this chip and rewrites its rows of the literal table, no other chip's.

    python -m tools.tune_attention                        an H100 or a TPU: sweep, print, rewrite configs.py
    python -m tools.tune_attention size=smoke table=COPY  the harness on a CPU, into a copy of configs.py

At most `max_configs` candidates a width and packing, the same inputs for all, in turn. A candidate whose gradients
are wrong, or that does not compile, is dropped with the reason. Forward and backward blocks are chosen apart.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from pretrain.config import ConfigError, apply_overrides
from pretrain.kernels.attention import configs
from pretrain.kernels.attention.configs import HopperBlocks, TpuBlocks
from pretrain.rundir import write_atomic
from tools import bench_attention as bench

TABLE = Path(configs.__file__)
Blocks = TpuBlocks | HopperBlocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    size: str = "h100"  # of tools/bench_attention.py
    table: str = str(TABLE)  # the file that is rewritten
    length: int | None = None  # tokens a row; the first length of the size by default
    max_configs: int = 24
    samples: int = 10

    def __post_init__(self):
        faults = []
        if self.size not in bench.SIZES:
            faults.append(f"size must be one of {', '.join(bench.SIZES)}, got {self.size!r}")
        if not Path(self.table).is_file():
            faults.append(f"table must be an existing file like configs.py, got {self.table!r}")
        if not 1 <= self.max_configs <= 24:
            faults.append(
                f"max_configs must lie in [1, 24], got {self.max_configs}; each takes seconds to compile"
            )
        if faults:
            raise ConfigError(*faults)


# --- candidates --------------------------------------------------------------------------------------


def hopper_candidates(width: int) -> Iterator[HopperBlocks]:
    """Forward tiles beside backward tiles that have nothing to do with them: the two are chosen apart."""
    forward = {64: [(64, 128, 3), (64, 256, 2), (64, 128, 2), (64, 128, 4)],
               128: [(64, 128, 2), (64, 128, 3), (64, 64, 4), (64, 64, 3)],
               256: [(64, 64, 2), (64, 32, 4), (64, 32, 3)]}[width]  # fmt: skip
    # (queries, keys) of dq, of dk/dv, stages
    backward = {64: itertools.product([(64, 64), (64, 128)], [(64, 64), (128, 64)], [2, 3]),
                128: itertools.product([(64, 64), (64, 128)], [(64, 64)], [2, 3]),
                256: itertools.product([(64, 32)], [(32, 64), (64, 64)], [2, 3])}[width]  # fmt: skip
    backward = list(backward)
    for i in range(max(len(forward), len(backward))):
        block_q, block_k, stages = forward[min(i, len(forward) - 1)]
        (q_dq, k_dq), (q_dkv, k_dkv), stages_bwd = backward[min(i, len(backward) - 1)]
        yield HopperBlocks(
            block_q=block_q, block_k=block_k, stages=stages, block_q_dq=q_dq, block_k_dq=k_dq, block_q_dkv=q_dkv,
            block_k_dkv=k_dkv, stages_bwd=stages_bwd,
        )  # fmt: skip


def tpu_candidates(sizes: Sequence[int], slices: Sequence[int]) -> Iterator[TpuBlocks]:
    """Square and flat tiles, the same for all three kernels: they are chosen apart afterwards."""
    for block_q, block_k, slice_k in itertools.product(sizes, sizes, slices):
        if slice_k <= block_k:
            yield TpuBlocks(
                block_q=block_q, block_k=block_k, block_q_dq=block_q, block_k_dq=block_k, block_q_dkv=block_q,
                block_k_dkv=block_k, slice_k=slice_k,
            )  # fmt: skip


def candidates(impl: str, width: int) -> list[Blocks]:
    """What is tried, in an order that spreads over the kinds when it is cut short."""
    match impl:
        case "pallas_hopper":
            return list(hopper_candidates(width))
        case "pallas_tpu":
            return list(tpu_candidates((512, 1024, 256), (512, 256)))
        case "tpu_interpret":
            return list(tpu_candidates((32, 64), (32,)))
    raise AssertionError(impl)


# --- measuring ---------------------------------------------------------------------------------------


def measure(
    impl: str, width: int, packing: str, options: Options, log: Callable[[str], None]
) -> Blocks | None:
    """The best blocks of a shape class, None where no candidate is right."""
    size = bench.SIZES[options.size]
    length = options.length or size.lengths[0]
    rows = bench.rows_of(size, length)
    shapes = bench.shapes_of(size, width, length, rows)
    timing = bench.Options(size=options.size, samples=options.samples)
    jobs, of_name = {}, {}
    case = bench.Case(direction="fwd", width=width, length=length, packing=packing)
    plan = bench.plan_of(size, case, rows)
    for blocks in candidates(impl, width)[: options.max_configs]:
        entrant = bench.implementation(impl, shapes, blocks)
        if isinstance(entrant, str):
            log(f"{short(blocks)}: {entrant}")
            continue
        jobs[short(blocks)], of_name[short(blocks)] = (entrant, shapes, plan), blocks
    functions = {}
    for name, programs in bench.compiled(jobs).items():
        if isinstance(programs, str):
            log(f"{name} {programs}")
            continue
        errors = bench.errors_against_float64(jobs[name][0], size, width, packing, seed=0)
        if any(not error <= bench.TOLERANCE[size.dtype][key] for key, error in errors.items()):
            log(f"{name}: wrong: {errors}")
            continue
        functions[name] = jobs[name][0], programs
    if not functions:
        return None
    best = {}
    for direction in bench.DIRECTIONS:
        rows = bench.run_case(size, dataclasses.replace(case, direction=direction), functions, 1.0, timing)
        rows.sort(key=lambda row: row["median_ms"])
        for row in rows[:5]:
            log(
                f"{direction} h{width} {packing} {row['impl']}: {row['median_ms']:.3f} ms, {row['tflops']:.1f} TFLOP/s"
            )
        best[direction] = of_name[rows[0]["impl"]]
    return joined(best["fwd"], best["bwd"])


def joined(forward: Blocks, backward: Blocks) -> Blocks:
    """Forward tiles of one candidate, backward tiles of another."""
    names = ("block_q", "block_k", "stages", "slice_k")
    return dataclasses.replace(backward, **{n: getattr(forward, n) for n in names if hasattr(forward, n)})


def short(blocks: Blocks) -> str:
    return "/".join(str(value) for value in dataclasses.astuple(blocks))


# --- the table ---------------------------------------------------------------------------------------


def literal(blocks: Blocks) -> str:
    """A row as configs.py writes it."""
    b = blocks
    if isinstance(b, HopperBlocks):
        return (f"_hopper(({b.block_q}, {b.block_k}, {b.stages}), ({b.block_q_dq}, {b.block_k_dq}), "
                f"({b.block_q_dkv}, {b.block_k_dkv}), {b.stages_bwd})")  # fmt: skip
    return (f"_tpu(({b.block_q}, {b.block_k}), ({b.block_q_dq}, {b.block_k_dq}), "
            f"({b.block_q_dkv}, {b.block_k_dkv}), {b.slice_k})")  # fmt: skip


def chip_of(impl: str, device_kind: str) -> str:
    """The chip that the tables know this device as.

    Raises:
      ConfigError: it has no rows.
    """
    if impl == "tpu_interpret":  # no chip: into a copy, as the nearest row
        return "v5e"
    if impl == "pallas_hopper":
        chip, table = configs.hopper_chip(device_kind), "HOPPER_TABLE"
        known = ", ".join(sorted({name for name, _ in configs.HOPPER_TABLE}))
    else:
        chip, table = configs.TPU_CHIPS.get(device_kind), "TPU_CHIPS and its rows to TPU_TABLE"
        known = ", ".join(configs.TPU_CHIPS)
    if chip is None:
        raise ConfigError(f"the chip must be one of {known}, got {device_kind}; add it to {table}")
    return chip


def rewritten(text: str, chip: str, width: int, rows: dict[bool, Blocks]) -> str:
    """The source of configs.py with the row of a chip and head width replaced.

    Raises:
      ConfigError: there is no such row.
    """
    key = f'("{chip}", {width})'
    row = f"    {key}: {{False: {literal(rows[False])}, True: {literal(rows[True])}}},"
    out, count = re.subn(
        rf"^    {re.escape(key)}: \{{False: .*\}},$", lambda _: row, text, flags=re.MULTILINE
    )
    if count != 1:
        raise ConfigError(f"the table must have one row {key}, found {count}; add it first")
    return out


def main(argv: Sequence[str], log: Callable[[str], None] = print) -> int:
    """Sweep what this chip runs and rewrite its rows; exit code 2 on bad input."""
    try:
        options = apply_overrides(Options(), argv)
        device, path = jax.devices()[0], Path(options.table)
        size = bench.SIZES[options.size]
        impl = next(name for name in size.implementations if name in bench.OURS)
        if impl == "tpu_interpret" and path.resolve() == TABLE.resolve():
            raise ConfigError(
                f"table must be a copy where kernels are interpreted, got {path}; copy configs.py and name the copy"
            )
        chip = chip_of(impl, device.device_kind)
        for width in size.widths:
            rows = {}
            for packing in bench.PACKINGS:
                blocks = measure(impl, width, packing, options, log)
                if blocks is None:
                    raise ConfigError(
                        f"{impl} must run here at head width {width}, and no candidate does; see above"
                    )
                rows[packing == "packed"] = blocks
            write_atomic(path, rewritten(path.read_text(), chip, max(64, width), rows))
            log(f"{path}: {chip}, head width {width}: {rows}")
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
