"""The decoder: defined in flax NNX, run as a pure function of a plain nested dict of arrays.

NNX builds the parameters (blocks under `nnx.vmap`, so their arrays carry a leading layers dim) and turns one
layer's arrays back into a block inside the scan. Everything else sees a dict, whose names do not depend on NNX.

Letters as in layers.py: B T S D N K H F V L.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pretrain.config import ConfigError, local
from pretrain.kernels.attention.api import AttentionSpec, attention, prepare_plan
from pretrain.kernels.attention.plan import PackPlan, make_plan
from pretrain.model.adapters import ADAPTERS, AdapterConfig, adapter_spec, add_adapters, merged
from pretrain.model.layers import (
    PARAM_SPECS,
    Attention,
    Embedding,
    Mlp,
    ParamSpec,
    RMSNorm,
    Rope,
    ShortConv,
    earlier_tokens,
    linear,
    look_up,
)
from pretrain.model.moe import Experts, MoeConfig, RouterSums
from pretrain.model.ring import ring_attention
from pretrain.sharding import activation_spec, current_mesh, place, shardings_of, use_weight

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One entry of the layer pattern: attention over the whole document or over a window of rows."""

    window: int | None = None
    rope: Rope = Rope()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and mathematics of a decoder; the vocabulary comes from the tokenizer."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    hidden_width: int
    # The kinds of layers, repeated from the first layer on; Gemma 3 is five windows and one global.
    layer_pattern: tuple[LayerKind, ...] = (LayerKind(),)
    activation: Literal["silu", "gelu_tanh"] = "silu"
    # Experts instead of one feed-forward network in every layer, each of hidden_width.
    moe: MoeConfig | None = None
    # Marin's 32B left a regime of loss spikes only through qk-norm; imports of Llama and Qwen 2 turn it off.
    qk_norm: bool = True
    qkv_bias: bool = False
    tied_head: bool = False
    embed_scale: bool = False
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    # A convolution over so many tokens before attention and before the feed-forward network; see ShortConv.
    short_conv: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    # Width transfer (muP, arXiv 2203.03466): hyperparameters were chosen at this width. None turns it off.
    base_width: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_impl: str = local("auto")
    # Over the context axis: keys of the whole row on every device, or one block at a time (ring.py).
    context_attention: Literal["gather", "ring"] = local("gather")
    scan_layers: bool = local(True)
    # What the backward pass finds in memory: inputs of layers; attention results too; both, but in the memory of the
    # host; both and the products with weights (not those of experts); everything.
    remat: Literal["full", "save_attention", "offload", "save_products", "none"] = local("none")

    def __post_init__(self):
        faults = []
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_width", "hidden_width"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_width % 2:
            faults.append(f"head_width must be even for rotary embedding, got {self.head_width}")
        if self.short_conv is not None and self.short_conv < 2:
            faults.append(
                f"short_conv counts the token itself and must be at least 2, got {self.short_conv}; use none for none"
            )
        if not self.layer_pattern:
            faults.append("layer_pattern must name at least one LayerKind, got ()")
        for name, allowed in (
            ("activation", ("silu", "gelu_tanh")),
            ("dtype", ("float32", "bfloat16")),
            ("remat", ("full", "save_attention", "offload", "save_products", "none")),
            ("context_attention", ("gather", "ring")),
        ):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.context_attention == "ring" and self.attention_impl != "auto":
            faults.append(
                f"context_attention='ring' has an attention of its own, got attention_impl={self.attention_impl!r}; "
                "leave that on auto, or take context_attention='gather'"
            )
        if faults:
            raise ConfigError(*faults)

    @property
    def width_multiplier(self) -> float:
        """m = width / base_width, or 1 without width transfer."""
        return 1.0 if self.base_width is None else self.width / self.base_width

    def kind(self, layer: int) -> LayerKind:
        """The kind of layer `layer`."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def spec(self, kind: LayerKind) -> AttentionSpec:
        """What the attention op is asked for in layers of this kind."""
        return AttentionSpec(
            causal=True, window=kind.window, softcap=self.attention_softcap, scale=self.attention_scale
        )

    def base(self) -> "ModelConfig":
        """The model that others see: this one, or what remains when its adapters are merged."""
        return self

    def with_adapters(self, adapters: AdapterConfig) -> "AdaptedModelConfig":
        """This model frozen, to be trained by adapters."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)}
        return AdaptedModelConfig(**fields, adapters=adapters)

    def complete(self, params: Params, key: jax.Array) -> Params:
        """The decoder's parameters with those that this kind of model adds."""
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedModelConfig(ModelConfig):
    """A frozen model with trained low-rank adapters, see adapters.py."""

    adapters: AdapterConfig

    def base(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})

    def complete(self, params: Params, key: jax.Array) -> Params:
        return {**params, "blocks": add_adapters(params["blocks"], self.adapters, key)}


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    `product` multiplies by weights as they lie: `layers.linear`, or `linear_by_columns` where a cache has turned them.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, product: Any = linear):
        c = config
        norm = functools.partial(RMSNorm, c.width, eps=c.norm_eps, plus_one=c.norm_plus_one)
        # Two residual branches a layer: their sum keeps unit scale at any depth.
        out_std_factor = (2 * c.num_layers) ** -0.5
        self.attention_norm = norm()
        self.attention = Attention(
            width=c.width,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_width=c.head_width,
            qk_norm=c.qk_norm,
            qkv_bias=c.qkv_bias,
            norm_eps=c.norm_eps,
            norm_plus_one=c.norm_plus_one,
            out_std_factor=out_std_factor,
            dtype=c.dtype,
            rngs=rngs,
            linear=product,
        )
        self.mlp_norm = norm()
        if c.moe is None:
            feed_forward = functools.partial(Mlp, linear=product)
        else:
            feed_forward = functools.partial(Experts, config=c.moe)
        self.mlp = feed_forward(
            width=c.width,
            hidden_width=c.hidden_width,
            activation=c.activation,
            out_std_factor=out_std_factor,
            dtype=c.dtype,
            rngs=rngs,
        )
        self.short_conv = c.short_conv is not None
        if c.short_conv is not None:
            self.attention_conv = ShortConv(width=c.width, num_taps=c.short_conv)
            self.mlp_conv = ShortConv(width=c.width, num_taps=c.short_conv)
        self.post_norms = c.post_norms
        if c.post_norms:
            self.post_attention_norm = norm()
            self.post_mlp_norm = norm()

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tables: Any, attend: Any, earlier: Any
    ) -> Float[Array, "B T D"]:
        """`tables` are the rotary tables, `attend(q, k, v)` the attention product for this kind of layer.

        `earlier(x, n)` are the values of earlier tokens, as `layers.earlier_tokens`; asked for with `short_conv`, first
        of what attention reads, then of what the feed-forward network does.
        """
        return self.with_router(x_BTD, tables, attend, earlier, None)[0]

    def with_router(
        self,
        x_BTD: Float[Array, "B T D"],
        tables: Any,
        attend: Any,
        earlier: Any,
        real_BT: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """As a call, and what the router did with the tokens of documents (`real_BT`; None: all)."""
        normed_BTD = self.attention_norm(x_BTD)
        if self.short_conv:
            normed_BTD = self.attention_conv(normed_BTD, earlier)
        q, k, v = self.attention.project(normed_BTD, tables)
        branch = self.attention.finish(attend(q, k, v))
        x_BTD = x_BTD + (self.post_attention_norm(branch) if self.post_norms else branch)
        normed_BTD, sums = self.mlp_norm(x_BTD), None
        if self.short_conv:
            normed_BTD = self.mlp_conv(normed_BTD, earlier)
        if isinstance(self.mlp, Experts):
            branch, sums = self.mlp(normed_BTD, real_BT)
        else:
            branch = self.mlp(normed_BTD)
        return x_BTD + (self.post_mlp_norm(branch) if self.post_norms else branch), sums


class Head(nnx.Module):
    """The matrix from hidden vectors to logits; the product lives in loss.py, in chunks."""

    def __init__(self, *, width: int, vocab_size: int, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (width, vocab_size), jnp.float32))


