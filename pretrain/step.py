"""One pure training step: (state, batch) -> (state, metrics), jitted, the state donated.

A step that the health guard refuses, or whose batch weighs nothing, changes no bit of parameters or optimizer state.
Losses are sums; they are divided once, by the weight of the global batch (those of routers by the tokens routed), so the
result does not depend on how it was cut into microbatches beyond rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pretrain.config import ConfigError
from pretrain.data.batch import Batch
from pretrain.health import HealthConfig, guard, init_health, keep_if, refused, renewed
from pretrain.loss import LossConfig, LossSums, cross_entropy
from pretrain.model.adapters import trained_part, with_trained_part
from pretrain.model.transformer import (
    ModelConfig,
    Params,
    abstract_params,
    forward_with_router,
    head_DV,
    init_params,
    param_shardings,
)
from pretrain.sharding import DATA_AXES, OnMesh, activation_spec, axis_size, in_turn, replicated

Metrics = dict[str, jax.Array]
# (params, batch) -> sums with at least `objective` (differentiated) and `weight`; all of it adds up. Sums with a
# router weigh the batch by its weights_BT.
LossFunction = Callable[[Params, Batch], LossSums]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "health"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; `step` counts batches consumed, skipped ones included."""

    step: jax.Array
    params: Params
    opt_state: Any
    health: Any


def language_model_loss(model: ModelConfig, loss: LossConfig, num_sources: int) -> LossFunction:
    """Next-token loss of a batch."""

    def loss_sums(params: Params, batch: Batch) -> LossSums:
        hidden_BTD, router = forward_with_router(
            params,
            model,
            batch.tokens_BT1[:, :-1],
            batch.positions_BT1[:, :-1],
            batch.segment_ids_BT1[:, :-1],
        )
        sums = cross_entropy(
            hidden_BTD,
            head_DV(params, model),
            batch.tokens_BT1[:, 1:],
            batch.weights_BT,
            batch.source_B,
            num_sources=num_sources,
            z_weight=loss.z_weight,
            chunk_tokens=loss.chunk_tokens,
            softcap=model.final_softcap,
        )
        return sums if router is None or model.moe is None else sums.with_router(router, model.moe)

    return loss_sums


# --- the state ---------------------------------------------------------------------------------------


def new_state(
    params: Params, optimizer: optax.GradientTransformation, health: HealthConfig = HealthConfig()
) -> TrainState:
    """Step 0 with these parameters; traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trained_part(params)),
        health=init_health(health),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Layouts of a state (values or shapes): optimizer state lies as the parameter whose path ends its own."""
    of_param = {
        tuple(str(key) for key in path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings(state.params, mesh))
    }
    shapes = {
        tuple(str(key) for key in path): value.shape
        for path, value in jax.tree_util.tree_leaves_with_path(state.params)
    }

    def sharding(path: tuple[Any, ...], value: Any) -> Any:
        names = tuple(str(key) for key in path)
        for start in range(len(names)):
            if shapes.get(names[start:]) == value.shape:
                return of_param[names[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_state(
    model: ModelConfig,
    vocab_size: int,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    health: HealthConfig = HealthConfig(),
) -> TrainState:
    """Shapes, dtypes and layouts of the state, nothing allocated: what a checkpoint is restored into."""
    params = abstract_params(model, vocab_size)
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer, health=health), params)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout),
        shapes,
        state_shardings(shapes, mesh),
    )


def init_state(
    model: ModelConfig,
    vocab_size: int,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh | None = None,
    health: HealthConfig = HealthConfig(),
    params: Params | None = None,
) -> TrainState:
    """A fresh state; with `params` (imported, restored) it starts from those, and adapters of `model` are added."""
    if params is None:
        params = init_params(model, vocab_size, seed, mesh)
    else:
        params = model.complete(params, jax.random.key(seed % 2**32))
    layouts = None
    if mesh is not None:
        layouts = jax.tree.map(
            lambda s: s.sharding, abstract_state(model, vocab_size, optimizer, mesh, health)
        )
        params = jax.device_put(params, layouts.params)
    make = functools.partial(new_state, optimizer=optimizer, health=health)
    return in_turn(jax.jit(make, out_shardings=layouts)(params))


# --- the steps ---------------------------------------------------------------------------------------


def _microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """[B, ..] -> [num_microbatches, B / num_microbatches, ..]; every device splits its own rows."""

    def split(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
        layout = activation_spec(("batch", *[None] * x.ndim), shape)
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=layout), 1, 0)

    return jax.tree.map(split, batch)


