"""The parts of a decoder block: norms, rotary embedding, attention projections, gated feed-forward.

B batch rows, T query time, S key time, D model width, N query heads, K key-value heads, H head width,
F hidden width, V vocabulary, L layers. Weights are float32; computing happens in `dtype`, norms and rotary
angles in float32.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.sharding import Dims, activation_spec, current_mesh, place, use_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """What a parameter is: its logical dims, its role for the optimizer, which dims are input and output."""

    dims: Dims
    role: Literal["embedding", "matrix", "head", "vector"]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


# By the last name in a parameter's path. Parameters of blocks carry one more dim, layers, in front.
PARAM_SPECS = {
    "embedding": ParamSpec(dims=("vocab", "embed"), role="embedding", inputs=(0,), outputs=(1,)),
    "kernel": ParamSpec(dims=("embed", "vocab"), role="head", inputs=(0,), outputs=(1,)),
    "query": ParamSpec(dims=("embed", "heads", None), role="matrix", inputs=(0,), outputs=(1, 2)),
    "key": ParamSpec(dims=("embed", "kv_heads", None), role="matrix", inputs=(0,), outputs=(1, 2)),
    "value": ParamSpec(dims=("embed", "kv_heads", None), role="matrix", inputs=(0,), outputs=(1, 2)),
    "out": ParamSpec(dims=("heads", None, "embed"), role="matrix", inputs=(0, 1), outputs=(2,)),
    # Gate and up are one array for one matmul, but two matrices for Muon: the middle dim is a batch.
    "gate_up": ParamSpec(dims=("embed", None, "mlp"), role="matrix", inputs=(0,), outputs=(2,)),
    "down": ParamSpec(dims=("mlp", "embed"), role="matrix", inputs=(0,), outputs=(1,)),
    # The router is small and float32: like the vectors it is neither decayed nor orthogonalized.
    "router": ParamSpec(dims=("embed", None), role="vector"),
    "router_bias": ParamSpec(dims=(None,), role="vector"),
    "expert_gate_up": ParamSpec(
        dims=("experts", "expert_embed", None, "mlp"), role="matrix", inputs=(1,), outputs=(3,)
    ),
    "expert_down": ParamSpec(
        dims=("experts", "mlp", "expert_embed"), role="matrix", inputs=(1,), outputs=(2,)
    ),
    "query_bias": ParamSpec(dims=("heads", None), role="vector"),
    "key_bias": ParamSpec(dims=("kv_heads", None), role="vector"),
    "value_bias": ParamSpec(dims=("kv_heads", None), role="vector"),
    "scale": ParamSpec(dims=(None,), role="vector"),
    "taps": ParamSpec(dims=(None, None), role="vector"),
}

# Rotary tables up to this many angles are constants of the program (2 MB as cosine and sine, both halves).
_MAX_CONSTANT = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All rotary frequencies divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1 release code)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama and Hugging Face."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def tables(
        self, positions_BT: Int[Array, "B T"], head_width: int, num_positions: int
    ) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine, each [B, T, 1, H] in float32; made once per batch, shared by all layers.

        Positions must lie in [0, `num_positions`); others give NaN. Short tables are constants of the program and
        are looked up: XLA:CPU would repeat sine and cosine in every fusion that uses them.
        """
        if num_positions * head_width <= _MAX_CONSTANT:
            angle_SH = np.outer(np.arange(num_positions), self.frequencies(np, head_width)).astype(np.float32)
            both = np.concatenate([np.cos(angle_SH)] * 2 + [np.sin(angle_SH)] * 2, axis=1)
            layout = activation_spec(("batch", "time", None), (*positions_BT.shape, 2 * head_width))
            found = jnp.asarray(both).at[positions_BT].get(mode="fill", out_sharding=layout)[:, :, None, :]
            return found[..., :head_width], found[..., head_width:]
        frequency_H = self.frequencies(jnp, head_width)
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None, :]
        angle = jnp.where((positions_BT < num_positions)[:, :, None, None], angle, jnp.nan)
        cos, sin = (jnp.concatenate([f(angle)] * 2, axis=-1) for f in (jnp.cos, jnp.sin))
        return cos, sin

    def frequencies(self, xnp: Any, head_width: int) -> Any:
        """Radians per position, float32, [H/2]; `xnp` is numpy or jax.numpy."""
        exponent = xnp.arange(0, head_width, 2, dtype=xnp.float32) / head_width
        frequency = 1.0 / xnp.power(xnp.float32(self.theta), exponent)
        if isinstance(self.scaling, LinearScaling):
            return frequency / self.scaling.factor
        if isinstance(self.scaling, Llama3Scaling):
            s = self.scaling
            turns = s.original_length * frequency / (2 * math.pi)
            ramp = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
            keep = xnp.clip(ramp, 0.0, 1.0)
            return keep * frequency + (1 - keep) * frequency / s.factor
        return frequency


