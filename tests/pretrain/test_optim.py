"""Optimizers against optax and a program in numpy, schedules against numbers worked out by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from pretrain.config import ConfigError
from pretrain.model.layers import ParamSpec
from pretrain.model.moe import BiasBalance, MoeConfig
from pretrain.model.transformer import ModelConfig, abstract_params, param_shardings, param_specs
from pretrain.optim import (
    AdamWConfig,
    Constant,
    Linear,
    MuonConfig,
    OptimConfig,
    WarmupCosine,
    Wsd,
    make_optimizer,
    orthogonalize,
)
from pretrain.sharding import MeshConfig, OnMesh, make_mesh

VOCAB, STEPS = 10, 8
MODEL = ModelConfig(
    num_layers=3, width=8, num_heads=4, num_kv_heads=2, head_width=2, hidden_width=12, dtype="float32"
)
PARAMS = abstract_params(MODEL, VOCAB)
SPECS = param_specs(PARAMS)
# Biases and a model with experts have leaves that the plain one lacks.
LARGEST = dataclasses.replace(MODEL, qkv_bias=True, post_norms=True)
EXPERTS = dataclasses.replace(
    MODEL, moe=MoeConfig(num_experts=4, num_active=2, balance=BiasBalance(rate=0.01))
)


def values(seed, params=PARAMS, scale=1.0):
    """Random numbers in the shapes of `params`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), params)


def named(tree):
    return {
        ".".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def of_role(*roles, params=PARAMS):
    specs = jax.tree_util.tree_leaves_with_path(
        param_specs(params), is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    return {".".join(str(key.key) for key in path) for path, spec in specs if spec.role in roles}


def config_of(**fields):
    plain = {"peak_lr": 0.01, "schedule": Constant(), "weight_decay": 0.0, "clip_norm": None}
    return OptimConfig(**{**plain, **fields})


def run(optimizer, params, gradients, steps=None):
    """Parameters after each update, by name; `steps` are handed to ours, optax counts for itself."""

    @jax.jit
    def update(params, state, gradient, step):
        extra = {} if steps is None else {"step": step}
        moves, state = optimizer.update(gradient, state, params, **extra)
        return optax.apply_updates(params, moves), state

    state, after = jax.jit(optimizer.init)(params), []
    for gradient, step in zip(gradients, steps or range(len(gradients)), strict=True):
        params, state = update(params, state, gradient, np.int32(step))
        after.append(named(params))
    return after


# --- AdamW -------------------------------------------------------------------------------------------


def test_adamw_is_that_of_optax_bit_for_bit():
    """With warmup, decay of some leaves, and gradients on both sides of the norm at which they are clipped."""
    optim = config_of(
        method=AdamWConfig(b1=0.8, b2=0.97, eps=1e-6), schedule=WarmupCosine(num_warmup_steps=2), weight_decay=0.1,
        clip_norm=1.0,
    )  # fmt: skip
    params = values(0)
    gradients = [values(i, scale=scale) for i, scale in enumerate((1.0, 0.001, 0.03), 1)]
    norms = [math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g))) for g in gradients]
    assert norms[0] > 1 > norms[1]
    mask = jax.tree.map(lambda spec: spec.role != "vector", SPECS, is_leaf=lambda x: isinstance(x, ParamSpec))
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda step: optim.learning_rate(step, STEPS),
            b1=0.8,
            b2=0.97,
            eps=1e-6,
            weight_decay=0.1,
            mask=mask,
        ),
    )
    found = run(make_optimizer(optim, STEPS, PARAMS, MODEL), params, gradients, steps=[0, 1, 2])
    for ours, expected in zip(found, run(theirs, params, gradients), strict=True):
        for name, value in ours.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_clipping_scales_all_gradients_by_one_number_and_leaves_small_ones_alone():
    """Adam forgets a common scale, so the first moment is looked at, which is a tenth of what Adam was given."""
    optimizer = make_optimizer(config_of(clip_norm=2.0), STEPS, PARAMS, MODEL)
    for scale in (1.0, 0.01):
        gradients = values(1, scale=scale)
        norm = math.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(gradients)))
        state = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g, step=jnp.int32(0))[1])(gradients)
        (adam,) = (part for part in state if isinstance(part, optax.ScaleByAdamState))
        factor = min(1.0, 2.0 / norm)
        assert (factor < 1.0) == (scale == 1.0)
        for name, moment in named(adam.mu).items():
            np.testing.assert_allclose(moment, 0.1 * factor * named(gradients)[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("model", "method"), [(LARGEST, AdamWConfig()), (EXPERTS, MuonConfig())], ids=["dense", "experts"]
)
def test_embeddings_heads_and_matrices_decay_and_vectors_do_not(model, method):
    """Without gradients decay alone moves a parameter: by rate times decay of itself."""
    params = abstract_params(model, VOCAB)
    optim = config_of(method=method, weight_decay=0.25)
    optimizer = make_optimizer(optim, STEPS, params, model)
    before, zeros = values(0, params), jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params)
    load_LE = np.ones((MODEL.num_layers, 4), np.float32)
    moves = jax.jit(
        lambda p, g: optimizer.update(g, optimizer.init(p), p, step=jnp.int32(0), expert_load_LE=load_LE)[0]
    )(before, zeros)
    decayed = {name for name, move in named(moves).items() if np.any(move)}
    feed_forward = {"expert_gate_up", "expert_down"} if model.moe else {"gate_up", "down"}
    matrices = {"query", "key", "value", "out"}
    assert decayed == {
        "embed.embedding",
        "head.kernel",
        *(f"blocks.attention.{name}" for name in matrices),
        *(f"blocks.mlp.{name}" for name in feed_forward),
    }
    for name in decayed:
        np.testing.assert_allclose(named(moves)[name], -0.01 * 0.25 * named(before)[name], rtol=1e-6)


