"""Held-out bits per byte, by source: the summed nats of held-out rows over the exact bytes behind them.

Bits per byte compares models with different tokenizers, which nats per token does not. The byte count comes
from the text itself, so a tokenizer cannot flatter the score.

Shapes: S sources (the global label list), B rows, T targets in a row.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pretrain.config import ConfigError


class EvalSums(Protocol):
    """What an evaluation step returns for a batch; `pretrain.loss.LossSums` is one."""

    @property
    def nll_by_source(self) -> Any: ...  # [S], nats

    @property
    def weight_by_source(self) -> Any: ...  # [S], scored tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutScore:
    """The score of one set of parameters on held-out text."""

    bits_per_byte: float
    bits_per_byte_by_source: dict[str, float]
    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Per token, so comparable only between models that share a tokenizer."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


def heldout_score(
    eval_step: Callable[[Any, Any], EvalSums],
    params: Any,
    batches: Iterable[Any],
    *,
    heldout_bytes: Mapping[str, int],
    labels: Sequence[str],
) -> HeldoutScore:
    """Score `params` on every held-out batch.

    Sums are read from the device once, at the end, and added in float64: the result depends on neither the
    number of rows in a batch nor, beyond rounding, on their order.

    Args:
      eval_step: (params, batch) -> sums of nats and weights by source.
      batches: all held-out rows, once; padding rows have weight zero.
      heldout_bytes: UTF-8 bytes of the text behind those rows, by source.
      labels: the names that the S sums stand for.

    Raises:
      ConfigError: there is no held-out text.
      AssertionError: rows and byte counts do not belong together.
    """
    num_bytes = {label: count for label, count in heldout_bytes.items() if count}
    if not num_bytes:
        raise ConfigError("evaluation needs held-out text, got 0 bytes; raise data.heldout_percent")
    # Keeping the (tiny) device arrays lets the host dispatch all batches before it waits for one.
    sums = [eval_step(params, batch) for batch in batches]
    nats_S = _total([s.nll_by_source for s in sums], len(labels))
    weight_S = _total([s.weight_by_source for s in sums], len(labels))
    scored = {label for label, weight in zip(labels, weight_S, strict=True) if weight > 0}
    assert scored == set(num_bytes), (
        f"held-out rows and held-out bytes must name the same sources, "
        f"got rows of {sorted(scored)} and bytes of {sorted(num_bytes)}"
    )
    nats_of = dict(zip(labels, nats_S.tolist(), strict=True))
    return HeldoutScore(
        bits_per_byte=bits_per_byte(nats_S.sum(), sum(num_bytes.values())),
        bits_per_byte_by_source={
            label: bits_per_byte(nats_of[label], count) for label, count in num_bytes.items()
        },
        nats_per_token=float(nats_S.sum() / weight_S.sum()),
        tokens=round(float(weight_S.sum())),
    )


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed nats over bytes, in bits."""
    return float(nats) / (math.log(2) * num_bytes)


def _total(values: Sequence[Any], num_sources: int) -> np.ndarray:
    total_S = np.zeros(num_sources)
    for value_S in values:
        total_S += np.asarray(value_S, np.float64)
    return total_S
