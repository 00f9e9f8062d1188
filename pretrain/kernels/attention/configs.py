"""Block sizes per chip and shape class: a literal table, no search at run time (hosts would differ).

Rows come from `tools/tune_attention.py`. A row marked unmeasured compiles for its chip (the slow tests show it) and
was never timed.
"""

import dataclasses

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
            if value < 8 or value & (value - 1):
                raise ConfigError(f"{field.name} must be a power of two from 8 on, got {value}; use 128 to 2048")

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
