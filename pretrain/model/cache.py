"""The key-value cache, and the decoder run against it: `extend` gives rows more tokens, one or a whole prompt.

Layers stand apart here, weights and cache alike, where training stacks them: a slice of a stack would be copied
at every step, and decoding does nothing but stream weights from memory. On a CPU matrices lie with their outputs
first, see `layers.linear_by_columns`. A layer with a window keeps a ring of the newest positions, long enough for
the window and the longest extension. A model with short convolutions also keeps what the last few tokens gave them.

Letters as in layers.py; S entries of a layer's cache, K its key-value heads on the mesh.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.kernels.attention.api import target
from pretrain.kernels.attention.decode import decode_attention
from pretrain.model.adapters import merged_params
from pretrain.model.layers import ParamSpec, linear, linear_by_columns, look_up, product_by_columns, shifted
from pretrain.model.transformer import (
    LayerKind,
    ModelConfig,
    Params,
    block_definition,
    final_hidden,
    logits,
    param_specs,
    soft_capped,
)
from pretrain.sharding import Dims, activation_spec, axis_names, current_mesh, place, use_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values [B, K, S, H] of every layer, and how many positions each row has been given.

    `recent` has for every layer what its two short convolutions read of the last C - 1 tokens, [B, 2, C - 1, D] for
    C taps; nothing for models without.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    recent: tuple[Array, ...]
    lengths_B: Array


_KEYS: Dims = ("batch", "kv_heads", None, None)
_RECENT: Dims = ("batch", None, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of a cache: rows, the longest text of a row, the most tokens of one `extend`, the dtype."""

    rows: int
    max_length: int
    max_extend: int
    dtype: str

    def entries(self, kind: LayerKind) -> int:
        """Entries of a layer of this kind: all positions, or a ring for its window."""
        if kind.window is None:
            return self.max_length
        return min(self.max_length, kind.window + self.max_extend - 1)


def kv_heads(model: ModelConfig) -> int:
    """Key-value heads of the cache: repeated where the tensor axis has more parts than there are heads.

    Raises:
      ConfigError: neither divides the other.
    """
    mesh = current_mesh()
    parts = 1 if mesh is None else mesh.shape["tensor"]
    if model.num_kv_heads % parts == 0:
        return model.num_kv_heads
    if parts % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads and mesh.tensor must divide one another, got {model.num_kv_heads} and {parts}"
        )
    return parts


def empty_cache(model: ModelConfig, config: CacheConfig) -> Cache:
    """A cache that holds nothing; on a mesh rows lie over the data axes and heads over tensor."""
    K = kv_heads(model)

    def layers() -> tuple[Array, ...]:
        shapes = [
            (config.rows, K, config.entries(model.kind(i)), model.head_width) for i in range(model.num_layers)
        ]
        return tuple(_zeros(shape, config.dtype, _KEYS) for shape in shapes)

    recent: tuple[Array, ...] = ()
    if model.short_conv is not None:
        shape = (config.rows, 2, model.short_conv - 1, model.width)
        recent = tuple(_zeros(shape, model.dtype, _RECENT) for _ in range(model.num_layers))
    return Cache(layers(), layers(), recent, _zeros((config.rows,), jnp.int32, ("batch",)))


def _zeros(shape: tuple[int, ...], dtype: Any, dims: tuple[str | None, ...]) -> Array:
    return jnp.zeros(shape, dtype, out_sharding=activation_spec(dims, shape))


def decoding_params(params: Params, model: ModelConfig) -> Params:
    """Parameters as `extend` wants them: layers apart, in the compute dtype, laid out for use.

    They are copies: every device holds the whole model, or its part of the tensor axis. Not to be traced.
    """
    params = merged_params(params)

    def used(spec: ParamSpec, weight: Array, layer: int | None) -> Array:
        # Norms and routers compute in float32, as in training.
        dtype = weight.dtype if spec.role == "vector" else jnp.dtype(model.dtype)
        turned = _outputs_first() and spec.role in ("matrix", "head") and "experts" not in spec.dims
        order = tuple(sorted(range(weight.ndim), key=lambda i: i in spec.inputs)) if turned else None
        return _used(weight, None if layer is None else jnp.int32(layer), spec.dims, dtype, order)

    def tree(name: str, layer: int | None = None) -> Any:
        return jax.tree.map(
            lambda s, w: used(s, w, layer),
            specs[name],
            params[name],
            is_leaf=lambda x: isinstance(x, ParamSpec),
        )

    specs = param_specs(params)
    whole = {name: tree(name) for name in params if name != "blocks"}
    whole["layers"] = tuple(tree("blocks", i) for i in range(model.num_layers))
    return whole


def _outputs_first() -> bool:
    """Whether matrices are turned here."""
    return current_mesh() is None and target()[0] == "cpu"


