"""A batch of packed rows, as the step reads it.

Letters: B rows, T targets in a row, T1 = T + 1 tokens.
"""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_BT1", "segment_ids_BT1", "positions_BT1", "weights_BT", "source_B"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of T + 1 tokens: inputs are [:, :-1], targets [:, 1:]; numpy on the host, jax.Array on devices."""

    tokens_BT1: Int[Array, "B T1"]
    segment_ids_BT1: Int[Array, "B T1"]  # 1, 2, .. per document, 0 on padding
    positions_BT1: Int[Array, "B T1"]  # restart in every document
    weights_BT: Float[Array, "B T"]  # of target t + 1
    source_B: Int[Array, " B"]  # index into the list of source labels
