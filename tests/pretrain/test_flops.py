"""Laws of counting: parameters are those of the model, FLOPs those of the program, three utilizations by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain import compat, flops
from pretrain.config import ConfigError
from pretrain.kernels.attention import hopper
from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.configs import hopper_blocks
from pretrain.kernels.attention.plan import AttentionSpec, make_plan
from pretrain.loss import cross_entropy
from pretrain.model.moe import MoeConfig
from pretrain.model.transformer import LayerKind, ModelConfig, abstract_params, forward, head_DV

VOCAB = 50
DENSE = ModelConfig(
    num_layers=3, width=24, num_heads=4, num_kv_heads=2, head_width=8, hidden_width=40, dtype="float32",
    attention_impl="reference",
)  # fmt: skip
EXPERTS = dataclasses.replace(DENSE, moe=MoeConfig(num_experts=4, num_active=2))
VARIANTS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tied_head=True, qk_norm=False),
    "biased": dataclasses.replace(DENSE, qkv_bias=True, post_norms=True),
    "experts": EXPERTS,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_as_they_are_made(name):
    model = VARIANTS[name]
    params = abstract_params(model, VOCAB)
    count = flops.count_params(model, VOCAB)
    assert count.total == flops.params_count(params)
    assert count.embedding == VOCAB * 24
    assert count.head == (0 if model.tied_head else VOCAB * 24)


def gradient(model: ModelConfig, rows: int, length: int):
    """(function, arguments) of loss and gradient on shapes."""
    ids = jax.ShapeDtypeStruct((rows, length), "int32")
    weights = jax.ShapeDtypeStruct((rows, length), "float32")

    def loss(params, tokens, positions, weights):
        hidden = forward(params, model, tokens, positions, None)
        source = jnp.zeros(rows, jnp.int32)
        sums = cross_entropy(hidden, head_DV(params, model), tokens, weights, source, num_sources=1)
        return sums.objective

    return jax.value_and_grad(loss), (abstract_params(model, VOCAB), ids, ids, weights)


@pytest.mark.parametrize("name", ["dense", "tied", "experts"])
def test_the_walk_finds_six_flops_a_matmul_parameter_and_the_whole_square_of_the_reference(name):
    model, rows, length = VARIANTS[name], 2, 16
    function, arguments = gradient(model, rows, length)
    matmul = 6 * flops.count_params(model, VOCAB).matmul * rows * length
    square = model.num_layers * 12 * length**2 * 4 * 8 * rows
    weighted_sums = 0
    if model.moe is not None:  # the weighted sum over the experts of a token is a small matmul of its own
        weighted_sums = 3 * model.num_layers * 2 * rows * length * model.moe.num_active * 24
    assert flops.executed_flops(function, *arguments).known == matmul + square + weighted_sums


def test_recomputation_is_one_more_forward_pass_of_the_layers_or_of_the_scores_alone():
    """Less the last matmul of a layer, whose result no gradient asks for."""
    rows, length = 2, 16
    plain, full, products = (
        flops.executed_flops(
            *(lambda f, a: (f, *a))(*gradient(dataclasses.replace(DENSE, remat=r), rows, length))
        ).known
        for r in ("none", "full", "save_products")
    )
    head = VOCAB * 24
    blocks = flops.count_params(DENSE, VOCAB).matmul - head
    attention = DENSE.num_layers * 4 * length**2 * 4 * 8 * rows
    last = DENSE.num_layers * 40 * 24
    assert full - plain == 2 * (blocks - last) * rows * length + attention
    assert products - plain == attention  # nothing names the result of the dense path


def test_a_scan_counts_its_length_and_an_unknown_loop_is_refused():
    x = jax.ShapeDtypeStruct((4, 4), "float32")
    times = functools.partial(jax.lax.scan, lambda c, _: (c @ c, None), length=7)
    assert flops.executed_flops(lambda x: times(x)[0], x).known == 7 * 2 * 4**3
    endless = functools.partial(jax.lax.while_loop, lambda c: c[0, 0] < 1, lambda c: c @ c)
    with pytest.raises(NotImplementedError, match="use scan"):
        flops.executed_flops(endless, x)


def on_hopper(q, k):
    plan, blocks = make_plan(None, AttentionSpec(), seq_len=256, batch=2), hopper_blocks(128, packed=False)
    ranges = hopper.tile_ranges(plan, blocks)
    return hopper.hopper_attention(q, k, k, plan.k_lo_BT, ranges, None, AttentionSpec(), q_offset=0)[0]


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(
            on_hopper,
            marks=pytest.mark.skipif(
                bool(compat.mosaic_gpu_reasons()), reason="; ".join(compat.mosaic_gpu_reasons())
            ),
        ),
        lambda q, k: attention(q, k, k, impl="tpu_interpret"),
    ],
)
def test_our_kernels_count_the_keys_that_are_seen(attend):
    """They counted as nothing once, or as unknown. Forward 2, dq 3, dk and dv 4 matmuls, each 2 H FLOPs a pair and head."""
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (4, 2))

    def gradients(q, k):
        o, transpose = jax.vjp(attend, q, k)
        return transpose(o)

    def three_layers(q, k):
        return jax.lax.scan(lambda q, _: (gradients(q, k)[0], None), q, length=3)[0]

    executed = flops.executed_flops(three_layers, q, k)
    assert executed.known == 0
    assert executed.total(keys_per_query=100) == 3 * 9 * 2 * 128 * (2 * 256 * 4) * 100


def test_flops_per_token_by_hand():
    # 6 N plus, a layer, 6 N H T: half of the square, forward and backward.
    per_layer = 24 * 8 * (4 + 2 + 2 + 4) + 3 * 24 * 40
    assert flops.flops_per_token(DENSE, VOCAB, 100) == 6 * (3 * per_layer + 24 * VOCAB) + 3 * 6 * 32 * 100
    windowed = dataclasses.replace(DENSE, layer_pattern=(LayerKind(window=10), LayerKind(), LayerKind()))
    less = flops.flops_per_token(DENSE, VOCAB, 100) - flops.flops_per_token(windowed, VOCAB, 100)
    assert less == pytest.approx(12 * 32 * (100 / 2 - (10 * 100 - 10**2 / 2) / 100))


@pytest.mark.parametrize("window", [None, 3])
def test_packed_flops_count_the_pairs_that_documents_allow(window):
    model = dataclasses.replace(DENSE, layer_pattern=(LayerKind(window=window), LayerKind()))
    lengths = [5, 1, 7]
    pairs = 0
    for layer in range(3):
        reach = model.kind(layer).window or 100
        pairs += sum(min(t + 1, reach) for n in lengths for t in range(n))
    expected = 6 * flops.count_params(model, VOCAB).matmul * 13 + 12 * 32 * pairs
    assert flops.packed_flops(model, VOCAB, lengths) == expected

    segments = np.array([[1] * 5 + [2] + [0] * 2, [1] * 7 + [0]], np.int32)
    positions = np.array([[*range(5), 0, 0, 0], [*range(7), 0]], np.int32)
    counts = flops.packed_counts(model, segments, positions)
    assert (counts["packed_tokens"], counts["packed_pairs"]) == (13, pairs)
    of_counts = flops.flops_of_counts(
        model, VOCAB, tokens=float(counts["packed_tokens"]), pairs=float(counts["packed_pairs"])
    )
    assert of_counts == expected


def test_utilizations_are_flops_over_seconds_over_peak():
    per_token = flops.flops_per_token(DENSE, VOCAB, 64)
    assert flops.mfu(DENSE, VOCAB, 64, tokens_per_second=10, peak_flops=4 * per_token) == pytest.approx(2.5)
    assert flops.hfu(8.0, step_seconds=2, peak_flops=16) == 0.25


def test_only_active_experts_are_matmul_parameters():
    count = flops.count_params(EXPERTS, VOCAB)
    idle = 3 * 2 * 3 * 24 * 40  # layers, idle experts, three matrices
    vectors = 3 * (2 * 24 + 2 * 8 + 4) + 24
    assert count.total - count.embedding - count.matmul == idle + vectors


def test_peaks_are_those_of_the_data_sheets():
    assert flops.data_sheet_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.data_sheet_flops("TPU v5 lite") == 197e12
    with pytest.raises(ConfigError, match="device kind must be one of"):
        flops.data_sheet_flops("Abacus")
