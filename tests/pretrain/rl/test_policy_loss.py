"""The gradient of every surrogate is that of a plain float64 program on fixed samples."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.transformer import ModelConfig, forward, init_params, logits
from pretrain.rl.advantage import ESTIMATORS, advantages
from pretrain.rl.policy_loss import PolicyLossConfig, SampleBatch, policy_loss
from pretrain.rl.rollout import _normalized

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=32, dtype="float32"
)
B, T, V, MAX_NEW = 4, 10, 23, 6


def samples(normalize, seed=0, advantage_B=(1.5, -0.7, 0.4, 0.0)):
    """Four samples of unequal length; the last one was dropped."""
    rng = np.random.default_rng(seed)
    weights_BT = np.zeros((B, T), np.float32)
    for b, (first, last) in enumerate([(3, 9), (2, 4), (4, 10), (3, 6)]):
        weights_BT[b, first:last] = 1.0
    kept_B = np.array([True, True, True, False])
    weight_B, share_B = _normalized(normalize, weights_BT.sum(axis=1), kept_B, MAX_NEW)
    segment_ids_BT1 = (np.arange(T + 1) < np.array([[10], [5], [11], [7]])).astype(np.int32)
    return SampleBatch(
        tokens_BT1=rng.integers(0, V, (B, T + 1)).astype(np.int32),
        segment_ids_BT1=segment_ids_BT1,
        positions_BT1=np.broadcast_to(np.arange(T + 1, dtype=np.int32), (B, T + 1)).copy(),
        weights_BT=(weights_BT * weight_B[:, None]).astype(np.float32),
        share_B=share_B.astype(np.float32),
        advantage_B=np.array(advantage_B, np.float32),
        behavior_BT=rng.normal(-3, 0.6, (B, T)).astype(np.float32),
        reference_BT=rng.normal(-3, 0.6, (B, T)).astype(np.float32),
    )


def reference(logits_BTV, batch, config, advantage_B=None):
    """The loss as the papers write it, sample by sample, in float64."""
    advantage_B = batch.advantage_B if advantage_B is None else advantage_B
    logprob_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float64), axis=-1)
    total, divisor = 0.0, 0.0
    for b in range(B):
        places = np.flatnonzero(batch.weights_BT[b] > 0)
        if not len(places):
            continue
        terms = []
        for t in places:
            logprob = logprob_BTV[b, t, int(batch.tokens_BT1[b, t + 1])]
            A = float(advantage_B[b])
            ratio = jnp.exp(logprob - float(batch.behavior_BT[b, t]))
            if config.surrogate == "clipped":
                term = -jnp.minimum(ratio * A, jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * A)
            else:
                term = -A * logprob
            if config.kl_weight:
                d = float(batch.reference_BT[b, t]) - logprob
                term = term + config.kl_weight * (jnp.exp(d) - d - 1)
            terms.append(term)
        match config.normalize:
            case "sequence":
                total, divisor = total + sum(terms) / len(terms), divisor + 1
            case "token":
                total, divisor = total + sum(terms), divisor + len(terms)
            case "constant":
                total, divisor = total + sum(terms), divisor + MAX_NEW
    return total / divisor


def reference_advantages(rewards, estimator):
    """Of one group, by the papers' words and the standard library; None is a dropped sample."""
    kept = [r for r in rewards if r is not None]
    match estimator:
        case "grpo":
            return [
                0.0 if r is None else (r - statistics.mean(kept)) / statistics.pstdev(kept) for r in rewards
            ]
        case "mean":
            return [0.0 if r is None else r - statistics.mean(kept) for r in rewards]
        case "rloo":  # the mean of the others
            return [0.0 if r is None else r - (sum(kept) - r) / (len(kept) - 1) for r in rewards]


