"""Element k of a source -> row of its table: a new random permutation for every epoch, by grain.

A permutation is computed and not stored, so any element of any epoch costs the same.
"""

import hashlib

import grain.python as grain

from pretrain.config import ConfigError, stable_seed

# grain permutes 32-bit indices.
_MAX_ROWS = 2**31


class RowOrder:
    """The order in which the rows of one table are read, epoch after epoch."""

    def __init__(self, num_rows: int, *, source: str, seed: int):
        """`source` and `seed` decide the permutations.

        Raises:
          ConfigError: more rows than a permutation can have.
        """
        if num_rows >= _MAX_ROWS:
            raise ConfigError(
                f"a table must have fewer than 2**31 rows, {source!r} has {num_rows}; split the source"
            )
        # A hash, because epochs count the seed up: neighboring seeds would share permutations an epoch apart.
        rows_seed = stable_seed("rows", seed, source) % 2**31
        self._rows = grain.MapDataset.range(num_rows).shuffle(seed=rows_seed).repeat() if num_rows else None

    def row(self, element: int) -> int:
        """The row that is read as number `element`, from 0."""
        assert self._rows is not None, "a table without rows has no elements"
        return int(self._rows[element])


def order_fingerprint() -> str:
    """Changes when grain's permutations do; runs then refuse to resume instead of changing their data silently."""
    order = RowOrder(1000, source="probe", seed=0)
    return hashlib.sha256(repr([order.row(k) for k in range(0, 3000, 13)]).encode()).hexdigest()