class Decoder(nnx.Module):
    """All parameters of the model."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        # With embed_scale the lookup is multiplied by sqrt(D), so this makes unit vectors per coordinate.
        embed_std = config.width**-0.5 if config.embed_scale else 0.02
        self.embed = Embedding(vocab_size=vocab_size, width=config.width, std=embed_std, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.blocks = make_blocks(rngs)
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps, plus_one=config.norm_plus_one)
        if not config.tied_head:
            self.head = Head(width=config.width, vocab_size=vocab_size, std=0.02, rngs=rngs)


def _make_params(config: ModelConfig, vocab_size: int, seed: jax.Array) -> Params:
    key = jax.random.key(seed)
    decoder = Decoder(config, vocab_size, nnx.Rngs(params=key))
    return config.complete(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), key)


def abstract_params(config: ModelConfig, vocab_size: int) -> Params:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(functools.partial(_make_params, config, vocab_size), jnp.uint32(0))


def init_params(config: ModelConfig, vocab_size: int, seed: int, mesh: Mesh | None = None) -> Params:
    """Freshly drawn float32 parameters, a nested dict; the values do not depend on the mesh.

    With a mesh every device makes only its own part.
    """
    make = functools.partial(_make_params, config, vocab_size)
    shardings = None if mesh is None else param_shardings(abstract_params(config, vocab_size), mesh)
    return jax.jit(make, out_shardings=shardings)(jnp.uint32(seed % 2**32))


def param_specs(params: Params) -> Any:
    """The ParamSpec of every parameter, as a tree; those of blocks say layers first."""

    def spec(path: tuple[Any, ...], value: Any) -> ParamSpec:
        names = [entry.key for entry in path]
        found = adapter_spec(*names[-2:]) if ADAPTERS in names else PARAM_SPECS[names[-1]]
        if names[0] == "blocks":
            found = dataclasses.replace(
                found,
                dims=("layers", *found.dims),
                inputs=tuple(i + 1 for i in found.inputs),
                outputs=tuple(i + 1 for i in found.outputs),
            )
        assert len(found.dims) == value.ndim, (names, found.dims, value.shape)
        return found

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params: Params, mesh: Mesh) -> Any:
    """The resting layout of every parameter (values or shapes) on `mesh`.

    Raises:
      ConfigError: a mesh axis does not divide the dim it splits.
    """
    dims = jax.tree.map(
        lambda spec: spec.dims, param_specs(params), is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    return shardings_of(dims, params, mesh)


@functools.cache
def block_definition(config: ModelConfig, product: Any = linear) -> Any:
    """The static half of a block; arrays come from the scan."""
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0), product)))


def _remat(config: ModelConfig, function: Any) -> Any:
    policies = jax.checkpoint_policies
    match config.remat:
        case "none":
            return function
        case "full":
            policy = policies.nothing_saveable
        case "save_attention":
            policy = policies.save_only_these_names("attn_out", "attn_lse")
        case "save_products":
            # Scores of a dense attention are products with batch dims: they are not saved.
            policy = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names("attn_out", "attn_lse"),
            )
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["layer_in", "attn_out", "attn_lse"],
                offload_src="device",
                offload_dst="pinned_host",
            )
    # Inside a scan the barrier against common subexpressions is not needed and costs time.
    return jax.checkpoint(function, policy=policy, prevent_cse=not config.scan_layers)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    plan: PackPlan,
    spec: AttentionSpec,
    impl: str,
    ring: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of a whole row on the mesh in scope: heads over tensor, keys gathered over context or in a ring.

    `plan` covers the whole row on every device of a context group. It runs in `shard_map`, because kernels are
    opaque to the partitioner; the transpose of the gather reduce-scatters the gradients of keys and values.

    Raises:
      ConfigError: neither divides the other, the key-value heads and the tensor axis.
    """
    mesh = current_mesh()
    if mesh is None:

        def whole(q: jax.Array, k: jax.Array, v: jax.Array, plan: PackPlan) -> jax.Array:
            return attention(q, k, v, plan=plan, spec=spec, impl=impl)

        if not jax.sharding.get_abstract_mesh().empty:
            # A mesh of one device: interpreted kernels know no explicit axes outside of shard_map.
            everywhere = jax.sharding.PartitionSpec()
            whole = jax.shard_map(whole, in_specs=everywhere, out_specs=everywhere)
        return whole(q_BTNH, k_BTKH, v_BTKH, plan)
    num_tensor, num_kv_heads = mesh.shape["tensor"], k_BTKH.shape[2]
    if num_kv_heads % num_tensor:
        if num_tensor % num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads and mesh.tensor must divide one another, got {num_kv_heads} and {num_tensor}"
            )
        # Each device serves query heads of one key-value head only, so every device gets that one.
        k_BTKH, v_BTKH = (_repeat_heads(x, num_tensor // num_kv_heads) for x in (k_BTKH, v_BTKH))
    context = "context" if mesh.shape["context"] > 1 else None

    def local(q: jax.Array, k: jax.Array, v: jax.Array, plan: PackPlan) -> jax.Array:
        if context is None:
            return attention(q, k, v, plan=plan, spec=spec, impl=impl)
        q_offset = jax.lax.axis_index(context) * q.shape[1]
        if ring:
            k_lo_BT = plan.rows(q_offset, q.shape[1]).k_lo_BT
            return ring_attention(q, k, v, k_lo_BT, context, mesh.shape[context], spec)
        k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
        return attention(q, k, v, plan=plan, spec=spec, impl=impl, q_offset=q_offset)

    q_spec = activation_spec(("batch", "time", "heads", None), q_BTNH.shape)
    kv_spec = activation_spec(("batch", "time", "kv_heads", None), k_BTKH.shape)
    assert q_spec is not None  # there is a mesh
    plan_spec = jax.sharding.PartitionSpec(q_spec[0])  # the batch leads in all of it
    # Interpreted kernels mix what varies over an axis with what does not; compiled ones are opaque.
    mapped = jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, plan_spec),
        out_specs=q_spec,
        check_vma=impl != "tpu_interpret",
    )
    return mapped(q_BTNH, k_BTKH, v_BTKH, plan)


