"""Optimizers as optax chains, schedules as pure functions of the step, the width-transfer rule.

Updates run outside strict dtype promotion: optax mixes float32 with int32 in its bias corrections.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from pretrain.config import ConfigError
from pretrain.model.adapters import trained_part
from pretrain.model.layers import ParamSpec
from pretrain.model.moe import BiasBalance
from pretrain.model.transformer import ModelConfig, param_specs
from pretrain.sharding import axis_names, axis_size, current_mesh

# --- schedules: step -> factor on the peak rate -------------------------------------------------------


def _progress(step: Any, num_warmup_steps: int, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Warmup factor in (0, 1] and the done share of what follows, in [0, 1)."""
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum((step + 1.0) / max(num_warmup_steps, 1), 1.0)
    done = jnp.clip((step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1), 0.0, 1.0)
    return warmup, done


def _check(name: str, num_warmup_steps: float, **fractions: float) -> None:
    faults = []
    if num_warmup_steps < 0 or num_warmup_steps != int(num_warmup_steps):
        faults.append(f"num_warmup_steps must be a count of steps, got {num_warmup_steps}")
    for field, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            faults.append(f"{field} ({name}) must lie in [0, 1], got {value}")
    if faults:
        raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Warmup, then the peak for good."""

    num_warmup_steps: int = 0

    def __post_init__(self):
        _check("Constant", self.num_warmup_steps)

    def factor(self, step: Any, num_steps: int) -> jax.Array:
        """Share of the peak rate at `step` (from 0) of `num_steps`."""
        return _progress(step, self.num_warmup_steps, num_steps)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Warmup, then a straight line to `final_fraction` of the peak."""

    num_warmup_steps: int
    final_fraction: float = 0.0

    def __post_init__(self):
        _check("Linear", self.num_warmup_steps, final_fraction=self.final_fraction)

    def factor(self, step: Any, num_steps: int) -> jax.Array:
        """Share of the peak rate at `step` (from 0) of `num_steps`."""
        warmup, done = _progress(step, self.num_warmup_steps, num_steps)
        return warmup * (1.0 - (1.0 - self.final_fraction) * done)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Warmup, then half a cosine to `final_fraction` of the peak (arXiv 1608.03983)."""

    num_warmup_steps: int
    final_fraction: float = 0.1

    def __post_init__(self):
        _check("WarmupCosine", self.num_warmup_steps, final_fraction=self.final_fraction)

    def factor(self, step: Any, num_steps: int) -> jax.Array:
        """Share of the peak rate at `step` (from 0) of `num_steps`."""
        warmup, done = _progress(step, self.num_warmup_steps, num_steps)
        return warmup * (
            self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + jnp.cos(math.pi * done))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd:
    """Warmup, stable, decay over the last `decay_fraction` of all steps (arXiv 2404.06395).

    One long stable run gives many token budgets: branch a decay from any of its checkpoints. The shape
    one_minus_sqrt is from arXiv 2405.18392.
    """

    num_warmup_steps: int
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    shape: Literal["linear", "one_minus_sqrt"] = "linear"

    def __post_init__(self):
        _check(
            "Wsd",
            self.num_warmup_steps,
            decay_fraction=self.decay_fraction,
            final_fraction=self.final_fraction,
        )
        if self.shape not in ("linear", "one_minus_sqrt"):
            raise ConfigError(f"shape must be linear or one_minus_sqrt, got {self.shape!r}")

    def factor(self, step: Any, num_steps: int) -> jax.Array:
        """Share of the peak rate at `step` (from 0) of `num_steps`."""
        warmup, _ = _progress(step, self.num_warmup_steps, num_steps)
        num_decay = max(round(self.decay_fraction * num_steps), 1)
        done = jnp.clip((jnp.asarray(step, jnp.float32) - (num_steps - num_decay)) / num_decay, 0.0, 1.0)
        done = jnp.sqrt(done) if self.shape == "one_minus_sqrt" else done
        return warmup * (1.0 - (1.0 - self.final_fraction) * done)


Schedule = Constant | Linear | WarmupCosine | Wsd

# --- configs -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        faults = [
            f"{name} must lie in [0, 1), got {getattr(self, name)}"
            for name in ("b1", "b2")
            if not 0 <= getattr(self, name) < 1
        ]
        if not self.eps > 0:
            faults.append(f"eps must be positive, got {self.eps}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the matrices of blocks, AdamW for embedding, head and vectors (arXiv 2502.16982).

    Orthogonal updates are scaled by `consistent_rms` * sqrt(max(in, out)), so AdamW's rate and decay carry
    over; with width transfer by sqrt(out / in) instead.
    """

    momentum: float = 0.95
    num_iterations: int = 5
    consistent_rms: float = 0.2
    adamw: AdamWConfig = AdamWConfig()

    def __post_init__(self):
        faults = []
        if not 0 <= self.momentum < 1:
            faults.append(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.num_iterations < 1:
            faults.append(f"num_iterations must be at least 1, got {self.num_iterations}")
        if not self.consistent_rms > 0:
            faults.append(f"consistent_rms must be positive, got {self.consistent_rms}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Method, rate, schedule, decay of everything but vectors, clipping of the global gradient norm."""

    method: AdamWConfig | MuonConfig = AdamWConfig()
    peak_lr: float
    schedule: Schedule
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        faults = []
        if not 0 < self.peak_lr < math.inf:
            faults.append(f"peak_lr must be positive, got {self.peak_lr}")
        if self.weight_decay < 0:
            faults.append(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            faults.append(f"clip_norm must be positive or None, got {self.clip_norm}")
        if faults:
            raise ConfigError(*faults)

    def learning_rate(self, step: Any, num_steps: int) -> jax.Array:
        """The rate at `step` (from 0) of `num_steps`, before the factors of width transfer."""
        return self.peak_lr * self.schedule.factor(step, num_steps)


# --- the chain ---------------------------------------------------------------------------------------


def _sizes(spec: ParamSpec, value: Any) -> tuple[int, int]:
    """Rows in and columns out of a parameter read as a matrix."""
    fan_in = math.prod(value.shape[i] for i in spec.inputs)
    return fan_in, math.prod(value.shape[i] for i in spec.outputs)


def _map_specs(function: Any, params: Any) -> Any:
    return jax.tree.map(function, param_specs(params), params, is_leaf=lambda x: isinstance(x, ParamSpec))


def _scale_leaves(factors: Any) -> optax.GradientTransformation:
    """Multiply each leaf by its own number; leaves with factor 1 are left alone."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u if f == 1.0 else u * f, updates, factors)
    )


class _NoState(NamedTuple):
    """A state without arrays."""


def _scale_by_rate(config: OptimConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus the rate at `step`, which the caller passes in.

    optax's own scale_by_learning_rate counts updates, so a skipped step would shift the schedule.
    """

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
        rate = config.learning_rate(step, num_steps)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: _NoState(), update)


def _balance_experts(rate: float) -> optax.GradientTransformationExtraArgs:
    """Move the bias of every expert against its load in this step, `rate` at a time (arXiv 2408.15664)."""

    def update(
        updates: Any, state: Any, params: Any = None, *, expert_load_LE: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        mean_L1 = jnp.mean(expert_load_LE, axis=1, keepdims=True)
        move_LE = rate * jnp.sign(mean_L1 - expert_load_LE)

        def replaced(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
            return move_LE.astype(value.dtype) if path[-1].key == "router_bias" else value

        return jax.tree_util.tree_map_with_path(replaced, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: _NoState(), update)


def _adam(config: AdamWConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


class MuonState(NamedTuple):
    """Steps taken and the momentum of every matrix."""

    count: jax.Array
    mu: Any


def _scale_by_muon(config: MuonConfig, specs: Any) -> optax.GradientTransformation:
    """As optax.contrib.scale_by_muon with Nesterov momentum, but on any mesh (a test compares them)."""

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, config.momentum, 1)
        ahead = optax.tree.bias_correction(mu, config.momentum, optax.safe_increment(count))
        corrected = optax.tree.bias_correction(grads, config.momentum, count)
        mixed = jax.tree.map(lambda m, g: config.momentum * m + (1 - config.momentum) * g, ahead, corrected)
        updates = jax.tree.map(
            lambda spec, x: spec if _is_masked(spec) else orthogonalize(x, spec, config.num_iterations),
            specs,
            mixed,
            is_leaf=lambda x: isinstance(x, ParamSpec) or _is_masked(x),
        )
        return updates, MuonState(count, mu)

    return optax.GradientTransformation(
        lambda params: MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params)), update
    )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def orthogonalize(x: jax.Array, spec: ParamSpec, num_iterations: int) -> jax.Array:
    """Newton-Schulz of every matrix in a stack [layers, ...], on the mesh in scope.

    Where matrices are split over devices, all-to-all turns pieces of all layers into whole matrices of some
    layers; these iterate without communication and travel back. A stack that does not divide is padded.
    """
    numbers = contrib.MuonDimensionNumbers(spec.inputs, spec.outputs)
    # Without momentum this transformation is the iteration and nothing else.
    iteration = contrib.scale_by_muon(
        ns_steps=num_iterations, beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )

    def whole(x: jax.Array) -> jax.Array:
        return iteration.update(x, iteration.init(x))[0]

    mesh = current_mesh()
    if mesh is None:
        return whole(x)
    layout = jax.typeof(x).sharding.spec
    pieces = [(dim, axis) for dim in spec.inputs + spec.outputs for axis in reversed(axis_names(layout[dim]))]
    num_layers = x.shape[0]
    padding = -num_layers % axis_size(mesh, [axis for _, axis in pieces])

    def local(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        for dim, axis in pieces:
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dim, tiled=True)
        x = whole(x)
        for dim, axis in reversed(pieces):
            x = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=0, tiled=True)
        return x[:num_layers]

    return jax.shard_map(local, in_specs=layout, out_specs=layout)(x)


def _muon(config: MuonConfig, params: Any, width_transfer: bool) -> optax.GradientTransformation:
    roles = _map_specs(lambda spec, _: "muon" if spec.role == "matrix" else "adam", params)

    def factor(spec: ParamSpec, value: Any) -> Any:
        fan_in, fan_out = _sizes(spec, value)
        if width_transfer:
            return math.sqrt(fan_out / fan_in)
        return config.consistent_rms * math.sqrt(max(fan_in, fan_out))

    def of_matrices(function: Any) -> Any:
        return _map_specs(lambda s, v: function(s, v) if s.role == "matrix" else optax.MaskedNode(), params)

    muon = optax.chain(
        _scale_by_muon(config, of_matrices(lambda spec, _: spec)), _scale_leaves(of_matrices(factor))
    )
    return optax.partition({"muon": muon, "adam": _adam(config.adamw)}, roles)


def check_schedule(config: OptimConfig, num_steps: int) -> None:
    """Raises ConfigError where the schedule is longer than the run."""
    num_warmup = config.schedule.num_warmup_steps
    if num_warmup > num_steps:
        raise ConfigError(
            f"optim.schedule.num_warmup_steps must not exceed run.num_steps={num_steps}, got {num_warmup}; "
            "shorten the warmup or train longer"
        )


def make_optimizer(
    config: OptimConfig, num_steps: int, params: Any, model_config: ModelConfig
) -> optax.GradientTransformationExtraArgs:
    """The whole chain: clip, method, width transfer, decay, rate. `update` needs the keyword `step`.

    `params` are values or shapes. With `model_config.base_width` set, AdamW's rate on the matrices of blocks
    is divided by m while rate * decay stays constant (muP, arXiv 2203.03466; the head's 1/m is in forward).

    Raises:
      ConfigError: the schedule is longer than the run.
    """
    check_schedule(config, num_steps)
    params = trained_part(params)
    m = model_config.width_multiplier
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    match config.method:
        case AdamWConfig():
            parts.append(_adam(config.method))
            if m != 1.0:
                parts.append(
                    _scale_leaves(_map_specs(lambda spec, _: 1 / m if spec.role == "matrix" else 1.0, params))
                )
        case MuonConfig():
            parts.append(_muon(config.method, params, model_config.base_width is not None))
        case _:
            raise ConfigError(
                f"optim.method must be AdamWConfig or MuonConfig, got {type(config.method).__name__}"
            )
    if config.weight_decay:
        decayed = _map_specs(lambda spec, _: spec.role != "vector", params)
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    parts.append(_scale_by_rate(config, num_steps))
    moe = model_config.moe
    if moe is not None and isinstance(moe.balance, BiasBalance):
        parts.append(_balance_experts(moe.balance.rate))
    return optax.with_extra_args_support(optax.chain(*parts))