def test_the_rate_is_that_of_the_step_however_many_updates_there_were():
    """A skipped step has no update; the schedule goes on all the same."""
    optim = config_of(method=AdamWConfig(b1=0.0, b2=0.0), schedule=Linear(num_warmup_steps=0))
    params, gradients = values(0), values(1)
    first, second = run(make_optimizer(optim, STEPS, PARAMS, MODEL), params, [gradients] * 2, steps=[0, 6])
    name = "head.kernel"
    # With b1 = b2 = 0 an update is the rate with the sign of the gradient.
    sign = np.sign(named(gradients)[name])
    np.testing.assert_allclose(first[name] - named(params)[name], -0.01 * sign, atol=1e-6)
    np.testing.assert_allclose(second[name] - first[name], -0.01 * 0.25 * sign, atol=1e-6)


# --- Muon --------------------------------------------------------------------------------------------


def newton_schulz(singular_values, num_iterations=5):
    """What the quintic iteration makes of singular values; the coefficients of Jordan et al., 2024."""
    s = singular_values / np.sqrt((singular_values**2).sum(axis=-1, keepdims=True))
    for _ in range(num_iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def orthogonal(x, spec):
    """As the iteration makes it, through singular value decompositions: it keeps both bases and maps the values."""
    inputs, outputs = spec.inputs, spec.outputs
    batch = tuple(i for i in range(x.ndim) if i not in (*inputs, *outputs))
    order = (*batch, *inputs, *outputs)
    sizes = [math.prod(x.shape[i] for i in dims) for dims in (batch, inputs, outputs)]
    u, s, vh = np.linalg.svd(x.transpose(order).reshape(sizes), full_matrices=False)
    matrices = (u * newton_schulz(s)[:, None, :]) @ vh
    return matrices.reshape([x.shape[i] for i in order]).transpose(np.argsort(order))


def muon_in_numpy(gradients, spec, momentum=0.95):
    """The directions of Muon for each gradient, in float64: Nesterov momentum with the bias correction of NAdam."""
    mu, directions = np.zeros_like(gradients[0], np.float64), []
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.astype(np.float64)
        mu = momentum * mu + (1 - momentum) * gradient
        ahead = momentum * mu / (1 - momentum ** (t + 1)) + (1 - momentum) * gradient / (1 - momentum**t)
        directions.append(orthogonal(ahead, spec))
    return directions


MUON = config_of(method=MuonConfig(consistent_rms=0.3, adamw=AdamWConfig(b1=0.8, b2=0.97)), weight_decay=0.1)
GRADIENTS = [values(seed, scale=scale) for seed, scale in ((1, 1.0), (2, 0.3), (3, 2.0))]


def sides(spec, value):
    return math.prod(value.shape[i] for i in spec.inputs), math.prod(value.shape[i] for i in spec.outputs)


@functools.cache
def muon_run(base_width=None):
    model = dataclasses.replace(MODEL, base_width=base_width)
    return run(make_optimizer(MUON, STEPS, PARAMS, model), values(0), GRADIENTS, steps=[0, 1, 2])


@pytest.mark.parametrize("base_width", [None, 4])
def test_muon_is_that_of_a_program_in_numpy(base_width):
    """Every matrix of a stack by itself, gate and up too; heads and their width are one side of a matrix."""
    specs = {
        ".".join(str(key.key) for key in path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(
            SPECS, is_leaf=lambda x: isinstance(x, ParamSpec)
        )
    }
    for name in of_role("matrix"):
        value = named(values(0))[name].astype(np.float64)
        fan_in, fan_out = sides(specs[name], value)
        factor = 0.3 * math.sqrt(max(fan_in, fan_out)) if base_width is None else math.sqrt(fan_out / fan_in)
        for step, direction in enumerate(muon_in_numpy([named(g)[name] for g in GRADIENTS], specs[name])):
            value = value - 0.01 * (factor * direction + 0.1 * value)
            # Five iterations in float32, each with two products.
            np.testing.assert_allclose(
                muon_run(base_width)[step][name], value, rtol=0, atol=2e-5, err_msg=name
            )


def test_matrices_move_under_muon_as_those_of_optax_do():
    """optax gives its Adam the Nesterov momentum too, which AdamW has not: the other leaves are not compared here."""
    dims = jax.tree.map(
        lambda spec: contrib.MuonDimensionNumbers(spec.inputs, spec.outputs) if spec.role == "matrix" else None,
        SPECS, is_leaf=lambda x: isinstance(x, ParamSpec),
    )  # fmt: skip
    theirs = contrib.muon(
        0.01, beta=0.95, weight_decay=0.1, consistent_rms=0.3, muon_weight_dimension_numbers=dims
    )
    for ours, expected in zip(muon_run(), run(theirs, values(0), GRADIENTS), strict=True):
        for name in of_role("matrix"):
            np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_what_is_no_matrix_moves_under_muon_as_under_adamw():
    adamw = dataclasses.replace(MUON, method=MUON.method.adamw)
    found = run(make_optimizer(adamw, STEPS, PARAMS, MODEL), values(0), GRADIENTS, steps=[0, 1, 2])
    for ours, expected in zip(muon_run(), found, strict=True):
        for name in of_role("embedding", "head", "vector"):
            np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, expert=4)],
    ids=["fsdp4-tensor2", "fsdp2-expert4"],
)
def test_matrices_in_pieces_are_orthogonalized_as_whole_ones(mesh):
    """Three layers on eight devices: the stack is padded and travels there and back."""
    params = abstract_params(EXPERTS, VOCAB) if mesh.expert > 1 else PARAMS
    shardings = param_shardings(params, make_mesh(mesh))
    specs = param_specs(params)
    x = values(4, params)

    def all_matrices(x):
        return jax.tree.map(
            lambda spec, v: orthogonalize(v, spec, 5) if spec.role == "matrix" else v,
            specs, x, is_leaf=lambda s: isinstance(s, ParamSpec),
        )  # fmt: skip

    whole = jax.jit(all_matrices)(x)
    pieces = OnMesh(jax.jit(all_matrices), make_mesh(mesh))(jax.device_put(x, shardings))
    split = 0
    for name in of_role("matrix", params=params):
        np.testing.assert_allclose(named(pieces)[name], named(whole)[name], rtol=0, atol=1e-5, err_msg=name)
    for leaf, layout in zip(jax.tree.leaves(pieces), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
        split += len({str(shard.index) for shard in leaf.addressable_shards}) == 8
    assert split


# --- width transfer, experts -------------------------------------------------------------------------


def test_width_transfer_divides_the_adamw_rate_of_block_matrices_and_keeps_their_decay():
    optim = config_of(weight_decay=0.1)
    params = values(0)
    moves = {}
    for base_width in (None, 2):
        model = dataclasses.replace(MODEL, base_width=base_width)
        optimizer = make_optimizer(optim, STEPS, PARAMS, model)
        (after,) = run(optimizer, params, GRADIENTS[:1], steps=[0])
        moves[base_width] = {name: after[name] - named(params)[name] for name in after}
    m = MODEL.width / 2
    for name, move in moves[None].items():
        decay = -0.01 * 0.1 * named(params)[name] if name not in of_role("vector") else 0.0
        wanted = decay + (move - decay) / m if name in of_role("matrix") else move
        np.testing.assert_allclose(moves[2][name], wanted, rtol=0, atol=1e-6, err_msg=name)


def test_the_bias_of_an_expert_moves_against_its_load_and_by_nothing_else():
    params = abstract_params(EXPERTS, VOCAB)
    optimizer = make_optimizer(config_of(weight_decay=0.1), STEPS, params, EXPERTS)
    load_LE = np.array([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 8.0]], np.float32)
    moves = jax.jit(
        lambda p, g: optimizer.update(g, optimizer.init(p), p, step=jnp.int32(0), expert_load_LE=load_LE)[0]
    )(values(0, params), values(1, params))
    wanted = 0.01 * np.array([[-1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, -1]], np.float32)
    np.testing.assert_array_equal(named(moves)["blocks.mlp.router_bias"], wanted)


