"""Mixture of experts: a router sends each token to a few feed-forward networks, and no token is dropped.

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so any load is computed in full.
With experts split over the expert axis every device gathers the tokens of its group, computes its own experts and
scatters sums back. Loads are kept even by a bias on the choice alone (arXiv 2408.15664) or by an auxiliary loss
(arXiv 2101.03961, here per row, so that it adds up over microbatches); the router z-loss is that of arXiv 2202.08906.

Letters as in layers.py: B T D F L; E experts, k experts a token is sent to; lower case e and f are the local part
of E and F; M tokens at hand, A = M k assignments.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pretrain.config import ConfigError
from pretrain.model.layers import activate, linear, normal_param
from pretrain.sharding import (
    ACTIVATION_RULES,
    Dims,
    partition_spec,
    place,
    use_local_weight,
    use_weight,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasBalance:
    """After each step the bias of an overloaded expert falls by `rate`, that of an underloaded one rises."""

    rate: float = 1e-3

    def __post_init__(self):
        if not self.rate >= 0:
            raise ConfigError(f"rate must be at least 0, got {self.rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossBalance:
    """E sum_e (share of choices)_e (mean probability)_e, 1 when even, joins the objective of every layer."""

    weight: float = 1e-2

    def __post_init__(self):
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0, got {self.weight}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Experts of every layer; each has the model's hidden_width."""

    num_experts: int
    num_active: int
    balance: BiasBalance | LossBalance = BiasBalance()
    z_weight: float = 1e-3
    renormalize: bool = True  # the weights of the chosen experts sum to one

    def __post_init__(self):
        faults = []
        if self.num_experts < 1:
            faults.append(f"num_experts must be positive, got {self.num_experts}")
        if not 1 <= self.num_active <= max(self.num_experts, 1):
            faults.append(
                f"num_active must lie in [1, num_experts={self.num_experts}], got {self.num_active}"
            )
        if not self.z_weight >= 0:
            faults.append(f"z_weight must be at least 0, got {self.z_weight}")
        if faults:
            raise ConfigError(*faults)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["load_E", "balance", "z", "tokens"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of documents (padding is routed, and not counted), float32; of all layers with L in front."""

    load_E: jax.Array  # how many choices fell on each expert
    balance: jax.Array  # sum over tokens of the auxiliary loss of their row
    z: jax.Array  # sum of lse^2 of the router's logits
    tokens: jax.Array

    def objective(self, config: MoeConfig) -> jax.Array:
        """The routers' losses summed over tokens, all layers together; to be divided by the tokens of one layer."""
        total = config.z_weight * jnp.sum(self.z)
        if isinstance(config.balance, LossBalance):
            total = total + config.balance.weight * jnp.sum(self.balance)
        return total

    def metrics(self) -> dict[str, jax.Array]:
        """Shares of each expert [L, E], the worst layer's load of its busiest expert over the mean, mean lse^2."""
        load_LE = self.load_E
        share_LE = load_LE / jnp.maximum(jnp.sum(load_LE, axis=-1, keepdims=True), 1.0)
        return {
            "expert_share": share_LE,
            "expert_max_over_mean": load_LE.shape[-1] * jnp.max(share_LE),
            "router_z": jnp.sum(self.z) / jnp.maximum(jnp.sum(self.tokens), 1.0),
        }


class Experts(nnx.Module):
    """Router and gated feed-forward networks of one layer."""

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int,
        activation: str,
        out_std_factor: float,
        config: MoeConfig,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        D, F, E = width, hidden_width, config.num_experts
        self.router = normal_param(rngs, (D, E), D**-0.5)
        # Gradients do not reach it: the optimizer moves it by the loads.
        self.router_bias = nnx.Param(jnp.zeros((E,), jnp.float32))
        self.expert_gate_up = normal_param(rngs, (E, D, 2, F), D**-0.5)
        self.expert_down = normal_param(rngs, (E, F, D), out_std_factor * F**-0.5)
        self.activation, self.config, self.dtype = activation, config, dtype

    def __call__(
        self, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        """The weighted sum of the chosen experts' outputs; `real_BT` says which tokens belong to documents."""
        router = use_weight(self.router[...], ("embed", None), jnp.float32)
        logits_BTE = linear(x_BTD.astype(jnp.float32), router, ("batch", "time", None))
        choice_BTk, weight_BTk, sums = route(logits_BTE, self.router_bias[...], real_BT, self.config)
        gate_up, down = (w[...].astype(self.dtype) for w in (self.expert_gate_up, self.expert_down))
        out = run_experts(x_BTD, choice_BTk, weight_BTk, gate_up, down, self.activation)
        return out, sums


def route(
    logits_BTE: Float[Array, "B T E"],
    bias_E: Float[Array, " E"],
    real_BT: Bool[Array, "B T"] | None,
    config: MoeConfig,
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], RouterSums]:
    """The experts of each token, their weights, and the sums that keep the loads even; float32."""
    k, E = config.num_active, config.num_experts
    lse_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    probability_BTE = jnp.exp(logits_BTE - lse_BT[..., None])
    biased = probability_BTE
    if isinstance(config.balance, BiasBalance):
        biased = probability_BTE + bias_E.reshape(1, 1, -1)
    _, choice_BTk = jax.lax.top_k(jax.lax.stop_gradient(biased), k)
    # Compared and summed, not indexed: the gradient of an index is a scatter.
    chosen_BTkE = (choice_BTk[..., None] == jnp.arange(E).reshape(1, 1, 1, E)).astype(jnp.float32)
    weight_BTk = jnp.sum(chosen_BTkE * probability_BTE[:, :, None, :], axis=-1)
    if config.renormalize:
        weight_BTk = weight_BTk / jnp.sum(weight_BTk, axis=-1, keepdims=True)
    real = jnp.ones_like(lse_BT) if real_BT is None else place(real_BT, ("batch", "time")).astype(jnp.float32)
    load_BE = jnp.sum(jnp.sum(chosen_BTkE, axis=2) * real[..., None], axis=1)
    mean_BE = jnp.sum(probability_BTE * real[..., None], axis=1)
    tokens_B = jnp.sum(real, axis=1)
    row_B = jnp.sum(load_BE * mean_BE, axis=1) * (E / k) / jnp.maximum(tokens_B, 1.0)
    sums = RouterSums(
        load_E=jnp.sum(load_BE, axis=0),
        balance=jnp.sum(row_B),
        z=jnp.sum(jnp.square(lse_BT) * real),
        tokens=jnp.sum(tokens_B),
    )
    return choice_BTk, weight_BTk, sums


def run_experts(
    x_BTD: Float[Array, "B T D"],
    choice_BTk: Int[Array, "B T k"],
    weight_BTk: Float[Array, "B T k"],
    gate_up_ED2F: Float[Array, "E D 2 F"],
    down_EFD: Float[Array, "E F D"],
    activation: str,
) -> Float[Array, "B T D"]:
    """Weighted sums of the chosen experts' outputs on the mesh in scope; weights come in their resting layout.

    Memory holds A = B T k rows of every width on each device, times the expert axis: the price of dropping nothing.
    """
    run = functools.partial(_run_local, activation)
    # Also on a mesh of one device: ragged_dot has no rule for explicit axes outside of shard_map.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(x_BTD, choice_BTk, weight_BTk, gate_up_ED2F, down_EFD, 0)
    experts = "expert" if mesh.shape["expert"] > 1 else None
    tensor = "tensor" if mesh.shape["tensor"] > 1 else None

    def layout(dims: Dims, a: jax.Array) -> PartitionSpec:
        return partition_spec(dims, a.shape, ACTIVATION_RULES, mesh)

    tokens = [layout(("batch", "time", None), a) for a in (x_BTD, choice_BTk, weight_BTk)]
    resting = [jax.typeof(w).sharding.spec for w in (gate_up_ED2F, down_EFD)]
    used = (
        layout(("experts", None, None, "mlp"), gate_up_ED2F),
        layout(("experts", "mlp", None), down_EFD),
    )

    def local(
        x: jax.Array, choice: jax.Array, weight: jax.Array, gate_up: jax.Array, down: jax.Array
    ) -> jax.Array:
        gate_up, down = (
            use_local_weight(w, *specs) for w, *specs in zip((gate_up, down), resting, used, strict=True)
        )
        first = 0
        if experts is not None:
            x, choice, weight = (
                jax.lax.all_gather(a, experts, axis=0, tiled=True) for a in (x, choice, weight)
            )
            first = jax.lax.axis_index(experts) * gate_up.shape[0]
        out = run(x, choice, weight, gate_up, down, first)
        if tensor is not None:
            out = jax.lax.psum(out, tensor)
        if experts is not None:
            out = jax.lax.psum_scatter(out, experts, scatter_dimension=0, tiled=True)
        return out

    return jax.shard_map(local, in_specs=(*tokens, *resting), out_specs=tokens[0])(
        x_BTD, choice_BTk, weight_BTk, gate_up_ED2F, down_EFD
    )


def _run_local(
    activation: str,
    x_BTD: jax.Array,
    choice_BTk: jax.Array,
    weight_BTk: jax.Array,
    gate_up_eD2f: jax.Array,
    down_efD: jax.Array,
    first: int | jax.Array,
) -> jax.Array:
    """The part of the experts [first, first + e), zero for tokens that chose none of them."""
    num_experts, D = gate_up_eD2f.shape[:2]
    k = choice_BTk.shape[-1]
    expert_A = choice_BTk.reshape(-1) - first
    here_A = (expert_A >= 0) & (expert_A < num_experts)
    expert_A = jnp.where(here_A, expert_A, num_experts)  # others sort to the end, into no group
    order_A = jnp.argsort(expert_A, stable=True)
    place_A = jnp.argsort(order_A)
    sizes_e = jnp.sum(expert_A[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    # What ragged_dot leaves in rows beyond the groups is not defined.
    live_A1 = (jnp.arange(order_A.shape[0]) < jnp.sum(sizes_e))[:, None]

    rows_AD = _reorder(jnp.repeat(x_BTD.reshape(-1, D), k, axis=0), order_A, place_A)
    both = jax.lax.ragged_dot(rows_AD, gate_up_eD2f.reshape(num_experts, D, -1), sizes_e)
    gate, up = jnp.split(jnp.where(live_A1, both, jnp.zeros_like(both)), 2, axis=1)
    out_AD = jax.lax.ragged_dot(activate(activation, gate) * up, down_efD, sizes_e)
    out_AD = jnp.where(live_A1, out_AD, jnp.zeros_like(out_AD))
    out_MkD = _reorder(out_AD, place_A, order_A).reshape(-1, k, D)
    weight_Mk = weight_BTk.reshape(-1, k).astype(out_MkD.dtype)
    return jnp.einsum("mkd,mk->md", out_MkD, weight_Mk).reshape(x_BTD.shape)


@jax.custom_vjp
def _reorder(x_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array) -> jax.Array:
    """Rows in another order; the gradient is a gather as well, where JAX's own rule would scatter and add."""
    del inverse_A
    return x_AD[order_A]


def _reorder_forward(
    x_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return x_AD[order_A], inverse_A


def _reorder_backward(inverse_A: jax.Array, d_AD: jax.Array) -> tuple[jax.Array, None, None]:
    return d_AD[inverse_A], None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
