"""Cross-entropy from hidden vectors and the head matrix, in chunks of tokens: [B, T, V] never exists.

The loss is a weighted sum over tokens, so its gradients can be formed while a chunk's logits are at hand
(the idea of Liger Kernel, arXiv 2410.10989): three matmuls, nothing recomputed, the backward pass only scales.
On a mesh it runs in `shard_map`, because under plain jit the partitioner puts an all-reduce of the head's
gradient inside the loop over chunks.

B rows, T time, D width, V vocabulary, M tokens on one device, c tokens of a chunk, v local vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.model.moe import MoeConfig, RouterSums
from pretrain.sharding import ACTIVATION_RULES, PARAM_RULES, axis_names, current_mesh, partition_spec, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weight of the z-loss (lse squared; PaLM, arXiv 2204.02311) and how many tokens' logits exist at a time."""

    z_weight: float = 1e-4
    chunk_tokens: int = 1024

    def __post_init__(self):
        if self.z_weight < 0:
            raise ConfigError(f"z_weight must be at least 0, got {self.z_weight}; 0 leaves the z-loss out")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be positive, got {self.chunk_tokens}; 1024 is a good size")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "objective", "nll", "z", "weight", "nll_by_source", "weight_by_source", "router", "router_objective"
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over tokens, float32, nats; they add over chunks, microbatches and devices.

    Only `objective` = nll + z_weight * z and `router_objective` carry a gradient. The first is divided by the global
    weight, the second by the number of tokens routed: a router sends tokens on whatever they weigh as targets.
    """

    objective: jax.Array
    nll: jax.Array  # sum of weight * nll
    z: jax.Array  # sum of weight * lse^2
    weight: jax.Array
    nll_by_source: jax.Array  # [num_sources]
    weight_by_source: jax.Array
    router: RouterSums | None = None  # of a model with experts
    router_objective: jax.Array | None = None

    def with_router(self, router: RouterSums, config: MoeConfig) -> "LossSums":
        """These sums and those of the routers, whose losses stay apart."""
        return dataclasses.replace(self, router=router, router_objective=router.objective(config))

    def mean_objective(self) -> jax.Array:
        """What the sums of a whole batch say per token, zero without a target."""
        mean = self.objective / jnp.where(self.weight > 0, self.weight, 1.0)
        if self.router is None or self.router_objective is None:
            return mean
        tokens = jnp.max(self.router.tokens)  # every layer routes the same ones
        return mean + self.router_objective / jnp.maximum(tokens, 1.0)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What does not change between calls with the same trace."""

    z_weight: float
    softcap: float | None
    chunk_tokens: int


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    source_B: Int[Array, " B"],
    *,
    num_sources: int,
    z_weight: float = 0.0,
    chunk_tokens: int = 1024,
    softcap: float | None = None,
) -> LossSums:
    """Weighted sums of the negative log-likelihood, in all and per source.

    `head_DV` comes in its resting layout and dtype; it is cast to the dtype of `hidden_BTD`. Gradients reach
    hidden and head through `LossSums.objective` only; weights are data and get none. Do not wrap this in
    `jax.checkpoint`: that would run the forward pass, gradients included, twice.
    """
    static = _Static(z_weight, softcap, chunk_tokens)
    weights_BT, source_B = place(weights_BT, ("batch", "time")), place(source_B, ("batch",))
    objective, nll_BT, lse_BT = _objective(static, hidden_BTD, head_DV, targets_BT, weights_BT)
    nll_BT, lse_BT = lax.stop_gradient((nll_BT, lse_BT))
    weights_BT = lax.stop_gradient(weights_BT).astype(jnp.float32)
    row_nll_B = jnp.sum(weights_BT * nll_BT, axis=1)
    row_weight_B = jnp.sum(weights_BT, axis=1)
    of_source = (source_B[None, :] == jnp.arange(num_sources)[:, None]).astype(jnp.float32)
    return LossSums(
        objective=objective,
        nll=jnp.sum(row_nll_B),
        z=jnp.sum(weights_BT * jnp.square(lse_BT)),
        weight=jnp.sum(row_weight_B),
        nll_by_source=jnp.sum(of_source * row_nll_B[None, :], axis=1),
        weight_by_source=jnp.sum(of_source * row_weight_B[None, :], axis=1),
    )


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk_tokens: int = 1024,
    softcap: float | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of each target, differentiable with any cotangent per token.

    The backward pass makes the logits again, so it costs one matmul more than `cross_entropy`.
    """
    return _logprobs(_Static(0.0, softcap, chunk_tokens), hidden_BTD, head_DV, targets_BT)


# --- one device --------------------------------------------------------------------------------------


def _in_chunks(static: _Static, function: Any, carry: Any, xs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Scan `function(carry, chunk of xs)` over equal chunks of tokens; padding has target 0 and weight 0."""
    num_tokens = xs[0].shape[0]
    num_chunks = -(-num_tokens // static.chunk_tokens)
    if num_chunks == 1:
        return function(carry, xs)
    length = -(-num_tokens // num_chunks)
    padding = num_chunks * length - num_tokens

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return x.reshape(num_chunks, length, *x.shape[1:])

    carry, ys = lax.scan(function, carry, jax.tree.map(split, xs))
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:num_tokens], ys)


