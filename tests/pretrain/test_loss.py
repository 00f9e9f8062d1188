"""The chunked loss is the dense one, in value and gradient, for any size of a chunk."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.loss import LossConfig, cross_entropy, token_logprobs

B, T, D, V = 2, 7, 6, 11
Z_WEIGHT = 0.03
# Of 14 tokens: one a chunk, chunks that do not divide, that do, one for all, larger than all.
CHUNKS = (1, 4, 7, 14, 1024)


def inputs(scale=1.0):
    """Hidden vectors, head, targets, weights (0, 1 and between, the first row mostly 0), sources."""
    rng = np.random.default_rng(0)
    weights_BT = rng.choice([0.0, 1.0, 0.25], (B, T)).astype(np.float32)
    weights_BT[0, :4] = 0.0
    return (
        scale * rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        weights_BT,
        np.array([2, 0], np.int32),
    )


def dense(hidden_BTD, head_DV, targets_BT, softcap):
    """nll and log-sum-exp of every token from all logits at once."""
    logits_BTV = hidden_BTD @ head_DV
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    lse_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
    return lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0], lse_BT


def in_float64(function, *arrays):
    """Value, gradients of the first two arrays, and what else `function` returns, in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) if a.dtype == np.float32 else jnp.asarray(a) for a in arrays]
        return jax.device_get(jax.value_and_grad(function, (0, 1), has_aux=True)(*wide))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_chunked_loss_is_the_dense_one_in_value_and_gradient(chunk_tokens, softcap):
    """The factor before the objective shows that a cotangent other than one is passed on."""
    hidden, head, targets, weights, source = inputs()

    def ours(hidden, head):
        sums = cross_entropy(
            hidden, head, targets, weights, source, num_sources=3, z_weight=Z_WEIGHT, chunk_tokens=chunk_tokens,
            softcap=softcap,
        )  # fmt: skip
        return 1.7 * sums.objective, sums

    def plain(hidden, head, targets, weights):
        nll_BT, lse_BT = dense(hidden, head, targets, softcap)
        return 1.7 * jnp.sum(weights * (nll_BT + Z_WEIGHT * lse_BT**2)), (nll_BT, lse_BT)

    (value, sums), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    (wanted, (nll_BT, lse_BT)), wanted_gradients = in_float64(plain, hidden, head, targets, weights)
    # Rounding of float32 over 14 tokens and 11 columns.
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    by_row = (weights * nll_BT).sum(axis=1)
    np.testing.assert_allclose(sums.nll, by_row.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z, (weights * lse_BT**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.objective, value / 1.7, rtol=1e-6)
    np.testing.assert_allclose(sums.nll_by_source, [by_row[1], 0.0, by_row[0]], rtol=1e-5)
    assert sums.weight == weights.sum()
    np.testing.assert_array_equal(sums.weight_by_source, [weights[1].sum(), 0.0, weights[0].sum()])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probabilities_are_the_dense_ones_and_take_any_cotangent(softcap):
    hidden, head, targets, _, _ = inputs()
    cotangent_BT = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def ours(hidden, head):
        logprobs_BT = token_logprobs(hidden, head, targets, chunk_tokens=4, softcap=softcap)
        return jnp.sum(cotangent_BT * logprobs_BT), logprobs_BT

    def plain(hidden, head, targets, cotangent):
        nll_BT, _ = dense(hidden, head, targets, softcap)
        return -jnp.sum(cotangent * nll_BT), -nll_BT

    (_, logprobs), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    (_, wanted), wanted_gradients = in_float64(plain, hidden, head, targets, cotangent_BT)
    np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-5)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_logits_beyond_the_range_of_exp_lose_nothing():
    """At a thousandfold scale a sum of exponentials without its largest taken out would be infinite."""
    hidden, head, targets, weights, source = inputs(scale=1000.0)
    sums = jax.jit(
        lambda: cross_entropy(hidden, head, targets, weights, source, num_sources=3, chunk_tokens=4)
    )()
    logits_BTV = hidden.astype(np.float64) @ head
    top_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    lse_BT = top_BT1[..., 0] + np.log(np.exp(logits_BTV - top_BT1).sum(axis=-1))
    nll_BT = lse_BT - np.take_along_axis(logits_BTV, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sums.nll, (weights * nll_BT).sum(), rtol=1e-5)


def test_only_the_objective_carries_a_gradient_and_weights_get_none():
    hidden, head, targets, weights, source = inputs()

    def logged(hidden, head, weights):
        sums = cross_entropy(hidden, head, targets, weights, source, num_sources=3, z_weight=Z_WEIGHT)
        return sums.nll + sums.z + jnp.sum(sums.nll_by_source), sums.objective

    gradient = jax.jit(jax.grad(lambda *a: logged(*a)[0], (0, 1, 2)))(hidden, head, weights)
    assert not any(np.any(g) for g in gradient)
    assert not np.any(jax.jit(jax.grad(lambda w: logged(hidden, head, w)[1]))(weights))


def test_narrow_hidden_vectors_give_gradients_in_the_types_of_their_arrays():
    """The head rests in float32 and is multiplied in bfloat16; its gradient is summed in float32 over chunks."""
    hidden, head, targets, weights, source = inputs()

    def objective(hidden, head):
        return cross_entropy(
            hidden, head, targets, weights, source, num_sources=3, z_weight=Z_WEIGHT, chunk_tokens=4
        ).objective

    gradient = jax.jit(jax.value_and_grad(objective, (0, 1)))
    value, (d_hidden, d_head) = gradient(hidden.astype(jnp.bfloat16), head)
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = [np.asarray(x.astype(jnp.bfloat16), np.float32) for x in (hidden, head)]
    wanted, (wanted_hidden, wanted_head) = gradient(*rounded)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)  # products of bfloat16 numbers are exact in float32
    # The cotangent of the logits is rounded to bfloat16, 8 bits.
    np.testing.assert_allclose(d_hidden.astype(np.float32), wanted_hidden, rtol=0, atol=2e-2)
    np.testing.assert_allclose(d_head, wanted_head, rtol=0, atol=2e-2)


def sizes(program):
    """Elements of every array in the text of a program, inner ones included."""
    for shape in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program):
        yield math.prod(map(int, shape.split(",")))


def test_the_logits_of_all_tokens_never_exist():
    rows, time, width, vocab, chunk = 4, 16, 4, 64, 8
    hidden, head = np.ones((rows, time, width), np.float32), np.ones((width, vocab), np.float32)
    targets, weights = np.zeros((rows, time), np.int32), np.ones((rows, time), np.float32)
    source = np.zeros(rows, np.int32)

    def objective(hidden, head, chunk_tokens):
        return cross_entropy(
            hidden, head, targets, weights, source, num_sources=1, chunk_tokens=chunk_tokens
        ).objective

    def largest(chunk_tokens):
        program = jax.make_jaxpr(jax.value_and_grad(objective, (0, 1)), static_argnums=2)
        return max(sizes(str(program(hidden, head, chunk_tokens))))

    assert largest(chunk) == chunk * vocab
    assert largest(rows * time) == rows * time * vocab  # the search finds them where they do exist


def test_faults_of_the_config_are_named():
    with pytest.raises(ConfigError, match=r"z_weight must be at least 0, got -0.1"):
        LossConfig(z_weight=-0.1)
    with pytest.raises(ConfigError, match=r"chunk_tokens must be positive, got 0"):
        LossConfig(chunk_tokens=0)
