"""Laws of the experts: a loop over experts computes the same, no token is dropped, loads become even."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.moe import BiasBalance, LossBalance, MoeConfig, RouterSums, route, run_experts
from pretrain.sharding import MeshConfig, make_mesh

MOE = MoeConfig(num_experts=4, num_active=2)


def arrays(shape_of, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shape_of.items()}


def oracle(x, choice, weight, gate_up, down):
    """One expert at a time over all tokens, float64."""
    out = np.zeros(x.shape, np.float64)
    for e in range(len(gate_up)):
        gate, up = x @ gate_up[e, :, 0].astype(np.float64), x @ gate_up[e, :, 1].astype(np.float64)
        y = gate / (1 + np.exp(-gate)) * up @ down[e].astype(np.float64)
        out += y * np.sum(np.where(choice == e, weight, 0), axis=-1, keepdims=True)
    return out


def case(num_experts=4, num_active=2, seed=0, rows=2, length=6, width=8, hidden=10):
    a = arrays(
        {
            "x": (rows, length, width),
            "weight": (rows, length, num_active),
            "gate_up": (num_experts, width, 2, hidden),
            "down": (num_experts, hidden, width),
            "scores": (rows, length, num_experts),
        },
        seed,
    )
    a["choice"] = np.argsort(-a.pop("scores"), axis=-1)[..., :num_active].astype(np.int32)
    return a


@functools.partial(jax.jit, static_argnums=5)
def _run(x, choice, weight, gate_up, down, activation="silu"):
    return run_experts(x, choice, weight, gate_up, down, activation)


@pytest.mark.parametrize("choice", ["drawn", "all to the first two", "one expert idle"])
def test_experts_equal_a_loop_over_experts(choice):
    a = case()
    if choice == "all to the first two":
        a["choice"][...] = [0, 1]
    if choice == "one expert idle":
        a["choice"] = a["choice"] % 3 + np.array([0, 1]) * (a["choice"][..., :1] % 3 == a["choice"] % 3)
    args = (a["x"], a["choice"], a["weight"], a["gate_up"], a["down"])
    expected = oracle(*args)
    np.testing.assert_allclose(_run(*args), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradients_equal_those_of_a_dense_sum():
    a = case()

    def dense(x, weight, gate_up, down):
        hidden = jnp.einsum("btd,edcf->btecf", x, gate_up)
        out = jnp.einsum("btef,efd->bted", jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :], down)
        chosen = jax.nn.one_hot(a["choice"], 4) * weight[..., None]
        return jnp.sum(jnp.sin(jnp.einsum("bted,btke->btd", out, chosen)))

    def grouped(x, weight, gate_up, down):
        return jnp.sum(jnp.sin(run_experts(x, a["choice"], weight, gate_up, down, "silu")))

    values = (a["x"], a["weight"], a["gate_up"], a["down"])
    expected, got = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*values) for f in (dense, grouped))
    for e, g in zip(expected, got, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * np.abs(e).max())


def test_a_mesh_of_one_device_changes_nothing():
    """Training on one device still has a mesh in scope, of explicit axes."""
    a = case()
    args = (a["x"], a["choice"], a["weight"], a["gate_up"], a["down"])
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        on_mesh = jax.jit(lambda *args: run_experts(*args, "silu"))(*args)
    np.testing.assert_array_equal(on_mesh, _run(*args))


def test_permuted_tokens_give_permuted_outputs():
    a = case(seed=3)
    order = np.random.default_rng(0).permutation(6)
    args = a["x"], a["choice"], a["weight"]
    whole = _run(*args, a["gate_up"], a["down"])
    shuffled = _run(*(v[:, order] for v in args), a["gate_up"], a["down"])
    np.testing.assert_allclose(shuffled, np.asarray(whole)[:, order], rtol=0, atol=1e-5 * np.abs(whole).max())


def test_the_router_sends_tokens_to_the_most_probable_experts():
    logits = arrays({"z": (2, 6, 4)})["z"]
    choice, weight, sums = route(logits, jnp.zeros(4), None, MOE)
    probability = np.asarray(jax.nn.softmax(logits.astype(np.float64), axis=-1))
    expected = np.sort(probability, axis=-1)[..., :1:-1]
    np.testing.assert_allclose(np.take_along_axis(probability, np.asarray(choice), -1), expected, rtol=1e-6)
    np.testing.assert_allclose(weight, expected / expected.sum(-1, keepdims=True), rtol=1e-5)
    assert float(jnp.sum(sums.load_E)) == 2 * 2 * 6
    plain = route(logits, jnp.zeros(4), None, dataclasses.replace(MOE, renormalize=False))[1]
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_sums_follow_their_formulas_and_leave_padding_out():
    logits = arrays({"z": (2, 6, 4)}, seed=5)["z"]
    real = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    choice, _, sums = route(logits, jnp.zeros(4), real, MOE)
    z64 = logits.astype(np.float64)
    lse = np.log(np.exp(z64).sum(-1))
    probability = np.exp(z64 - lse[..., None])
    balance, load = 0.0, np.zeros(4)
    for b in range(2):
        n = real[b].sum()
        share = np.array([(np.asarray(choice)[b][real[b]] == e).sum() / (2 * n) for e in range(4)])
        balance += n * 4 * (share * probability[b][real[b]].mean(0)).sum()
        load += share * 2 * n
    np.testing.assert_array_equal(sums.load_E, load.round())
    np.testing.assert_allclose(sums.balance, balance, rtol=1e-5)
    np.testing.assert_allclose(sums.z, (lse**2)[real].sum(), rtol=1e-5)
    assert sums.tokens == real.sum()


def test_the_bias_moves_choices_and_not_weights():
    logits = arrays({"z": (1, 32, 4)}, seed=1)["z"]
    bias = jnp.array([0.0, 0.0, 10.0, 10.0])
    choice, weight, _ = route(logits, bias, None, MOE)
    assert set(np.unique(choice)) == {2, 3}
    probability = np.asarray(jax.nn.softmax(logits, axis=-1))[..., 2:]
    expected = np.sort(probability / probability.sum(-1, keepdims=True), -1)
    np.testing.assert_allclose(np.sort(weight, -1), expected, rtol=1e-5)
    by_loss = dataclasses.replace(MOE, balance=LossBalance())
    assert len(np.unique(route(logits, bias, None, by_loss)[0])) == 4


@functools.partial(jax.jit, static_argnums=0)
def _after(moe, logits, steps, bias, shift):
    """Loads after some steps of balancing a router whose logits favor the first experts."""

    def loss(shift, bias):
        _, _, sums = route(logits + shift, bias, None, moe)
        return sums.objective(moe) / sums.tokens, sums

    def step(_, carry):
        bias, shift = carry
        grads, sums = jax.grad(loss, has_aux=True)(shift, bias)
        mean = jnp.mean(sums.load_E)
        return bias + 0.01 * jnp.sign(mean - sums.load_E), shift - 3.0 * grads

    bias, shift = jax.lax.fori_loop(0, steps, step, (bias, shift))
    return loss(shift, bias)[1].load_E


@pytest.mark.parametrize("balance", [BiasBalance(), LossBalance(weight=1.0)])
def test_loads_become_even(balance):
    moe = dataclasses.replace(MOE, balance=balance, z_weight=0.0)
    logits = arrays({"z": (4, 64, 4)}, seed=2)["z"] + np.array([1.5, 0.5, 0.0, -1.0], np.float32)
    before, after = (
        np.asarray(_after(moe, logits, steps, jnp.zeros(4), jnp.zeros((1, 1, 4)))) for steps in (0, 200)
    )
    assert before.max() / before.mean() > 1.4
    assert after.max() / after.mean() < 1.1


def test_metrics_name_the_busiest_expert():
    load = jnp.array([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 2.0]])
    sums = RouterSums(
        load_E=load, balance=jnp.zeros(2), z=jnp.array([4.0, 8.0]), tokens=jnp.array([2.0, 2.0])
    )
    metrics = sums.metrics()
    assert metrics["expert_max_over_mean"] == 2.0
    assert metrics["router_z"] == 3.0
    np.testing.assert_allclose(metrics["expert_share"][1], [0, 0.25, 0.25, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be positive"),
        ({"num_active": 5}, "num_active must lie in"),
        ({"z_weight": -1.0}, "z_weight must be at least 0"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MOE, **change)