def check(config, batch, wanted_advantage_B=None):
    """Loss and gradient of `batch` equal those of the plain program."""
    with jax.default_matmul_precision("highest"):
        params = init_params(MODEL, V, seed=3)
        loss = policy_loss(MODEL, config)

        def ours(params):
            sums = loss(params, batch)
            return sums.objective / sums.weight

        value, gradient = jax.jit(jax.value_and_grad(ours))(params)

        # The gradient goes through the logits of the same float32 model; what the reference checks is the loss.
        def hidden_logits(params):
            hidden = forward(
                params,
                MODEL,
                batch.tokens_BT1[:, :-1],
                batch.positions_BT1[:, :-1],
                batch.segment_ids_BT1[:, :-1],
            )
            return logits(hidden, params, MODEL)

        found = jax.jit(hidden_logits)(params)
        with jax.enable_x64(True):
            wide = jnp.asarray(np.asarray(found), jnp.float64)
            wanted, d_logits = jax.value_and_grad(lambda x: reference(x, batch, config, wanted_advantage_B))(
                wide
            )
        pull_back = jax.jit(lambda params, d_logits: jax.vjp(hidden_logits, params)[1](d_logits)[0])
        wanted_gradient = pull_back(params, jnp.asarray(np.asarray(d_logits), jnp.float32))
    # Beside the size of the terms: advantages of a group cancel, and so may their sum.
    assert float(value) == pytest.approx(float(wanted), rel=1e-6, abs=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted_gradient))
    assert scale > 0.01, "a gradient of nothing equals every other"
    for ours_leaf, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        assert np.abs(np.asarray(ours_leaf) - np.asarray(theirs)).max() <= 1e-6 * max(scale, 1.0)


@pytest.mark.parametrize("normalize", ["sequence", "token", "constant"])
@pytest.mark.parametrize("surrogate", ["clipped", "plain"])
def test_loss_and_gradient_are_those_of_the_plain_program(surrogate, normalize):
    config = PolicyLossConfig(
        surrogate=surrogate, normalize=normalize, kl_weight=0.05, clip_high=0.3, chunk_tokens=16
    )
    check(config, samples(normalize))


@pytest.mark.parametrize(
    ("estimator", "surrogate", "normalize", "kl_weight"),
    [
        ("grpo", "clipped", "sequence", 0.04),  # GRPO, arXiv 2402.03300
        ("grpo", "clipped", "token", 0.0),  # with the divisor of arXiv 2503.14476
        ("mean", "clipped", "constant", 0.0),  # Dr. GRPO, arXiv 2503.20783
        ("rloo", "plain", "sequence", 0.0),  # RLOO, arXiv 2402.14740
        ("mean", "plain", "token", 0.0),  # policy gradient with the group's mean as baseline
    ],
)
def test_every_published_estimator_from_its_rewards_to_its_gradient(
    estimator, surrogate, normalize, kl_weight
):
    rewards = [1.0, 0.0, 0.3, None]  # one group; the last was dropped
    rewards_QP = np.array([[np.nan if r is None else r for r in rewards]])
    config = PolicyLossConfig(surrogate=surrogate, normalize=normalize, kl_weight=kl_weight, chunk_tokens=16)
    batch = samples(normalize, advantage_B=advantages(rewards_QP, estimator)[0])
    check(config, batch, reference_advantages(rewards, estimator))


def test_the_table_above_names_every_estimator():
    marks = test_every_published_estimator_from_its_rewards_to_its_gradient.pytestmark
    assert {row[0] for row in marks[0].args[1]} == set(ESTIMATORS)


def test_terms_are_logged_apart():
    sums = policy_loss(MODEL, PolicyLossConfig(chunk_tokens=16))(
        init_params(MODEL, V, seed=3), samples("token")
    )
    surrogate, kl, clipped, entropy = np.asarray(sums.nll_by_source / sums.weight_by_source)
    assert surrogate == pytest.approx(float(sums.nll / sums.weight))
    assert kl == 0
    assert 0 < clipped < 1
    assert entropy > 0


def test_bad_settings_are_named():
    with pytest.raises(ConfigError) as error:
        PolicyLossConfig(surrogate="best", clip_low=1.5, kl_weight=-1)
    assert len(error.value.faults) == 3