@jax.custom_vjp
def rotate(x_BTNH: Float[Array, "B T N H"], tables: tuple[jax.Array, jax.Array]) -> Float[Array, "B T N H"]:
    """Apply rotary tables to queries or keys, in float32; the backward pass rotates back and keeps nothing."""
    cos, sin = tables
    x = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x_BTNH.dtype)


def _rotate_forward(x_BTNH: jax.Array, tables: Any) -> tuple[jax.Array, Any]:
    return rotate(x_BTNH, tables), tables


def _rotate_backward(tables: Any, d_BTNH: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = tables
    return rotate(d_BTNH, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def linear(
    x: Float[Array, "B T *inputs"], weight: Float[Array, "..."], dims: Dims
) -> Float[Array, "B T *outputs"]:
    """x times a weight of one or more input dims; the result lies as the activation table says for `dims`."""
    num_inputs = x.ndim - 2
    shape = (*x.shape[:2], *weight.shape[num_inputs:])
    if current_mesh() is None:
        rows = x.reshape(x.shape[0] * x.shape[1], -1)
        return _matmul(rows, weight.reshape(rows.shape[1], -1)).reshape(shape)
    contracted = (tuple(range(2, x.ndim)), tuple(range(num_inputs)))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), out_sharding=activation_spec(dims, shape))


# XLA:CPU multiplies a matrix by at most so many columns faster than so many rows by its transpose.
_FEW_ROWS = 64


def linear_by_columns(
    x: Float[Array, "B T *inputs"], weight: Float[Array, "..."], dims: Dims
) -> Float[Array, "B T *outputs"]:
    """`linear` for a weight whose outputs come first, on one device; made for decoding on a CPU.

    For 16 rows and [3072, 576] XLA:CPU takes 0.6 of the time of x W. The barriers keep it from turning the product
    back into that.
    """
    num_inputs = x.ndim - 2
    outputs = weight.shape[: weight.ndim - num_inputs]
    x_XI = x.reshape(x.shape[0] * x.shape[1], -1)
    product = product_by_columns(x_XI, weight.reshape(-1, x_XI.shape[1]), x.dtype)
    return product.reshape(*x.shape[:2], *outputs)


