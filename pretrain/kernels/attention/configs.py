"""Block sizes per chip and shape class (head width, packed or not): a literal table, no search at run time (hosts would
differ).

`tools/tune_attention.py` measures rows on the chip it runs on. A row marked unmeasured compiles for its chip and was
never timed.
"""

import dataclasses
import math
import re

from pretrain.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuBlocks:
    """Tiles of the TPU kernels: queries of one head by keys. `slice_k` keys are worked on at a time."""

    block_q: int
    block_k: int
    block_q_dq: int
    block_k_dq: int
    block_q_dkv: int
    block_k_dkv: int
    slice_k: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 8 or value & (value - 1):
                raise ConfigError(
                    f"{field.name} must be a power of two from 8 on, got {value!r}; use 128 to 2048"
                )

    @property
    def tiles(self) -> tuple[tuple[str, int, int], ...]:
        """(side, block_q, block_k) of the forward, dq and dk/dv work lists."""
        return (
            ("q", self.block_q, self.block_k),
            ("q", self.block_q_dq, self.block_k_dq),
            ("k", self.block_q_dkv, self.block_k_dkv),
        )

    def limited_to(self, length: int) -> "TpuBlocks":
        """The same tiles, halved until they are no longer than the row rounded up to a power of two."""
        limit = max(8, 1 << (length - 1).bit_length())
        return TpuBlocks(**{f.name: min(getattr(self, f.name), limit) for f in dataclasses.fields(self)})


# The longest side of a copy by TMA, and of a product by wgmma.
MAX_HOPPER_BLOCK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperBlocks:
    """Tiles of the Hopper kernels. The rows of an outer block belong to one warpgroup of two; stages buffer the rest.

    At head width 256 both warpgroups share one block of keys in dk/dv, see hopper.py.
    """

    block_q: int
    block_k: int
    stages: int
    block_q_dq: int
    block_k_dq: int
    block_q_dkv: int
    block_k_dkv: int
    stages_bwd: int

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rows = 64 if field.name in ("block_q", "block_q_dq", "block_k_dkv") else 32
            if type(value) is not int:
                faults.append(f"{field.name} must be an integer, got {value!r}; use 64, or 2 stages")
            elif field.name.startswith("block") and (value % rows or not rows <= value <= MAX_HOPPER_BLOCK):
                faults.append(
                    f"{field.name} must be a multiple of {rows} up to {MAX_HOPPER_BLOCK}, got {value}; "
                    "use 64, 128 or 256"
                )
            elif field.name.startswith("stages") and value < 2:
                faults.append(
                    f"{field.name} must be at least 2, got {value}; one tile is filled while one is used"
                )
        if faults:
            raise ConfigError(*faults)

    @property
    def multiple_of(self) -> tuple[int, int]:
        """What the numbers of queries and of keys must be multiples of."""
        queries = math.lcm(2 * self.block_q, 2 * self.block_q_dq, self.block_q_dkv)
        keys = math.lcm(self.block_k, self.block_k_dq, 2 * self.block_k_dkv)
        return queries, keys


def _tpu(forward: tuple[int, int], dq: tuple[int, int], dkv: tuple[int, int], slice_k: int) -> TpuBlocks:
    return TpuBlocks(
        block_q=forward[0],
        block_k=forward[1],
        block_q_dq=dq[0],
        block_k_dq=dq[1],
        block_q_dkv=dkv[0],
        block_k_dkv=dkv[1],
        slice_k=slice_k,
    )