def _logits(static: _Static, hidden_cD: jax.Array, head_Dv: jax.Array) -> jax.Array:
    raw = jnp.einsum("cd,dv->cv", hidden_cD, head_Dv, preferred_element_type=jnp.float32)
    return raw if static.softcap is None else static.softcap * jnp.tanh(raw / static.softcap)


def _reduce(operation: Any, x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else operation(x, axis)


def _statistics(
    logits_cv: jax.Array, targets_c: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """nll, lse and which column is the target, with the vocabulary split over `axis`."""
    first = 0 if axis is None else lax.axis_index(axis) * logits_cv.shape[1]
    columns = lax.broadcasted_iota(targets_c.dtype, logits_cv.shape, 1)
    hit_cv = columns == (targets_c - first)[:, None]
    top_c = _reduce(lax.pmax, jnp.max(logits_cv, axis=1), axis)
    total_c = _reduce(lax.psum, jnp.sum(jnp.exp(logits_cv - top_c[:, None]), axis=1), axis)
    target_c = _reduce(lax.psum, jnp.sum(jnp.where(hit_cv, logits_cv, 0.0), axis=1), axis)
    lse_c = top_c + jnp.log(total_c)
    return lse_c - target_c, lse_c, hit_cv


def _through_softcap(static: _Static, d_cv: jax.Array, logits_cv: jax.Array) -> jax.Array:
    """Cotangent of the raw logits from that of the capped ones."""
    return d_cv if static.softcap is None else d_cv * (1.0 - jnp.square(logits_cv / static.softcap))


def _value(static: _Static, axis: str | None, hidden_MD: Any, head_Dv: Any, targets_M: Any) -> tuple:
    """nll and lse of every token."""

    def chunk(_: None, xs: tuple) -> tuple:
        nll_c, lse_c, _hit = _statistics(_logits(static, xs[0], head_Dv), xs[1], axis)
        return None, (nll_c, lse_c)

    return _in_chunks(static, chunk, None, (hidden_MD, targets_M))[1]


def _pull_back(d_cv: jax.Array, hidden_cD: jax.Array, head_Dv: jax.Array, axis: str | None) -> tuple:
    """Gradients of hidden and head from those of the logits."""
    d_cv = d_cv.astype(hidden_cD.dtype)
    d_hidden = jnp.einsum("cv,dv->cd", d_cv, head_Dv, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("cd,cv->dv", hidden_cD, d_cv, preferred_element_type=jnp.float32)
    return _reduce(lax.psum, d_hidden, axis).astype(hidden_cD.dtype), d_head


def _value_and_gradient(
    static: _Static, axis: str | None, hidden_MD: Any, head_Dv: Any, targets_M: Any, weights_M: Any
) -> tuple:
    """nll, lse, gradient of hidden, gradient of head (float32), for the weighted sum of nll + z lse^2."""

    def chunk(d_head: jax.Array | None, xs: tuple) -> tuple:
        hidden_cD, targets_c, weights_c = xs
        logits_cv = _logits(static, hidden_cD, head_Dv)
        nll_c, lse_c, hit_cv = _statistics(logits_cv, targets_c, axis)
        softmax_cv = jnp.exp(logits_cv - lse_c[:, None])
        pull_c = 1.0 + 2.0 * static.z_weight * lse_c
        d_cv = weights_c[:, None] * (softmax_cv * pull_c[:, None] - hit_cv.astype(jnp.float32))
        d_hidden, d_head_chunk = _pull_back(
            _through_softcap(static, d_cv, logits_cv), hidden_cD, head_Dv, axis
        )
        return (d_head_chunk if d_head is None else d_head + d_head_chunk), (nll_c, lse_c, d_hidden)

    one_chunk = hidden_MD.shape[0] <= static.chunk_tokens
    start = None if one_chunk else jnp.zeros(head_Dv.shape, jnp.float32)
    d_head, (nll_M, lse_M, d_hidden) = _in_chunks(static, chunk, start, (hidden_MD, targets_M, weights_M))
    return nll_M, lse_M, d_hidden, d_head


def _logprob_gradient(
    static: _Static, axis: str | None, hidden_MD: Any, head_Dv: Any, targets_M: Any, lse_M: Any, d_M: Any
) -> tuple:
    """Gradients of hidden and head for any cotangent per token; logits are made again."""

    def chunk(d_head: jax.Array, xs: tuple) -> tuple:
        hidden_cD, targets_c, lse_c, d_c = xs
        logits_cv = _logits(static, hidden_cD, head_Dv)
        first = 0 if axis is None else lax.axis_index(axis) * logits_cv.shape[1]
        hit_cv = lax.broadcasted_iota(targets_c.dtype, logits_cv.shape, 1) == (targets_c - first)[:, None]
        d_cv = d_c[:, None] * (hit_cv.astype(jnp.float32) - jnp.exp(logits_cv - lse_c[:, None]))
        d_hidden, d_head_chunk = _pull_back(
            _through_softcap(static, d_cv, logits_cv), hidden_cD, head_Dv, axis
        )
        return d_head + d_head_chunk, d_hidden

    start = jnp.zeros(head_Dv.shape, jnp.float32)
    d_head, d_hidden = _in_chunks(static, chunk, start, (hidden_MD, targets_M, lse_M, d_M))
    return d_hidden, d_head


# --- any mesh ----------------------------------------------------------------------------------------


def _spread(function: Any, hidden_BTD: Any, head_DV: Any, arrays_BT: tuple, outputs: str) -> tuple:
    """Call `function(axis, hidden_MD, head_Dv, *arrays_M)` with the tokens of each device.

    `outputs` names what comes back: t an array per token, h a gradient of hidden, w a gradient of the head.
    The head is gathered once before and its gradient reduce-scattered once after the loop over chunks.
    """
    dtype = hidden_BTD.dtype
    mesh = current_mesh()

    def flatten(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    def unflatten(values: tuple, rows: tuple[int, int], finish_head: Any) -> tuple:
        finished = []
        for kind, value in zip(outputs, values, strict=True):
            finished.append(finish_head(value) if kind == "w" else value.reshape(*rows, *value.shape[1:]))
        return tuple(finished)

    if mesh is None:
        values = function(None, flatten(hidden_BTD), head_DV.astype(dtype), *map(flatten, arrays_BT))
        return unflatten(values, hidden_BTD.shape[:2], lambda w: w.astype(head_DV.dtype))

    head_spec = partition_spec(("embed", "vocab"), head_DV.shape, PARAM_RULES, mesh)
    hidden_spec = partition_spec(("batch", "time", None), hidden_BTD.shape, ACTIVATION_RULES, mesh)
    token_spec = jax.sharding.PartitionSpec(*hidden_spec[:2])
    axis = head_spec[1]
    gathered = axis_names(head_spec[0])
    summed = tuple(
        name for name in axis_names(hidden_spec[0]) + axis_names(hidden_spec[1]) if name not in gathered
    )

    def local(hidden: jax.Array, head: jax.Array, *arrays: jax.Array) -> tuple:
        whole = head.astype(dtype)
        whole = lax.all_gather(whole, gathered, axis=0, tiled=True) if gathered else whole

        def finish_head(d_head: jax.Array) -> jax.Array:
            if gathered:
                d_head = lax.psum_scatter(d_head, gathered, scatter_dimension=0, tiled=True)
            return (lax.psum(d_head, summed) if summed else d_head).astype(head.dtype)

        values = function(axis, flatten(hidden), whole, *map(flatten, arrays))
        return unflatten(values, hidden.shape[:2], finish_head)

    out_specs = tuple({"t": token_spec, "h": hidden_spec, "w": head_spec}[kind] for kind in outputs)
    in_specs = (hidden_spec, head_spec, *(token_spec for _ in arrays_BT))
    arguments = jax.tree.map(jax.sharding.reshard, (hidden_BTD, head_DV, *arrays_BT), in_specs)
    # Nothing differentiates through this shard_map (gradients are outputs), so the check of what varies
    # over which axis, made for transposition, is off.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


def _total(static: _Static, nll_BT: jax.Array, lse_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    return jnp.sum(weights_BT.astype(jnp.float32) * (nll_BT + static.z_weight * jnp.square(lse_BT)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(static: _Static, hidden_BTD: Any, head_DV: Any, targets_BT: Any, weights_BT: Any) -> tuple:
    value = functools.partial(_value, static)
    nll_BT, lse_BT = _spread(value, hidden_BTD, head_DV, (targets_BT,), "tt")
    return _total(static, nll_BT, lse_BT, weights_BT), nll_BT, lse_BT


def _objective_forward(
    static: _Static, hidden_BTD: Any, head_DV: Any, targets_BT: Any, weights_BT: Any
) -> tuple:
    both = functools.partial(_value_and_gradient, static)
    arrays = (targets_BT, weights_BT.astype(jnp.float32))
    nll_BT, lse_BT, d_hidden, d_head = _spread(both, hidden_BTD, head_DV, arrays, "tthw")
    return (_total(static, nll_BT, lse_BT, weights_BT), nll_BT, lse_BT), (d_hidden, d_head)


def _objective_backward(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None


_objective.defvjp(_objective_forward, _objective_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static: _Static, hidden_BTD: Any, head_DV: Any, targets_BT: Any) -> jax.Array:
    return _logprobs_forward(static, hidden_BTD, head_DV, targets_BT)[0]


def _logprobs_forward(static: _Static, hidden_BTD: Any, head_DV: Any, targets_BT: Any) -> tuple:
    value = functools.partial(_value, static)
    nll_BT, lse_BT = _spread(value, hidden_BTD, head_DV, (targets_BT,), "tt")
    return -nll_BT, (hidden_BTD, head_DV, targets_BT, lse_BT)


def _logprobs_backward(static: _Static, residuals: tuple, d_BT: jax.Array) -> tuple:
    hidden_BTD, head_DV, targets_BT, lse_BT = residuals
    gradient = functools.partial(_logprob_gradient, static)
    arrays = (targets_BT, lse_BT, d_BT.astype(jnp.float32))
    d_hidden, d_head = _spread(gradient, hidden_BTD, head_DV, arrays, "hw")
    return d_hidden, d_head, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