def _sums_and_gradient(
    loss: LossFunction, params: Params, batch: Batch, num_microbatches: int
) -> tuple[LossSums, Params]:
    """Sums over the whole batch and the gradient of the summed objective, to be divided by the weight."""
    # Weight and tokens of the whole batch are known before any part of it is run: multiplied by their ratio here, the
    # routers' losses are divided by their tokens when all is divided by the weight. Dead code without a router.
    weight = jnp.sum(batch.weights_BT.astype(jnp.float32))
    tokens = jnp.sum((batch.segment_ids_BT1[:, :-1] > 0).astype(jnp.float32))
    per_token = weight / jnp.maximum(tokens, 1.0)

    def objective(params: Params, part: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss(params, part)
        if sums.router_objective is None:
            return sums.objective, sums
        return sums.objective + per_token * sums.router_objective, sums

    gradient = jax.grad(objective, has_aux=True)

    def both(part: Batch) -> tuple[LossSums, Params]:
        grads, sums = gradient(params, part)
        return sums, grads

    if num_microbatches == 1:
        return both(batch)
    parts = _microbatches(batch, num_microbatches)
    first = both(jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, both(part)), None

    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], parts))[0]


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where nothing was weighed."""
    return total / jnp.where(weight > 0, weight, 1.0)


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mesh: Mesh | None = None,
    num_microbatches: int = 1,
    health: HealthConfig = HealthConfig(),
    new_data_steps: Sequence[int] = (),
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
    counts: Callable[[Batch], dict[str, jax.Array]] | None = None,
) -> OnMesh:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated, do not touch it afterwards.

    At `new_data_steps` batches become of another kind, and the guard forgets what was usual.
    Metrics: loss (nats per token), z, weight (target tokens), grad_norm, learning_rate, ok, skipped, consecutive_skips,
    reason (index into health.REASONS), nll_by_source, weight_by_source.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch.tokens_BT1.shape[0], num_microbatches, mesh)
        trained = trained_part(state.params)

        def loss_of(trained: Params, part: Batch) -> LossSums:
            return loss(with_trained_part(state.params, trained), part)

        sums, grads = _sums_and_gradient(loss_of, trained, batch, num_microbatches)
        grads = jax.tree.map(lambda g: _mean(g, sums.weight), grads)
        grad_norm = optax.tree.norm(grads)
        before = renewed(state.health, state.step, new_data_steps)
        guard_state, ok = guard(before, sums.mean_objective(), grad_norm, health)
        # A batch without a target is no bad step, and its loss of zero is no measure for the next ones.
        is_empty = sums.weight <= 0
        ok = ok | is_empty
        guard_state = keep_if(~is_empty, guard_state, before)
        with jax.numpy_dtype_promotion("standard"):
            load_LE = None if sums.router is None else sums.router.load_E
            updates, opt_state = optimizer.update(
                grads, state.opt_state, trained, step=state.step, expert_load_LE=load_LE
            )
            moved = optax.apply_updates(trained, updates)
        moved, opt_state = keep_if(ok & ~is_empty, (moved, opt_state), (trained, state.opt_state))
        params = with_trained_part(state.params, moved)
        metrics = {
            "loss": _mean(sums.nll, sums.weight),
            "z": _mean(sums.z, sums.weight),
            "weight": sums.weight,
            "grad_norm": grad_norm,
            "ok": ok,
            "skipped": guard_state["skipped"],
            "consecutive_skips": guard_state["consecutive_skips"],
            "reason": guard_state["reason"],
            "nll_by_source": sums.nll_by_source,
            "weight_by_source": sums.weight_by_source,
        }
        if sums.router is not None:
            metrics |= sums.router.metrics()
        if counts is not None:
            metrics |= counts(batch)
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, health=guard_state)
        return new, metrics

    return OnMesh(jax.jit(train_step, donate_argnums=0), mesh)


def make_skip_step(*, mesh: Mesh | None = None, new_data_steps: Sequence[int] = ()) -> OnMesh:
    """The jitted `(state, reason) -> state` of a step that was refused before; the state is donated.

    It leaves the bits that the step itself left, and computes nothing: whatever made the loss bad then (a fault of a
    chip, say) need not do so again, and the run is to go on as if it had never been interrupted.
    """

    def skip_step(state: TrainState, reason: jax.Array) -> TrainState:
        before = renewed(state.health, state.step, new_data_steps)
        return dataclasses.replace(state, step=state.step + 1, health=refused(before, reason))

    return OnMesh(jax.jit(skip_step, donate_argnums=0), mesh)


def make_eval_step(loss: LossFunction, *, mesh: Mesh | None = None) -> OnMesh:
    """The jitted `(params, batch) -> LossSums`; add the sums of many batches, then divide."""
    return OnMesh(jax.jit(loss), mesh)


def check_batch(rows: int, num_microbatches: int, mesh: Mesh | None) -> None:
    """Refuse batches of so many rows when they cannot be split as asked.

    Raises:
      ConfigError: rows do not divide by microbatches times data-parallel devices.
    """
    devices = 1 if mesh is None else axis_size(mesh, DATA_AXES)
    if rows % (num_microbatches * devices):
        raise ConfigError(
            f"data.batch_rows must be a multiple of microbatches times data-parallel devices, "
            f"{num_microbatches} x {devices}, got {rows}"
        )