# {(chip, H): {packed: blocks of X = G·block_q columns}}. Never timed: no TPU was at hand. Packed rows take smaller
# tiles, because a block that holds three documents computes three times what they need.
TPU_TABLE: dict[tuple[str, int], dict[bool, TpuBlocks]] = {
    ("v5e", 64): {False: _tpu((1024, 1024), (512, 1024), (512, 1024), 512), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v5e", 128): {False: _tpu((1024, 1024), (512, 1024), (512, 1024), 256), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v5e", 256): {False: _tpu((1024, 1024), (512, 512), (512, 512), 256), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v5p", 64): {False: _tpu((1024, 1024), (512, 1024), (512, 1024), 512), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v5p", 128): {False: _tpu((1024, 1024), (512, 1024), (512, 1024), 256), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v5p", 256): {False: _tpu((1024, 1024), (512, 512), (512, 512), 256), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v6e", 64): {False: _tpu((1024, 1024), (1024, 1024), (1024, 1024), 512), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v6e", 128): {False: _tpu((1024, 1024), (1024, 1024), (1024, 1024), 512), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
    ("v6e", 256): {False: _tpu((1024, 1024), (512, 1024), (512, 1024), 256), True: _tpu((512, 512), (512, 512), (512, 512), 256)},
}  # fmt: skip

# What jax calls the chips.
TPU_CHIPS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


# Bytes of vector memory that XLA lets one kernel use by default, as libtpu 0.0.42.1 says when it refuses one.
VMEM_LIMIT_BYTES = {"v5e": 16 << 20, "v5p": 16 << 20, "v6e": 32 << 20}
# Bytes of shared memory that a thread block may have on compute capability 9.0 (CUDA programming guide, table of
# technical specifications).
HOPPER_SHARED_BYTES = 227 * 1024


def tpu_blocks(chip: str, width: int, group: int, packed: bool) -> TpuBlocks:
    """The row of the table for a chip, one of the values of TPU_CHIPS; other widths take the nearest row.

    The table speaks of X = G·block_q columns: the more heads share keys, the fewer queries a tile holds.
    """
    blocks = TPU_TABLE[chip, 64 if width <= 64 else 128 if width <= 128 else 256][packed]
    shrink = 1 << (group - 1).bit_length()
    queries = ("block_q", "block_q_dq", "block_q_dkv")
    return dataclasses.replace(
        blocks, **{name: max(128, getattr(blocks, name) // shrink) for name in queries}
    )


def _hopper(
    forward: tuple[int, int, int], dq: tuple[int, int], dkv: tuple[int, int], stages_bwd: int
) -> HopperBlocks:
    return HopperBlocks(
        block_q=forward[0],
        block_k=forward[1],
        stages=forward[2],
        block_q_dq=dq[0],
        block_k_dq=dq[1],
        block_q_dkv=dkv[0],
        block_k_dkv=dkv[1],
        stages_bwd=stages_bwd,
    )


# {(chip, H): {packed: blocks}}, the fastest of those tried on an H200 with rows of 4096; an H100 ran with the same and was
# within 4 %. Deeper rings lose; longer tiles of keys gain 4 % for dq at 64 and spill at 128; ptxas reports spills in
# dk/dv only: 56 bytes at 128 and 44 at 256 (276 with 64 queries a tile, which is 4 % slower).
HOPPER_TABLE: dict[tuple[str, int], dict[bool, HopperBlocks]] = {
    ("H100", 64): {False: _hopper((64, 128, 3), (64, 128), (64, 64), 2), True: _hopper((64, 128, 3), (64, 64), (64, 64), 2)},
    ("H100", 128): {False: _hopper((64, 128, 2), (64, 64), (64, 64), 2), True: _hopper((64, 128, 2), (64, 64), (64, 64), 2)},
    ("H100", 256): {False: _hopper((64, 64, 2), (64, 32), (32, 64), 2), True: _hopper((64, 64, 2), (64, 32), (32, 64), 2)},
    ("H200", 64): {False: _hopper((64, 128, 3), (64, 128), (64, 64), 2), True: _hopper((64, 128, 3), (64, 64), (64, 64), 2)},
    ("H200", 128): {False: _hopper((64, 128, 2), (64, 64), (64, 64), 2), True: _hopper((64, 128, 2), (64, 64), (64, 64), 2)},
    ("H200", 256): {False: _hopper((64, 64, 2), (64, 32), (32, 64), 2), True: _hopper((64, 64, 2), (64, 32), (32, 64), 2)},
}  # fmt: skip


def hopper_chip(device_kind: str) -> str | None:
    """The chip of HOPPER_TABLE that CUDA calls this, such as "NVIDIA H100 80GB HBM3"; None for one without rows."""
    chips = {chip for chip, _ in HOPPER_TABLE}
    return next((word for word in re.findall(r"[A-Za-z0-9]+", device_kind) if word in chips), None)


def hopper_blocks(width: int, packed: bool, device_kind: str = "H100") -> HopperBlocks:
    """The row of the table for head width 64, 128 or 256. A chip without rows of its own takes those of the H100."""
    return HOPPER_TABLE[hopper_chip(device_kind) or "H100", width][packed]
