"""Cells: what a run was (parameters, tokens, FLOPs) and the loss it reached; plain numbers for the fits.

N is the number of parameters that take part in a matmul for each token (blocks and head), D the number of training
tokens, U how many of them are different, C the FLOPs of flops.flops_per_token times D. At small N the head and the
attention are a large share of C, so C = 6 N D would be wrong.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

LADDER, HELD_OUT, REPEAT = "ladder", "held_out", "repeat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `role` says what it is for: ladder, held_out, repeat, or the name of a changed arm."""

    name: str
    role: str
    params: int
    params_total: int
    tokens: int
    unique_tokens: int
    flops: float
    budget_flops: float
    seed: int
    loss: float  # nats per held-out token
    seconds: float = 0.0
    skipped_steps: int = 0  # batches read and not learned from (health.py); part of `tokens` all the same

    @property
    def epochs(self) -> float:
        """How often each training token is read."""
        return self.tokens / self.unique_tokens


@dataclasses.dataclass(frozen=True)
class Columns:
    """Cells as arrays of one length: params N, tokens D, different tokens U, loss."""

    params: np.ndarray
    tokens: np.ndarray
    unique: np.ndarray
    loss: np.ndarray

    def __post_init__(self):
        lengths = {len(a) for a in (self.params, self.tokens, self.unique, self.loss)}
        if len(lengths) != 1:
            raise ValueError(f"columns must have one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: np.ndarray) -> "Columns":
        """The same columns at other rows."""
        return Columns(self.params[index], self.tokens[index], self.unique[index], self.loss[index])

    def with_loss(self, loss: np.ndarray) -> "Columns":
        """The same design with other losses."""
        return Columns(self.params, self.tokens, self.unique, loss)


def columns(cells: Iterable[Cell]) -> Columns:
    """The cells as arrays of float64. A repetition limits U; a run within one epoch has U = D."""
    chosen: Sequence[Cell] = list(cells)
    return Columns(
        params=np.array([c.params for c in chosen], float),
        tokens=np.array([c.tokens for c in chosen], float),
        unique=np.array([min(c.unique_tokens, c.tokens) for c in chosen], float),
        loss=np.array([c.loss for c in chosen], float),
    )
