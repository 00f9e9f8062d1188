"""Held-out bits per byte: exact for a known model, independent of batching, and refused when bytes and rows differ."""

import math
import types

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.evals.perplexity import bits_per_byte, heldout_score

LABELS = ["a", "unused", "b"]
ROWS = [(0, 64.0, 8.0), (0, 32.0, 8.0), (2, 10.0, 5.0), (0, 0.0, 0.0), (2, 30.0, 5.0)]  # source, nats, tokens


def eval_step(params, rows):
    """Sums over (source, nats, weight) rows, scaled by the parameters."""
    nats, weight = np.zeros(3, np.float32), np.zeros(3, np.float32)
    for source, row_nats, row_weight in rows:
        nats[source] += params * row_nats
        weight[source] += row_weight
    return types.SimpleNamespace(nll_by_source=nats, weight_by_source=weight)


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_the_score_is_bits_over_bytes_however_rows_are_batched(batch_rows):
    batches = [ROWS[i : i + batch_rows] for i in range(0, len(ROWS), batch_rows)]
    score = heldout_score(eval_step, 0.5, batches, heldout_bytes={"a": 24, "b": 10}, labels=LABELS)
    assert score.bits_per_byte_by_source == pytest.approx(
        {"a": 48 / math.log(2) / 24, "b": 20 / math.log(2) / 10}
    )
    assert score.bits_per_byte == pytest.approx(68 / math.log(2) / 34)
    assert score.tokens == 26
    assert score.nats_per_token == pytest.approx(68 / 26)
    assert score.perplexity == pytest.approx(math.exp(68 / 26))


def test_a_uniform_model_over_bytes_scores_eight_bits():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)


def test_sums_are_added_in_float64():
    """2^24 + 1 is not a float32: adding ones to it one by one would lose them all."""
    ones = types.SimpleNamespace(nll_by_source=np.float32([1.0]), weight_by_source=np.float32([1.0]))
    many = types.SimpleNamespace(nll_by_source=np.float32([2.0**24]), weight_by_source=np.float32([2.0**24]))
    score = heldout_score(lambda _, b: b, None, [many, *[ones] * 7], heldout_bytes={"a": 1}, labels=["a"])
    assert score.tokens == 2**24 + 7
    assert score.bits_per_byte * math.log(2) == 2**24 + 7


def test_rows_and_bytes_of_different_sources_are_refused():
    with pytest.raises(AssertionError, match=r"rows of \['a', 'b'\] and bytes of \['a'\]"):
        heldout_score(eval_step, 1.0, [ROWS], heldout_bytes={"a": 24}, labels=LABELS)
    with pytest.raises(AssertionError, match=r"rows of \[\] and bytes of \['a'\]"):
        heldout_score(eval_step, 1.0, [], heldout_bytes={"a": 24, "b": 0}, labels=LABELS)


def test_no_heldout_text_is_bad_input():
    with pytest.raises(ConfigError, match="evaluation needs held-out text, got 0 bytes"):
        heldout_score(eval_step, 1.0, [], heldout_bytes={"a": 0}, labels=LABELS)
