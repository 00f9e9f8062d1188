"""A step does the same with its batch whole or cut into microbatches: sums are divided once, by the weight of all."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from pretrain.config import ConfigError
from pretrain.data.batch import Batch
from pretrain.loss import LossConfig, cross_entropy
from pretrain.model.moe import BiasBalance, LossBalance, MoeConfig
from pretrain.model.transformer import ModelConfig, abstract_params, init_params, param_shardings
from pretrain.optim import AdamWConfig, Constant, MuonConfig, OptimConfig, make_optimizer
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import (
    abstract_state,
    check_batch,
    language_model_loss,
    make_eval_step,
    make_train_step,
    new_state,
)

VOCAB, WIDTH, ROWS, LENGTH, SOURCES = 13, 8, 16, 6, 3
# With rate one the parameters move by the gradient itself.
DESCENT = optax.with_extra_args_support(optax.sgd(1.0))


def loss(params, batch):
    """Of the smallest language model, which knows no more than the last token."""
    hidden_BTD = params["embed"]["embedding"][batch.tokens_BT1[:, :-1]]
    return cross_entropy(
        hidden_BTD, params["head"]["kernel"], batch.tokens_BT1[:, 1:], batch.weights_BT, batch.source_B,
        num_sources=SOURCES, z_weight=0.01,
    )  # fmt: skip


def fresh_params():
    rng = np.random.default_rng(1)
    shapes = {"blocks": {}, "embed": {"embedding": (VOCAB, WIDTH)}, "head": {"kernel": (WIDTH, VOCAB)}}
    return jax.tree.map(
        lambda shape: jax.numpy.asarray(rng.normal(size=shape), np.float32), shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def batch():
    """Rows that weigh very differently, so that a mean of means would be another number; some weigh nothing."""
    rng = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), (ROWS, LENGTH + 1))
    weights_BT = (rng.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32)
    weights_BT[:3] = 0.0
    return Batch(
        tokens_BT1=rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32),
        segment_ids_BT1=np.ones((ROWS, LENGTH + 1), np.int32),
        positions_BT1=place,
        weights_BT=weights_BT,
        source_B=rng.integers(0, SOURCES, ROWS).astype(np.int32),
    )


def after(batch, num_microbatches=1):
    """(how far each parameter moved, metrics, step) after one step."""
    step = make_train_step(loss, DESCENT, num_microbatches=num_microbatches)
    state, metrics = step(new_state(fresh_params(), DESCENT), batch)
    moves = jax.tree.map(lambda new, old: np.asarray(new - old), state.params, fresh_params())
    return moves, jax.device_get(metrics), int(state.step)


@functools.cache
def whole():
    return after(batch())


@pytest.mark.parametrize("num_microbatches", [4, 16])
def test_microbatches_give_the_gradient_and_metrics_of_the_whole_batch(num_microbatches):
    moves, metrics, step = after(batch(), num_microbatches)
    wanted_moves, wanted_metrics, _ = whole()
    assert step == 1
    assert all(np.abs(move).max() > 0.01 for move in jax.tree.leaves(wanted_moves))
    for wanted, found in zip(jax.tree.leaves(wanted_moves), jax.tree.leaves(moves), strict=True):
        # Sums of float32 in another order; parameters are of the order of one.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert metrics.keys() == wanted_metrics.keys()
    for name, wanted in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_step_goes_against_the_gradient_of_the_mean_over_weighed_tokens():
    sums = make_eval_step(loss)(fresh_params(), batch())
    gradient = jax.jit(jax.grad(lambda p: loss(p, batch()).objective))(fresh_params())
    moves, metrics, _ = whole()
    assert metrics["weight"] == batch().weights_BT.sum()
    for wanted, found in zip(jax.tree.leaves(gradient), jax.tree.leaves(moves), strict=True):
        np.testing.assert_allclose(found, -wanted / batch().weights_BT.sum(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], sums.nll / sums.weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["z"], sums.z / sums.weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll_by_source"].sum(), sums.nll, rtol=1e-6)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moves)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_sums_of_the_evaluation_add_over_batches():
    params, evaluate = fresh_params(), make_eval_step(loss)
    halves = [jax.tree.map(lambda x, part=part: x[part], batch()) for part in (slice(0, 8), slice(8, 16))]
    parts = jax.tree.map(np.add, *(evaluate(params, half) for half in halves))
    for part, together in zip(
        jax.tree.leaves(parts), jax.tree.leaves(evaluate(params, batch())), strict=True
    ):
        np.testing.assert_allclose(part, together, rtol=1e-5)


def test_a_batch_without_weight_moves_nothing():
    empty = dataclasses.replace(batch(), weights_BT=np.zeros((ROWS, LENGTH), np.float32))
    moves, metrics, step = after(empty, num_microbatches=4)
    assert step == 1
    assert not any(np.any(move) for move in jax.tree.leaves(moves))
    assert (metrics["loss"], metrics["grad_norm"], metrics["weight"]) == (0.0, 0.0, 0.0)
    assert metrics["ok"]


EXPERTS = ModelConfig(
    num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_width=4, hidden_width=8, dtype="float32", remat="none",
    moe=MoeConfig(num_experts=4, num_active=2, balance=LossBalance(weight=0.5), z_weight=0.5),
)  # fmt: skip


@functools.cache
def step_of_experts(model, num_microbatches):
    loss_of_experts = language_model_loss(model, LossConfig(), SOURCES)
    return make_train_step(loss_of_experts, DESCENT, num_microbatches=num_microbatches)


def moves_of_experts(moe, weights_BT, num_microbatches=1):
    """How far each parameter moves against the gradient, half of a row being padding."""
    model = dataclasses.replace(EXPERTS, moe=moe)
    segments = np.repeat([[1] * 4 + [0] * 3], ROWS, axis=0).astype(np.int32)
    step = step_of_experts(model, num_microbatches)
    before = jax.device_get(init_params(model, VOCAB, seed=0))
    rows = dataclasses.replace(batch(), segment_ids_BT1=segments, weights_BT=weights_BT.astype(np.float32))
    after, _ = step(new_state(init_params(model, VOCAB, seed=0), DESCENT), rows)
    return jax.tree.map(lambda new, old: np.asarray(new - old), after.params, before)


def test_losses_of_a_router_are_means_over_its_tokens_whatever_these_weigh_as_targets():
    """What they add to the step is the same whether all targets weigh one or few weigh something."""
    all_of_them = np.repeat([[1] * 3 + [0] * 3], ROWS, axis=0)
    few = all_of_them * (np.arange(ROWS) % 8 == 3)[:, None]
    without = dataclasses.replace(EXPERTS.moe, balance=LossBalance(weight=0.0), z_weight=0.0)
    added = []
    for weights_BT, num_microbatches in ((all_of_them, 1), (few, 1), (few, 4)):
        moves = [moves_of_experts(moe, weights_BT, num_microbatches) for moe in (EXPERTS.moe, without)]
        added.append(jax.tree.map(np.subtract, *moves))
    assert np.abs(added[0]["blocks"]["mlp"]["router"]).max() > 0.01
    for other in added[1:]:
        for wanted, found in zip(jax.tree.leaves(added[0]), jax.tree.leaves(other), strict=True):
            # Differences of float32 moves: what is lost is a part of the largest numbers of a leaf.
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("method", "balance"),
    [(AdamWConfig(), BiasBalance(rate=0.1)), (MuonConfig(), LossBalance(weight=0.5))],
    ids=["adamw and bias", "muon and loss"],
)
def test_a_batch_without_weight_changes_no_bit_of_a_model_with_experts(method, balance):
    """Neither decay, nor moments, nor a router, nor what the guard takes for usual."""
    model = dataclasses.replace(EXPERTS, moe=dataclasses.replace(EXPERTS.moe, balance=balance))
    optim = OptimConfig(method=method, peak_lr=1e-2, schedule=Constant())
    optimizer = make_optimizer(optim, 9, abstract_params(model, VOCAB), model)
    step = make_train_step(language_model_loss(model, LossConfig(), SOURCES), optimizer)
    empty = dataclasses.replace(batch(), weights_BT=np.zeros((ROWS, LENGTH), np.float32))
    state, _ = step(new_state(init_params(model, VOCAB, seed=0), optimizer), batch())
    before = jax.device_get(state)
    after, metrics = jax.device_get(step(state, empty))
    assert after.step == before.step + 1
    assert metrics["ok"]
    for name in ("params", "opt_state", "health"):
        for old, new in zip(*(jax.tree.leaves(getattr(s, name)) for s in (before, after)), strict=True):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), name


@pytest.mark.parametrize("method", [AdamWConfig(), MuonConfig()], ids=["adamw", "muon"])
def test_moments_lie_as_their_parameters_do(method):
    """Shapes alone: nothing is computed."""
    model = ModelConfig(
        num_layers=1, width=8, num_heads=2, num_kv_heads=1, head_width=4, hidden_width=8, dtype="float32"
    )
    mesh, params = make_mesh(MeshConfig(fsdp=4, tensor=2)), abstract_params(model, 16)
    optim = OptimConfig(method=method, peak_lr=1e-3, schedule=Constant())
    state = abstract_state(model, 16, make_optimizer(optim, 3, params, model), mesh)
    layouts = {
        tuple(map(str, path)): layout
        for path, layout in jax.tree_util.tree_leaves_with_path(param_shardings(params, mesh))
    }
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(map(str, path))
        owners = [p for p in layouts if names[-len(p) :] == p]
        if owners:
            assert leaf.sharding == layouts[owners[0]], names
            split += not leaf.sharding.is_fully_replicated
        else:
            assert leaf.sharding.is_fully_replicated, names
    # Six matrices, embedding and head; Muon has one moment of each matrix, Adam two.
    assert split == (16 if method == AdamWConfig() else 10)


@pytest.mark.parametrize(
    ("num_microbatches", "mesh", "product"), [(3, None, "3 x 1"), (4, MeshConfig(fsdp=8), "4 x 8")]
)
def test_rows_that_do_not_divide_are_refused(num_microbatches, mesh, product):
    with pytest.raises(ConfigError, match=rf"data.batch_rows must be a multiple .*, {product}, got 16"):
        check_batch(ROWS, num_microbatches, None if mesh is None else make_mesh(mesh))