def _repeat_heads(x_BTKH: jax.Array, times: int) -> jax.Array:
    B, T, K, H = x_BTKH.shape
    repeated = jnp.broadcast_to(x_BTKH[:, :, :, None], (B, T, K, times, H))
    return place(repeated.reshape(B, T, K * times, H), ("batch", "time", "kv_heads", None))


def _layer_function(config: ModelConfig, kind: LayerKind, impl: str) -> Any:
    """(x, arrays of one layer, tables, plan, positions, real) -> (x, sums of the router), for layers of `kind`."""
    definition = block_definition(config)
    spec = config.spec(kind)

    def run(
        x_BTD: jax.Array,
        layer: Params,
        tables: Any,
        plan: PackPlan,
        positions_BT: jax.Array | None,
        real_BT: jax.Array | None,
    ) -> tuple[jax.Array, RouterSums | None]:
        block = nnx.merge(definition, merged(layer))
        x_BTD = checkpoint_name(x_BTD, "layer_in")

        def attend_to(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(q, k, v, plan, spec, impl, ring=config.context_attention == "ring")

        def earlier(x: jax.Array, count: int) -> tuple[jax.Array, ...]:
            assert positions_BT is not None
            return earlier_tokens(x, positions_BT, count)

        return block.with_router(x_BTD, tables, attend_to, earlier, real_BT)

    return _remat(config, run)


def _plan(
    segment_ids_BT: jax.Array | None, config: ModelConfig, kind: LayerKind, shape: tuple[int, int], impl: str
) -> PackPlan:
    """The packing plan of whole rows and the block ranges of it, made once a batch and not in every layer.

    It is small and replicated over context, where each device has queries of its own and makes its own ranges.
    """
    packed = segment_ids_BT is not None
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(shape, jnp.int32)
    spec, mesh = config.spec(kind), current_mesh()
    num_tensor = 1 if mesh is None else mesh.shape["tensor"]

    def make(segment_ids_BT: jax.Array) -> PackPlan:
        plan = dataclasses.replace(make_plan(segment_ids_BT, spec, seq_len=shape[1]), packed=packed)
        if mesh is not None and mesh.shape["context"] > 1:
            return plan
        q, k = (
            jax.ShapeDtypeStruct(
                (*segment_ids_BT.shape, max(1, heads // num_tensor), config.head_width),
                jnp.dtype(config.dtype),
            )
            for heads in (config.num_heads, config.num_kv_heads)
        )
        return prepare_plan(plan, q, k, spec=spec, impl=impl)

    rows = activation_spec(("batch", None), shape)
    if rows is None:
        return make(segment_ids_BT)
    batch = jax.sharding.PartitionSpec(rows[0])
    return jax.shard_map(make, in_specs=batch, out_specs=batch)(place(segment_ids_BT, ("batch", None)))


def _run_blocks(
    config: ModelConfig,
    blocks: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: Any,
    impl: str,
) -> tuple[jax.Array, RouterSums | None]:
    """The residual stream after all layers, and the sums of their routers, layers first."""
    pattern = config.layer_pattern
    plan_of = {kind.window: _plan(segment_ids_BT, config, kind, x_BTD.shape[:2], impl) for kind in pattern}
    tables_of = {
        kind.rope: kind.rope.tables(positions_BT, config.head_width, positions_BT.shape[1])
        for kind in pattern
    }
    functions = {kind: _layer_function(config, kind, impl) for kind in pattern}
    real_BT = None if config.moe is None or segment_ids_BT is None else segment_ids_BT > 0
    where_BT = None if config.short_conv is None else positions_BT

    def step(x: jax.Array, layer: Params, kind: LayerKind) -> tuple[jax.Array, RouterSums | None]:
        return functions[kind](x, layer, tables_of[kind.rope], plan_of[kind.window], where_BT, real_BT)

    # The scan runs over whole periods of the pattern; layers left over at the end follow one by one.
    period = len(pattern)
    num_periods = config.num_layers // period if config.scan_layers else 0
    scanned = num_periods * period
    of_layers: list[RouterSums | None] = []
    if num_periods:
        grouped = jax.tree.map(lambda a: a[:scanned].reshape(num_periods, period, *a.shape[1:]), blocks)

        def body(x: jax.Array, layers: Params) -> tuple[jax.Array, Any]:
            sums = []
            for i, kind in enumerate(pattern):
                x, router = step(x, jax.tree.map(lambda a, i=i: a[i], layers), kind)
                sums.append(router)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *sums)

        x_BTD, of_periods = jax.lax.scan(body, x_BTD, grouped)
        of_layers.append(jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), of_periods))
    for i in range(scanned, config.num_layers):
        x_BTD, router = step(x_BTD, jax.tree.map(lambda a, i=i: a[i], blocks), config.kind(i))
        of_layers.append(jax.tree.map(lambda a: a[None], router))
    return x_BTD, jax.tree.map(lambda *a: jnp.concatenate(a), *of_layers)


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    attention_impl: str | None = None,
) -> Float[Array, "B T D"]:
    """Hidden vectors before the head, in the compute dtype, already divided for width transfer.

    `segment_ids_BT` are 1, 2, .. per document and 0 on padding; None is one document per row. Memory holds
    no [B, T, V] array; see loss.cross_entropy and `logits`.
    """
    return forward_with_router(
        params, config, tokens_BT, positions_BT, segment_ids_BT, attention_impl=attention_impl
    )[0]