@functools.partial(jax.jit, static_argnames=("dims", "dtype", "order"))
def _used(weight: Array, layer: Array | None, dims: Dims, dtype: Any, order: tuple[int, ...] | None) -> Array:
    """One layer of a stack, or all of a weight, its dims in `order`; a program for each shape and not for each layer."""
    if layer is not None:
        weight, dims = jax.lax.dynamic_index_in_dim(weight, layer, axis=0, keepdims=False), dims[1:]
        order = None if order is None else tuple(i - 1 for i in order[1:])
    if order is not None:
        weight, dims = jnp.transpose(weight, order), tuple(dims[i] for i in order)
    return use_weight(weight, dims, dtype)


def extend(
    params: Params,
    model: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    num_new_B: Int[Array, " B"],
    cache: Cache,
    *,
    max_length: int,
    attention_impl: str = "auto",
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden vectors before the head of the first num_new_B[b] tokens of each row, which join the cache.

    `params` come from `decoding_params`. What follows a row's new tokens is padding: it is computed, means nothing
    and is not kept. A row may have none. Rows must not pass `max_length`.
    """
    B, T = tokens_BT.shape
    starts_B, lengths_B = cache.lengths_B, cache.lengths_B + num_new_B
    offset_T = jnp.arange(T, dtype=jnp.int32)
    positions_BT = place(jnp.minimum(starts_B[:, None] + offset_T[None], max_length - 1), ("batch", "time"))
    x_BTD = look_up(params["embed"]["embedding"], tokens_BT, model.dtype)
    if model.embed_scale:
        x_BTD = x_BTD * jnp.asarray(math.sqrt(model.width), x_BTD.dtype)
    tables_of = {
        kind.rope: kind.rope.tables(positions_BT, model.head_width, max_length)
        for kind in model.layer_pattern
    }
    definition = block_definition(model, linear_by_columns if _outputs_first() else linear)
    keys, values, recent = [], [], []
    for i, layer in enumerate(params["layers"]):
        kind = model.kind(i)
        serve = functools.partial(
            decode_attention, spec=model.spec(kind), max_length=max_length, impl=attention_impl
        )

        def attend(q: Array, k: Array, v: Array, i: int = i, serve: Any = serve) -> Array:
            o, new_k, new_v = _attend(q, k, v, cache.k[i], cache.v[i], starts_B, lengths_B, serve)
            keys.append(new_k)
            values.append(new_v)
            return o

        kept: list[Array] = []

        def earlier(x: Array, count: int, i: int = i, kept: list[Array] = kept) -> tuple[Array, ...]:
            before, new = _earlier(x, cache.recent[i], len(kept), starts_B, num_new_B, count)
            kept.append(new)
            return before

        x_BTD = nnx.merge(definition, layer)(x_BTD, tables_of[kind.rope], attend, earlier)
        if kept:
            recent.append(place(jnp.stack(kept, axis=1), _RECENT))
    return final_hidden(x_BTD, params, model), Cache(tuple(keys), tuple(values), tuple(recent), lengths_B)


def next_logits(
    hidden_BTD: Float[Array, "B T D"], params: Params, model: ModelConfig
) -> Float[Array, "B T V"]:
    """`logits` with parameters from `decoding_params`."""
    if not _outputs_first():
        return logits(hidden_BTD, params, model)
    head_VD = params["embed"]["embedding"] if model.tied_head else params["head"]["kernel"]
    B, T, D = hidden_BTD.shape
    out_XV = product_by_columns(hidden_BTD.reshape(B * T, D), head_VD.astype(hidden_BTD.dtype), jnp.float32)
    return soft_capped(out_XV.reshape(B, T, -1), model)


def _attend(q, k, v, cache_k, cache_v, starts_B, lengths_B, serve):
    """Write the new keys and values, then attend; on a mesh each device to its rows and heads."""

    def local(q, k, v, cache_k, cache_v, starts_B, lengths_B):
        cache_k = append(cache_k, k, starts_B, lengths_B)
        cache_v = append(cache_v, v, starts_B, lengths_B)
        o = serve(q, cache_k, cache_v, starts_B, lengths_B)
        return o, cache_k, cache_v

    arguments = (q, k, v, cache_k, cache_v, starts_B, lengths_B)
    if current_mesh() is None:
        return local(*arguments)
    q_spec = activation_spec(("batch", "time", "heads", None), q.shape)
    kv_spec = activation_spec(("batch", "time", "kv_heads", None), k.shape)
    cache_spec = activation_spec(("batch", "kv_heads", None, None), cache_k.shape)
    row_spec = activation_spec(("batch",), starts_B.shape)
    if k.shape[2] != cache_k.shape[1]:
        times = cache_k.shape[1] // k.shape[2]
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
        arguments = (q, k, v, *arguments[3:])
        kv_spec = activation_spec(("batch", "time", "kv_heads", None), k.shape)
        arguments = (q, *(place(x, ("batch", "time", "kv_heads", None)) for x in (k, v)), *arguments[3:])
    return jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, cache_spec, cache_spec, row_spec, row_spec),
        out_specs=(q_spec, cache_spec, cache_spec),
    )(*arguments)


def _earlier(
    x_BTD: Float[Array, "B T D"],
    recent_B2CD: Float[Array, "B 2 C D"],
    which: int,
    starts_B: Int[Array, " B"],
    num_new_B: Int[Array, " B"],
    count: int,
) -> tuple[tuple[Array, ...], Float[Array, "B C D"]]:
    """Values of 1 to C = `count` tokens before, and the last C of the row's own tokens, for the next extension."""

    def local(x, recent, starts, num_new):
        extended = jnp.concatenate([recent[:, which], x], axis=1)
        # A row that begins anew finds what was there before it; positions say that it is not its own.
        positions = starts[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        last = jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, count, axis=0))(extended, num_new)
        return shifted(extended, positions, count), last

    arguments = (x_BTD, recent_B2CD, starts_B, num_new_B)
    if current_mesh() is None:
        return local(*arguments)
    specs = tuple(
        activation_spec(dims, a.shape)
        for dims, a in zip((("batch", "time", None), _RECENT, ("batch",), ("batch",)), arguments, strict=True)
    )
    return jax.shard_map(local, in_specs=specs, out_specs=((specs[0],) * count, specs[0]))(*arguments)