# --- schedules ---------------------------------------------------------------------------------------

R = math.sqrt(0.5)
SCHEDULES = [
    (Constant(), 3, [1, 1, 1]),
    (Constant(num_warmup_steps=4), 6, [0.25, 0.5, 0.75, 1, 1, 1]),
    (Linear(num_warmup_steps=2), 6, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
    (Linear(num_warmup_steps=2, final_fraction=0.2), 6, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    (
        WarmupCosine(num_warmup_steps=2, final_fraction=0.1), 6,
        [0.5, 1, 1, 0.55 + 0.45 * R, 0.55, 0.55 - 0.45 * R, 0.1, 0.1],
    ),
    (WarmupCosine(num_warmup_steps=0, final_fraction=0.0), 4, [1, (1 + R) / 2, 0.5, (1 - R) / 2, 0]),
    (Wsd(num_warmup_steps=2, decay_fraction=0.4), 10, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
    (Wsd(num_warmup_steps=0, decay_fraction=0.5, final_fraction=0.2), 8, [1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    (Wsd(num_warmup_steps=0, decay_fraction=0.5, shape="one_minus_sqrt"), 8, [1, 1, 1, 1, 1, 0.5, 1 - R, 1 - math.sqrt(0.75), 0]),
    (Wsd(num_warmup_steps=0, decay_fraction=0.0), 4, [1, 1, 1, 1, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "num_steps", "factors"), SCHEDULES)
def test_a_schedule_has_the_values_worked_out_by_hand(schedule, num_steps, factors):
    optim = config_of(peak_lr=0.3, schedule=schedule)
    found = optim.learning_rate(np.arange(12), num_steps)  # one shape for all: compiled once
    np.testing.assert_allclose(found[: len(factors)], 0.3 * np.array(factors), rtol=0, atol=1e-6)


def test_the_stable_part_of_a_longer_wsd_run_is_that_of_a_shorter_one():
    """So one run gives many budgets: every shorter run branches off."""
    schedule = Wsd(num_warmup_steps=3, decay_fraction=0.25)
    short, long = (schedule.factor(np.arange(75), num_steps) for num_steps in (100, 200))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Constant(num_warmup_steps=-1), "num_warmup_steps must be a count of steps, got -1"),
        (lambda: Linear(num_warmup_steps=2.5), "num_warmup_steps must be a count of steps, got 2.5"),
        (lambda: WarmupCosine(num_warmup_steps=0, final_fraction=1.5), r"final_fraction .* in \[0, 1\], got 1.5"),
        (lambda: Wsd(num_warmup_steps=0, decay_fraction=-0.1), r"decay_fraction .* in \[0, 1\], got -0.1"),
        (lambda: Wsd(num_warmup_steps=0, shape="square"), "shape must be linear or one_minus_sqrt, got 'square'"),
        (lambda: AdamWConfig(b1=-0.1, b2=1.0, eps=0.0), r"(?s)b1 must lie in \[0, 1\), .*b2 must .*eps must be positive"),
        (
            lambda: MuonConfig(momentum=1.0, num_iterations=0, consistent_rms=0.0),
            "(?s)momentum must lie .*num_iterations must be at least 1, .*consistent_rms must be positive",
        ),
        (lambda: config_of(peak_lr=0.0), "peak_lr must be positive, got 0.0"),
        (lambda: config_of(peak_lr=math.inf), "peak_lr must be positive, got inf"),
        (lambda: config_of(weight_decay=-1.0, clip_norm=0.0), "(?s)weight_decay must.*clip_norm must be positive"),
        (
            lambda: make_optimizer(config_of(schedule=Constant(num_warmup_steps=9)), STEPS, PARAMS, MODEL),
            "num_warmup_steps must not exceed run.num_steps=8, got 9; shorten the warmup or train longer",
        ),
    ],
)  # fmt: skip
def test_faults_are_named(make, fault):
    with pytest.raises(ConfigError, match=fault):
        make()