def forward_with_router(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    attention_impl: str | None = None,
) -> tuple[Float[Array, "B T D"], RouterSums | None]:
    """As `forward`, and the sums of the routers of all layers; None without experts."""
    c = config
    positions_BT = place(positions_BT, ("batch", "time"))
    x_BTD = look_up(params["embed"]["embedding"], tokens_BT, c.dtype)
    if c.embed_scale:
        x_BTD = x_BTD * jnp.asarray(math.sqrt(c.width), x_BTD.dtype)
    impl = c.attention_impl if attention_impl is None else attention_impl
    x_BTD, router = _run_blocks(c, params["blocks"], x_BTD, positions_BT, segment_ids_BT, impl)
    return final_hidden(x_BTD, params, c), router


def final_hidden(x_BTD: Float[Array, "B T D"], params: Params, config: ModelConfig) -> Float[Array, "B T D"]:
    """The residual stream as the head wants it: normed, and divided for width transfer."""
    norm = RMSNorm(config.width, eps=config.norm_eps, plus_one=config.norm_plus_one)
    nnx.update(norm, params["final_norm"])
    x_BTD = norm(x_BTD)
    # The head's 1/m sits here: a tied table has one role as a lookup and another as a head.
    if config.base_width is None:
        return x_BTD
    return x_BTD * jnp.asarray(1 / config.width_multiplier, x_BTD.dtype)


def head_DV(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """The head matrix in its resting layout; a view of the lookup table when tied."""
    return params["embed"]["embedding"].T if config.tied_head else params["head"]["kernel"]


def logits(hidden_BTD: Float[Array, "B T D"], params: Params, config: ModelConfig) -> Float[Array, "B T V"]:
    """All logits in float32, soft cap applied; for sampling and tests, it allocates [B, T, V]."""
    head = use_weight(head_DV(params, config), ("embed", "vocab"), hidden_BTD.dtype)
    hidden_BTD = place(hidden_BTD, ("batch", None, None))
    return soft_capped(
        jnp.einsum("btd,dv->btv", hidden_BTD, head, preferred_element_type=jnp.float32), config
    )


def soft_capped(logits_BTV: Float[Array, "B T V"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Logits as the model means them."""
    cap = config.final_softcap
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)