def product_by_columns(
    x_XI: Float[Array, "X I"], weight_OI: Float[Array, "O I"], dtype: Any
) -> Float[Array, "X O"]:
    """x times the transpose of a weight, in `dtype`."""
    if x_XI.shape[0] > _FEW_ROWS:
        return jax.lax.dot_general(x_XI, weight_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    x_IX = jax.lax.optimization_barrier(x_XI.T)
    out_OX = jax.lax.dot_general(weight_OI, x_IX, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(out_OX).T


@jax.custom_vjp
def _matmul(x_XI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """A matmul that spells its gradients out.

    JAX's own rule makes the weight's gradient as a transposed product; XLA:CPU then copies with strides and
    takes its slowest path: the step of a 0.87M model had 0.78 of nanoGPT's speed with it, 0.91 with this.
    """
    return x_XI @ weight_IO


def _matmul_forward(x_XI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_XI @ weight_IO, (x_XI, weight_IO)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], d_XO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_XI, weight_IO = residuals
    d_x = jax.lax.dot_general(d_XO, weight_IO, (((1,), (1,)), ((), ())))
    return d_x, jax.lax.dot_general(x_XI, d_XO, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dim, in float32."""

    def __init__(self, width: int, *, eps: float, plus_one: bool):
        # Gemma stores the scale minus one, so that weight decay pulls it to the identity.
        self.scale = nnx.Param((jnp.zeros if plus_one else jnp.ones)((width,), jnp.float32))
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = self.scale[...] + 1.0 if self.plus_one else self.scale[...]
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class ShortConv(nnx.Module):
    """x plus a causal convolution of each channel over its last few tokens (Canon layers, arXiv 2512.17351).

    It brings neighbors together without attention, which small models otherwise need layers and many tokens to learn.
    It begins as the identity.
    """

    def __init__(self, *, width: int, num_taps: int):
        self.taps = nnx.Param(jnp.zeros((num_taps, width), jnp.float32))

    def __call__(self, x_BTD: Float[Array, "B T D"], earlier: Any) -> Float[Array, "B T D"]:
        """`earlier(x, n)` are the values of 1 to n tokens before, as `earlier_tokens`."""
        taps_CD = use_weight(self.taps[...], (None, None), x_BTD.dtype)
        near = (x_BTD, *earlier(x_BTD, taps_CD.shape[0] - 1))
        out_BTD = x_BTD
        for tap_D, x in zip(taps_CD, near, strict=True):
            out_BTD = out_BTD + tap_D[None, None] * x
        return out_BTD


def earlier_tokens(
    x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], count: int
) -> tuple[Float[Array, "B T D"], ...]:
    """x of 1, 2, .. `count` tokens before in the same document (positions count from its start), 0 where there is none.

    With rows split over context, every device gets the last tokens of the part before its own.

    Raises:
      ConfigError: such a part has fewer than `count` tokens.
    """
    mesh = current_mesh()
    if mesh is None or mesh.shape["context"] == 1:
        return shifted(jnp.pad(x_BTD, ((0, 0), (count, 0), (0, 0))), positions_BT, count)
    parts = mesh.shape["context"]
    if x_BTD.shape[1] < parts * count:
        raise ConfigError(
            f"rows split over mesh.context={parts} must have {count} tokens a part or more (model.short_conv), "
            f"got rows of {x_BTD.shape[1]}; use fewer parts"
        )

    def local(x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        before = jax.lax.ppermute(x[:, -count:], "context", [(i, i + 1) for i in range(parts - 1)])
        return shifted(jnp.concatenate([before, x], axis=1), positions, count)

    x_spec = activation_spec(("batch", "time", None), x_BTD.shape)
    mapped = jax.shard_map(
        local,
        in_specs=(x_spec, activation_spec(("batch", "time"), positions_BT.shape)),
        out_specs=(x_spec,) * count,
    )
    return mapped(x_BTD, positions_BT)


def shifted(
    extended_BXD: Float[Array, "B X D"], positions_BT: Int[Array, "B T"], count: int
) -> tuple[Float[Array, "B T D"], ...]:
    """`earlier_tokens` of the last T of X = count + T tokens."""
    T = positions_BT.shape[1]
    return tuple(
        jnp.where((positions_BT >= n)[:, :, None], extended_BXD[:, count - n : count - n + T], 0)
        for n in range(1, count + 1)
    )


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245): projections, qk-norm, rotary; the product itself is passed in."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        qk_norm: bool,
        qkv_bias: bool,
        norm_eps: float,
        norm_plus_one: bool,
        out_std_factor: float,
        dtype: Any,
        rngs: nnx.Rngs,
        linear: Any = linear,
    ):
        D, N, K, H = width, num_heads, num_kv_heads, head_width
        self.query = normal_param(rngs, (D, N, H), D**-0.5)
        self.key = normal_param(rngs, (D, K, H), D**-0.5)
        self.value = normal_param(rngs, (D, K, H), D**-0.5)
        self.out = normal_param(rngs, (N, H, D), out_std_factor * (N * H) ** -0.5)
        self.qkv_bias, self.qk_norm, self.dtype, self.linear = qkv_bias, qk_norm, dtype, linear
        if qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros((N, H), jnp.float32))
            self.key_bias = nnx.Param(jnp.zeros((K, H), jnp.float32))
            self.value_bias = nnx.Param(jnp.zeros((K, H), jnp.float32))
        if qk_norm:
            self.query_norm = RMSNorm(H, eps=norm_eps, plus_one=norm_plus_one)
            self.key_norm = RMSNorm(H, eps=norm_eps, plus_one=norm_plus_one)

    def project(
        self, x_BTD: Float[Array, "B T D"], tables: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normed and rotated."""
        q, k, v = (
            self._projection(x_BTD, weight, name)
            for weight, name in ((self.query, "heads"), (self.key, "kv_heads"), (self.value, "kv_heads"))
        )
        if self.qkv_bias:
            q = q + use_weight(self.query_bias[...], ("heads", None), self.dtype)[None, None]
            k = k + use_weight(self.key_bias[...], ("kv_heads", None), self.dtype)[None, None]
            v = v + use_weight(self.value_bias[...], ("kv_heads", None), self.dtype)[None, None]
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, tables), rotate(k, tables), v

    def _projection(self, x_BTD: jax.Array, weight: nnx.Param, heads: str) -> jax.Array:
        w = use_weight(weight[...], ("embed", heads, None), self.dtype)
        return self.linear(x_BTD, w, ("batch", "time", heads, None))

    def finish(self, o_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output projection."""
        w = use_weight(self.out[...], ("heads", None, "embed"), self.dtype)
        return self.linear(o_BTNH, w, ("batch", "time", None))


class Mlp(nnx.Module):
    """Gated feed-forward (arXiv 2002.05202): silu for Llama and Qwen, tanh-gelu for Gemma."""

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int,
        activation: str,
        out_std_factor: float,
        dtype: Any,
        rngs: nnx.Rngs,
        linear: Any = linear,
    ):
        D, F = width, hidden_width
        self.gate_up = normal_param(rngs, (D, 2, F), D**-0.5)
        self.down = normal_param(rngs, (F, D), out_std_factor * F**-0.5)
        self.activation, self.dtype, self.linear = activation, dtype, linear

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = use_weight(self.gate_up[...], ("embed", None, "mlp"), self.dtype)
        down = use_weight(self.down[...], ("mlp", "embed"), self.dtype)
        both = self.linear(x_BTD, gate_up, ("batch", "time", None, "mlp"))
        hidden = activate(self.activation, both[:, :, 0]) * both[:, :, 1]
        return self.linear(hidden, down, ("batch", "time", None))


def activate(name: str, x: jax.Array) -> jax.Array:
    """The gate's nonlinearity.

    Raises:
      ConfigError: an unknown name.
    """
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
    raise ConfigError(f"model.activation must be silu or gelu_tanh, got {name!r}")


class Embedding(nnx.Module):
    """Token vectors: a gather from the table, or from each device's part of the vocabulary."""

    def __init__(self, *, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.embedding = normal_param(rngs, (vocab_size, width), std)


def look_up(
    embedding_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """Token vectors in `dtype`; with the vocabulary split over tensor, a masked local gather and a psum."""
    table = use_weight(embedding_VD, ("vocab", "embed"), dtype)
    tokens_BT = place(tokens_BT, ("batch", "time"))
    shape = (*tokens_BT.shape, table.shape[1])
    out = activation_spec(("batch", "time", None), shape)
    rows = activation_spec(("vocab", None), table.shape)
    if rows is None:
        return jnp.take(table, tokens_BT, axis=0, mode="clip")
    if rows[0] is None:
        return table.at[tokens_BT].get(mode="clip", out_sharding=out)
    ids = activation_spec(("batch", "time"), tokens_BT.shape)

    def local(table_vD: jax.Array, tokens: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(rows[0]) * table_vD.shape[0]
        here = (tokens >= first) & (tokens < first + table_vD.shape[0])
        found = jnp.take(table_vD, jnp.where(here, tokens - first, 0), axis=0)
        return jax.lax.psum(jnp.where(here[:, :, None], found, jnp.zeros_like(found)), rows[0])

    return jax.shard_map(local, in_specs=(rows, ids), out_specs=out)(table, tokens_BT)
