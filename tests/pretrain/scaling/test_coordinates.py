"""Width transfer: activations move alike at all widths, and so the best rate stays where it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig, init_params
from pretrain.optim import AdamWConfig, Constant, MuonConfig, OptimConfig, make_optimizer
from pretrain.scaling.coordinates import activations, coordinate_check, random_batch
from pretrain.scaling.plan import Shape
from pretrain.step import language_model_loss

MODEL = ModelConfig(
    num_layers=2,
    width=32,
    num_heads=2,
    num_kv_heads=2,
    head_width=16,
    hidden_width=64,
    base_width=32,
    dtype="float32",
)
VOCABULARY = 64
# Below width 64 AdamW's blocks still shrink a little (slope -0.12); Muon's products are slow above 256.
ADAMW_WIDTHS = (64, 192, 512)
MUON_WIDTHS = (32, 128, 256)


def optim(method):
    return OptimConfig(method=method, peak_lr=2e-2, schedule=Constant(), weight_decay=0.0)


@pytest.mark.slow
def test_the_last_activation_is_what_forward_makes_of_it():
    """The unrolled blocks here and the scanned ones of the model are one function."""
    wide = dataclasses.replace(MODEL, width=64, num_heads=4, num_kv_heads=4, hidden_width=128)
    params = init_params(wide, VOCABULARY, 0)
    tokens = random_batch(0, VOCABULARY, 2, 8).tokens_BT1[:, :-1]
    found = activations(params, wide, tokens)
    x = np.asarray(found["block 1"], np.float64)
    normed = (
        x
        / np.sqrt((x**2).mean(-1, keepdims=True) + wide.norm_eps)
        * np.asarray(params["final_norm"]["scale"])
    )
    expected = normed @ np.asarray(params["head"]["kernel"]) / wide.width_multiplier
    np.testing.assert_allclose(np.asarray(found["logits"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "widths"),
    [(AdamWConfig(), ADAMW_WIDTHS), (MuonConfig(), MUON_WIDTHS)],
    ids=["adamw", "muon"],
)
def test_with_width_transfer_no_activation_grows_or_shrinks_with_width(method, widths):
    slopes = coordinate_check(MODEL, optim(method), widths, vocab_size=VOCABULARY).slopes
    assert all(abs(slope) <= 0.15 for slope in slopes.values()), slopes


@pytest.mark.slow
def test_without_width_transfer_the_logits_grow_with_width():
    """Or the check above would say nothing."""
    plain = dataclasses.replace(MODEL, base_width=None)
    slopes = coordinate_check(plain, optim(AdamWConfig()), ADAMW_WIDTHS[::2], vocab_size=VOCABULARY).slopes
    assert slopes["logits"] > 0.3, slopes


@dataclasses.dataclass(frozen=True)
class Traced:
    """A constant schedule whose rate is an argument of the compiled program."""

    rate: jax.Array
    num_warmup_steps: int = 0

    def factor(self, step, num_steps):
        return self.rate


def final_losses(config, rates, num_steps=60, seeds=(0, 1, 2)):
    """Loss on fresh batches after a short run at each rate, averaged over seeds."""
    params_S = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(init_params(config, VOCABULARY, s) for s in seeds)
    )
    sums = language_model_loss(config, LossConfig(), 1)
    # Chains with a memory of one token: the next is the last times 5 plus noise; a model gains by attending.
    noise = jax.random.randint(jax.random.key(0), (num_steps + 8, 8, 33), 0, 3)

    def batch(index):
        def link(token, extra):
            token = (5 * token + extra) % VOCABULARY
            return token, token

        _, tokens = jax.lax.scan(link, noise[index, :, 0], noise[index].T)
        return dataclasses.replace(random_batch(0, VOCABULARY, 8, 32), tokens_BT1=tokens.T.astype(jnp.int32))

    def mean_loss(params, index):
        found = sums(params, batch(index))
        return found.objective / found.weight  # the only one of the sums that carries a gradient

    @jax.jit
    def run(rate):
        def one(params):
            chosen = OptimConfig(peak_lr=1.0, schedule=Traced(rate), weight_decay=0.0)
            optimizer = make_optimizer(chosen, num_steps, params, config)

            def step(carry, index):
                values, state = carry
                grads = jax.grad(mean_loss)(values, index)
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = optimizer.update(grads, state, values, step=index)
                    values = jax.tree.map(jnp.add, values, updates)
                return (values, state), None

            (values, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
            return jnp.mean(jax.lax.map(lambda i: mean_loss(values, i), num_steps + jnp.arange(8)))

        # One program for all rates and seeds: compiling it takes longer than a run.
        return jnp.mean(jax.lax.map(one, params_S))

    return [float(run(jnp.float32(rate))) for rate in rates]


@pytest.mark.slow
def test_the_best_rate_moves_by_at_most_one_grid_point_from_width_32_to_128():
    rates = [2.0**-k for k in (9, 8, 7, 6, 5, 4)]
    wide_model = Shape(width=128, num_layers=MODEL.num_layers).model(MODEL)
    narrow, wide = (final_losses(model, rates) for model in (MODEL, wide_model))
    best = [int(np.argmin(losses)) for losses in (narrow, wide)]
    assert all(0 < b < len(rates) - 1 for b in best), (narrow, wide)
    assert abs(best[0] - best[1]) <= 1, (narrow, wide)
    # Without width transfer it falls by the factor of the widths, or this would say nothing.
    rate = rates[best[0]]
    lower, same = final_losses(dataclasses.replace(wide_model, base_width=None), (rate / 4, rate))
    assert lower < same, (rate, lower, same)