def append(
    cache_BKSH: Float[Array, "B K S H"],
    new_BTKH: Float[Array, "B T K H"],
    starts_B: Int[Array, " B"],
    lengths_B: Int[Array, " B"],
) -> Float[Array, "B K S H"]:
    """Row b's first lengths_B[b] - starts_B[b] new entries at positions starts_B[b] and on, modulo the ring."""
    B, T = new_BTKH.shape[:2]
    S = cache_BKSH.shape[2]
    position_BT = starts_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    # An entry outside the cache is dropped: padding must not overwrite the ring.
    entry_BT = jnp.where(position_BT < lengths_B[:, None], jnp.mod(position_BT, S), S)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    return cache_BKSH.at[row_B1, :, entry_BT].set(new_BTKH.astype(cache_BKSH.dtype), mode="drop")


def copy_row(target: Cache, slot: Int[Array, ""], source: Cache, row: Int[Array, ""]) -> Cache:
    """`target` with row `slot` replaced by row `row` of `source`, a cache of the same layers and lengths."""

    def copy(targets: tuple[Array, ...], sources: tuple[Array, ...], dims: Dims) -> tuple[Array, ...]:
        return tuple(
            set_row(t, slot, get_row(s, row, dims), dims) for t, s in zip(targets, sources, strict=True)
        )

    lengths_B = set_row(target.lengths_B, slot, get_row(source.lengths_B, row, ("batch",)), ("batch",))
    return Cache(
        copy(target.k, source.k, _KEYS),
        copy(target.v, source.v, _KEYS),
        copy(target.recent, source.recent, _RECENT),
        lengths_B,
    )


def get_row(x_BX: Array, row: Int[Array, ""], dims: tuple[str | None, ...]) -> Array:
    """x_BX[row], on every device of the data axes; `dims` are those of x_BX."""
    return jax.lax.dynamic_index_in_dim(place(x_BX, (None, *dims[1:])), row, axis=0, keepdims=False)


def set_row(x_BX: Array, slot: Int[Array, ""], row_X: Array, dims: tuple[str | None, ...]) -> Array:
    """x_BX with row `slot` replaced, in place where x_BX is donated; on a mesh by the device that has the row."""
    if current_mesh() is None:
        return jax.lax.dynamic_update_index_in_dim(x_BX, row_X.astype(x_BX.dtype), slot, axis=0)
    spec = activation_spec(dims, x_BX.shape)
    row_spec = activation_spec(dims[1:], row_X.shape)
    assert spec is not None
    axes = axis_names(spec[0])

    def local(x_bX: Array, slot: Array, row_X: Array) -> Array:
        index = slot - jax.lax.axis_index(axes) * x_bX.shape[0] if axes else slot
        here = (index >= 0) & (index < x_bX.shape[0])
        index = jnp.clip(index, 0, x_bX.shape[0] - 1)
        old_X = jax.lax.dynamic_index_in_dim(x_bX, index, axis=0, keepdims=False)
        new_X = jnp.where(here, row_X.astype(x_bX.dtype), old_X)
        return jax.lax.dynamic_update_index_in_dim(x_bX, new_X, index, axis=0)

    return jax.shard_map(local, in_specs=(spec, P(), row_spec), out_specs=spec)(x_BX, slot, row_X)
