"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W is used as W + A B, and only A and B are trained.

Adapters lie beside the weights of the blocks, as `blocks.adapters.<part>.<matrix>.a` and `.b`; everything else about
them follows from the tree, so a model without adapters takes no other path. B begins as zeros: the first step sees
the frozen model, bit for bit. The paper's factor alpha / r is left out, since under Adam it is the learning rate by
another name (its section 4.1).

What is saved: gradients, moments and accumulators exist for A and B alone. What is not: W + A B is made for a layer
at a time, so a step computes as much as full training does, and without `remat` the backward pass finds the sums of
all layers in memory.

Letters as in layers.py, and R the rank.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pretrain.config import ConfigError
from pretrain.model.layers import PARAM_SPECS, ParamSpec

Params = dict[str, Any]

ADAPTERS = "adapters"
_TARGETS = tuple(name for name, spec in PARAM_SPECS.items() if spec.role == "matrix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The rank of the adapters, and which matrices of a block have one (those that the block has)."""

    rank: int
    targets: tuple[str, ...] = _TARGETS

    def __post_init__(self):
        faults = []
        if self.rank < 1:
            faults.append(f"adapters.rank must be at least 1, got {self.rank}")
        unknown = [name for name in self.targets if name not in _TARGETS]
        if unknown or not self.targets:
            faults.append(
                f"adapters.targets must name matrices of a block ({', '.join(_TARGETS)}), got {self.targets!r}"
            )
        if faults:
            raise ConfigError(*faults)


def adapter_spec(name: str, side: str) -> ParamSpec:
    """What `a` or `b` of the matrix `name` is: A keeps its inputs and ends with R, B begins with R and keeps its outputs.

    Dims that are neither input nor output (gate and up, experts) lead both.
    """
    spec = PARAM_SPECS[name]
    batch = _batch_dims(spec)
    lead, kept = tuple(spec.dims[i] for i in batch), spec.inputs if side == "a" else spec.outputs
    dims = tuple(spec.dims[i] for i in kept)
    first = len(batch)
    if side == "a":
        inputs = tuple(range(first, first + len(dims)))
        return ParamSpec(
            dims=(*lead, *dims, None), role="matrix", inputs=inputs, outputs=(first + len(dims),)
        )
    outputs = tuple(range(first + 1, first + 1 + len(dims)))
    return ParamSpec(dims=(*lead, None, *dims), role="matrix", inputs=(first,), outputs=outputs)


def add_adapters(blocks: Params, config: AdapterConfig, key: jax.Array) -> Params:
    """Stacked `blocks` with fresh adapters.

    Raises:
      ConfigError: the blocks have none of the targets.
    """
    adapters: Params = {}
    for part, weights in blocks.items():
        for name, weight in weights.items():
            if name in config.targets:
                key, own = jax.random.split(key)
                adapters.setdefault(part, {})[name] = _fresh(name, weight.shape, config.rank, own)
    if not adapters:
        raise ConfigError(f"adapters.targets must name matrices that the model has, got {config.targets!r}")
    return {**blocks, ADAPTERS: adapters}


def _fresh(name: str, shape: tuple[int, ...], rank: int, key: jax.Array) -> Params:
    spec, (layers, *dims) = PARAM_SPECS[name], shape
    lead = [dims[i] for i in _batch_dims(spec)]
    inputs, outputs = ([dims[i] for i in kept] for kept in (spec.inputs, spec.outputs))
    a = jax.random.normal(key, (layers, *lead, *inputs, rank), jnp.float32)
    return {"a": a * math.prod(inputs) ** -0.5, "b": jnp.zeros((layers, *lead, rank, *outputs), jnp.float32)}


def merged(blocks: Params) -> Params:
    """Weights of one layer or of a stack of layers, adapters added to them and gone."""
    if ADAPTERS not in blocks:
        return blocks
    adapters = blocks[ADAPTERS]

    def weight(part: str, name: str, value: jax.Array) -> jax.Array:
        adapter = adapters.get(part, {}).get(name)
        return value if adapter is None else value + jnp.einsum(_product(name), adapter["a"], adapter["b"])

    return {
        part: {name: weight(part, name, value) for name, value in weights.items()}
        for part, weights in blocks.items()
        if part != ADAPTERS
    }


def merged_params(params: Params) -> Params:
    """All parameters of a model, without adapters."""
    return {**params, "blocks": merged(params["blocks"])}


def trained_part(params: Params) -> Params:
    """What the optimizer moves: the adapters where there are some, else everything."""
    if ADAPTERS not in params.get("blocks", {}):
        return params
    return {"blocks": {ADAPTERS: params["blocks"][ADAPTERS]}}


def with_trained_part(params: Params, trained: Any) -> Params:
    """`params` with that part replaced."""
    if ADAPTERS not in params.get("blocks", {}):
        return trained
    return {**params, "blocks": {**params["blocks"], **trained["blocks"]}}


def _batch_dims(spec: ParamSpec) -> tuple[int, ...]:
    return tuple(i for i in range(len(spec.dims)) if i not in spec.inputs + spec.outputs)


def _product(name: str) -> str:
    """The einsum of A and B for a matrix; layers, where they are stacked, lead."""
    spec = PARAM_SPECS[name]
    letters = "bcdefgh"[: len(spec.dims)]
    lead, inputs, outputs = (
        "".join(letters[i] for i in dims) for dims in (_batch_dims(spec), spec.inputs, spec.outputs)
    )
    return f"...{lead}{inputs}r,...{lead}r{outputs}->...{letters}"
