"""Adapters begin as the frozen model, move nothing but themselves, and merge into weights that compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError, from_json, to_json
from pretrain.data.batch import Batch
from pretrain.generate import GenerateConfig, Generator, Request
from pretrain.loss import LossConfig
from pretrain.model.adapters import ADAPTERS, AdapterConfig, merged_params, trained_part, with_trained_part
from pretrain.model.moe import MoeConfig
from pretrain.model.transformer import (
    AdaptedModelConfig,
    ModelConfig,
    forward,
    init_params,
    logits,
    param_shardings,
)
from pretrain.optim import AdamWConfig, Constant, MuonConfig, OptimConfig, make_optimizer
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import init_state, language_model_loss, make_train_step

VOCAB = 40
BASE = {"num_layers": 2, "width": 16, "num_heads": 2, "num_kv_heads": 2, "head_width": 8, "hidden_width": 24, "dtype": "float32", "tied_head": True}  # fmt: skip
MODEL = AdaptedModelConfig(**BASE, adapters=AdapterConfig(rank=3))
EXPERTS = AdaptedModelConfig(
    **{**BASE, "moe": MoeConfig(num_experts=4, num_active=2)}, adapters=AdapterConfig(rank=2)
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (8, 12)).astype(np.int32)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (8, 1))


@functools.cache
def params_of(model, moved=True):
    """Parameters; `moved` gives B numbers too, as training would."""
    params = init_params(model, VOCAB, 0)
    if not moved:
        return params
    random = np.random.default_rng(1)
    move = {
        part: {
            name: {"a": ab["a"], "b": jnp.asarray(random.normal(size=ab["b"].shape) * 0.1, jnp.float32)}
            for name, ab in matrices.items()
        }
        for part, matrices in params["blocks"][ADAPTERS].items()
    }
    return {**params, "blocks": {**params["blocks"], ADAPTERS: move}}


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, model):
    return logits(forward(params, model, TOKENS, POSITIONS, None), params, model)


def batch():
    tokens = np.concatenate([TOKENS, TOKENS[:, :1]], axis=1)
    return Batch(
        tokens_BT1=tokens,
        segment_ids_BT1=np.ones_like(tokens),
        positions_BT1=np.tile(np.arange(13, dtype=np.int32), (8, 1)),
        weights_BT=np.ones((8, 12), np.float32),
        source_B=np.zeros(8, np.int32),
    )


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_fresh_adapters_leave_the_model_as_it_is():
    params = params_of(MODEL, moved=False)
    frozen = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != ADAPTERS}}
    np.testing.assert_array_equal(logits_of(params, MODEL), logits_of(frozen, MODEL.base()))


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_merged_weights_are_w_plus_ab_and_compute_the_same(model):
    params = params_of(model)
    whole = merged_params(params)
    assert jax.tree.structure(whole) == jax.tree.structure(init_params(model.base(), VOCAB, 0))
    query, ab = params["blocks"]["attention"]["query"], params["blocks"][ADAPTERS]["attention"]["query"]
    for layer in range(2):
        product = np.tensordot(np.float64(ab["a"][layer]), np.float64(ab["b"][layer]), 1)
        wanted = np.float64(query[layer]) + product
        np.testing.assert_allclose(whole["blocks"]["attention"]["query"][layer], wanted, atol=1e-6)
    np.testing.assert_allclose(logits_of(whole, model.base()), logits_of(params, model), atol=1e-5)
    assert np.abs(np.asarray(logits_of(params, model) - logits_of(params_of(model, False), model))).max() > 1e-2  # fmt: skip


def test_text_is_that_of_the_merged_model():
    def text(params, model):
        generator = Generator(params, model, GenerateConfig(max_length=16, slots=1, chunk_tokens=16))
        request = Request(ids=(1, 2, 3), max_new_tokens=8, temperature=0.0)
        return generator.generate([request])[0].ids

    assert text(params_of(MODEL), MODEL) == text(merged_params(params_of(MODEL)), MODEL.base())


@pytest.mark.parametrize("method", [AdamWConfig(), MuonConfig()], ids=["adamw", "muon"])
def test_only_adapters_move_and_only_they_have_moments(method):
    optim = OptimConfig(method=method, peak_lr=1e-2, schedule=Constant(), weight_decay=0.1)
    optimizer = make_optimizer(optim, 5, params_of(MODEL), MODEL)
    # Copies: the state is donated.
    state = init_state(
        MODEL, VOCAB, optimizer, 0, params=jax.tree.map(jnp.copy, init_params(MODEL.base(), VOCAB, 0))
    )
    before = leaves(state.params)
    step = make_train_step(language_model_loss(MODEL, LossConfig(), 1), optimizer, num_microbatches=2)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = leaves(state.params)
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in after if ADAPTERS in name}
    sizes = {x.size for x in jax.tree.leaves(state.opt_state)}
    assert max(sizes) <= max(x.size for x in jax.tree.leaves(trained_part(state.params)))


def test_gradients_follow_from_those_of_the_whole_matrix():
    """dA = dW B', dB = A' dW."""
    params, loss = params_of(MODEL), language_model_loss(MODEL, LossConfig(), 1)
    plain = language_model_loss(MODEL.base(), LossConfig(), 1)
    of_weights = jax.jit(jax.grad(lambda p: plain(p, batch()).objective))(merged_params(params))
    of_adapters = jax.jit(
        jax.grad(lambda t: loss(with_trained_part(params, t), batch()).objective)
    )(trained_part(params))["blocks"][ADAPTERS]  # fmt: skip
    for part, name, d_a, d_b in (
        ("attention", "out", "lnhd,lrd->lnhr", "lnhr,lnhd->lrd"),
        ("mlp", "gate_up", "ldxf,lxrf->lxdr", "lxdr,ldxf->lxrf"),
    ):
        d_w, ab = of_weights["blocks"][part][name], params["blocks"][ADAPTERS][part][name]
        found = of_adapters[part][name]
        np.testing.assert_allclose(found["a"], np.einsum(d_a, d_w, ab["b"]), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found["b"], np.einsum(d_b, ab["a"], d_w), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_mesh_moves_them_as_one_device_does():
    optim = OptimConfig(method=AdamWConfig(), peak_lr=1e-2, schedule=Constant())

    def after(mesh):
        optimizer = make_optimizer(optim, 3, params_of(MODEL), MODEL)
        base = init_params(MODEL.base(), VOCAB, 0, mesh)
        state = init_state(MODEL, VOCAB, optimizer, 0, mesh, params=jax.tree.map(jnp.copy, base))
        step = make_train_step(language_model_loss(MODEL, LossConfig(), 1), optimizer, mesh=mesh)
        for _ in range(2):
            state, metrics = step(state, batch())
        return state.params, float(metrics["loss"])

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    (alone, loss), (spread, loss_on_mesh) = after(None), after(mesh)
    assert loss_on_mesh == pytest.approx(loss, abs=1e-5)
    for name, value in leaves(alone).items():
        np.testing.assert_allclose(leaves(spread)[name], value, atol=2e-5, err_msg=name)
    a = spread["blocks"][ADAPTERS]["mlp"]["gate_up"]["a"]
    assert a.sharding == param_shardings(spread, mesh)["blocks"][ADAPTERS]["mlp"]["gate_up"]["a"]
    assert len({str(s.index) for s in a.addressable_shards}) == 4


def test_a_config_survives_json_and_bad_ones_are_refused():
    assert from_json(to_json(MODEL)) == MODEL
    assert MODEL.base() == ModelConfig(**BASE)
    assert MODEL.base().with_adapters(MODEL.adapters) == MODEL
    assert dataclasses.replace(MODEL, dtype="bfloat16").adapters == MODEL.adapters
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(rank=0, targets=("scale",))
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="that the model has"):
        init_params(dataclasses.replace(MODEL, adapters=AdapterConfig(rank=1, targets=("expert_down",))), VOCAB, 0)  # fmt: skip
