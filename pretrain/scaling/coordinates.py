"""The coordinate check: with width transfer every block output and the logits move by the same amount at any width.

After a few steps, the root mean square of the change of each coordinate is fitted against the width in logarithms.
A slope near 0 is what makes one learning rate serve all widths (muP, arXiv 2203.03466, appendix D.1). Without width
transfer the logits move more the wider the model: a control, without which flat slopes prove nothing.

B batch rows, T query time, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from pretrain.config import ConfigError
from pretrain.data.batch import Batch
from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.plan import make_plan
from pretrain.loss import LossConfig
from pretrain.model.layers import earlier_tokens, look_up
from pretrain.model.transformer import Block, ModelConfig, Params, forward, init_params, logits
from pretrain.optim import Constant, OptimConfig, make_optimizer
from pretrain.origin import origin
from pretrain.plots import COLORS, Curve, Panel, draw
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.scaling.plan import ScalingConfig, Shape
from pretrain.step import language_model_loss

# Over a factor of ten in width a change of this slope is a factor of 1.4; without width transfer logits pass 0.3.
MAX_SLOPE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateCheck:
    """`changes[name]` is the RMS change of one activation at each of `widths`."""

    widths: tuple[int, ...]
    changes: Mapping[str, tuple[float, ...]]

    def slope(self, name: str) -> float:
        """Slope of log change over log width."""
        return float(np.polyfit(np.log(self.widths), np.log(self.changes[name]), 1)[0])

    @property
    def slopes(self) -> dict[str, float]:
        return {name: self.slope(name) for name in self.changes}

    @property
    def moving(self) -> list[str]:
        """The activations whose change depends on the width: their slope is beyond `MAX_SLOPE`."""
        return [name for name, slope in self.slopes.items() if not abs(slope) <= MAX_SLOPE]


def coordinate_check(
    model: ModelConfig,
    optim: OptimConfig,
    widths: Sequence[int],
    *,
    vocab_size: int,
    num_steps: int = 5,
    batch_rows: int = 4,
    row_length: int = 32,
    seeds: Sequence[int] = (0, 1, 2),
) -> CoordinateCheck:
    """Train `model` at each width for a few steps on one batch and measure what moved, averaged over seeds."""
    changes: dict[str, list[float]] = {}
    for width in widths:
        scaled = Shape(width=width, num_layers=model.num_layers).model(model)
        drawn = init_params(scaled, vocab_size, 0)

        def change(like: Params, seed: jax.Array, config: ModelConfig = scaled) -> dict[str, jax.Array]:
            batch = random_batch(seed, vocab_size, batch_rows, row_length)
            before = _redrawn(like, seed)
            after = short_run(before, config, optim, batch, num_steps)
            both = jax.tree.map(lambda *pair: jnp.stack(pair), before, after)
            values = jax.lax.map(lambda p: activations(p, config, batch.tokens_BT1[:, :-1]), both)
            return {name: jnp.sqrt(jnp.mean((new - old) ** 2)) for name, (old, new) in values.items()}

        found = [jax.device_get(jax.jit(change)(drawn, jnp.uint32(seed))) for seed in seeds]
        for name in found[0]:
            # Log means: a seed with large numbers shall not decide the slope.
            changes.setdefault(name, []).append(float(np.exp(np.mean([np.log(f[name]) for f in found]))))
    return CoordinateCheck(widths=tuple(widths), changes={k: tuple(v) for k, v in changes.items()})


def _redrawn(params: Params, seed: jax.Array) -> Params:
    """Random parameters keep their spread and change their values; ones and zeros stay."""
    leaves, structure = jax.tree.flatten(params)
    # One draw for all: a generator for each leaf took longer to compile than the steps themselves.
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(jax.random.normal(jax.random.key(seed), (int(ends[-1]),)), ends[:-1])
    drawn = [
        jnp.std(leaf) * part.reshape(leaf.shape) + jnp.mean(leaf)
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def random_batch(seed: jax.Array | int, vocab_size: int, batch_rows: int, row_length: int) -> Batch:
    """Tokens with the frequencies of Zipf's law, one document a row: something that can be learned."""
    log_share = -jnp.log(jnp.arange(1, vocab_size + 1, dtype=jnp.float32))
    tokens_BT1 = jax.random.categorical(
        jax.random.key(seed), log_share, shape=(batch_rows, row_length + 1)
    ).astype(jnp.int32)
    return Batch(
        tokens_BT1=tokens_BT1,
        segment_ids_BT1=jnp.ones_like(tokens_BT1),
        positions_BT1=jnp.broadcast_to(jnp.arange(row_length + 1, dtype=jnp.int32)[None], tokens_BT1.shape),
        weights_BT=jnp.ones((batch_rows, row_length), jnp.float32),
        source_B=jnp.zeros(batch_rows, jnp.int32),
    )


def short_run(params: Params, model: ModelConfig, optim: OptimConfig, batch: Batch, num_steps: int) -> Params:
    """`num_steps` updates on one batch; traceable."""
    loss = language_model_loss(model, LossConfig(), 1)
    optimizer = make_optimizer(optim, num_steps, params, model)

    def mean_loss(params: Params) -> jax.Array:
        return loss(params, batch).mean_objective()

    def step(carry: tuple[Params, Any], index: jax.Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        grads = jax.grad(mean_loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params, step=index)
            return (jax.tree.map(jnp.add, params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
    return params


def activations(params: Params, model: ModelConfig, tokens_BT: Int[Array, "B T"]) -> dict[str, jax.Array]:
    """The output of every block (before the final norm) and the logits."""
    definition: Any = nnx.graphdef(nnx.eval_shape(lambda: Block(model, nnx.Rngs(params=0))))
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    x_BTD = look_up(params["embed"]["embedding"], tokens_BT, model.dtype)
    found: dict[str, jax.Array] = {}
    for layer in range(model.num_layers):
        kind = model.kind(layer)
        spec = model.spec(kind)
        plan = make_plan(jnp.ones_like(tokens_BT), spec=spec, seq_len=tokens_BT.shape[1])
        tables = kind.rope.tables(positions_BT, model.head_width, tokens_BT.shape[1])
        block: Any = nnx.merge(definition, jax.tree.map(lambda a, i=layer: a[i], params["blocks"]))
        x_BTD = block(
            x_BTD,
            tables,
            lambda q, k, v, p=plan, s=spec: attention(q, k, v, plan=p, spec=s, impl=model.attention_impl),
            lambda x, count: earlier_tokens(x, positions_BT, count),
        )
        found[f"block {layer}"] = x_BTD
    hidden_BTD = forward(params, model, tokens_BT, positions_BT, None)
    return {**found, "logits": logits(hidden_BTD, params, model)}


def coordinate_panel(title: str, check: CoordinateCheck) -> Panel:
    """Changes over width, both in logarithms."""
    curves = [
        Curve(label=f"{name}, slope", x=check.widths, y=values, color=COLORS[i % len(COLORS)], markers=True)
        for i, (name, values) in enumerate(check.changes.items())
    ]
    return Panel(title=title, x_label="width", y_label="RMS change", curves=curves, x_log=True, y_log=True)


def check_ladder(config: ScalingConfig, name: str, vocab_size: int) -> tuple[str, bool]:
    """The check at the widths of a ladder with its optimizer at the full rate, beside the control without width transfer.

    Writes coordinates.json and coordinates.png into the ladder's folder. Returns what to print, and whether one rate
    serves all widths.

    Raises:
      ConfigError: the ladder has fewer than two widths.
    """
    model = config.train.model
    # A schedule would still be warming up: these few steps ask what the peak rate moves.
    optim = dataclasses.replace(config.train.optim, schedule=Constant())
    widths = sorted({shape.width for shape in config.ladder.shapes})
    if len(widths) < 2:
        raise ConfigError(
            f"a coordinate check needs two widths or more, ladder.shapes has {widths}; add a shape"
        )
    found = coordinate_check(model, optim, widths, vocab_size=vocab_size)
    control = coordinate_check(
        dataclasses.replace(model, base_width=None), optim, widths, vocab_size=vocab_size
    )
    lines = [f"{'slope over width':18} {'width transfer':>14} {'without':>9}"]
    lines += [f"{key:18} {found.slope(key):+14.3f} {control.slope(key):+9.3f}" for key in found.changes]
    folder = Path(config.train.run.workdir) / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        folder / "coordinates.json",
        {
            "origin": origin(),
            "max_slope": MAX_SLOPE,
            "width_transfer": {**dataclasses.asdict(found), "slopes": found.slopes},
            "without": {**dataclasses.asdict(control), "slopes": control.slopes},
        },
    )
    panels = [coordinate_panel("With width transfer", found), coordinate_panel("Without", control)]
    write_atomic(folder / "coordinates.png", draw(panels, title=f"Coordinate check of {name}"))
    verdict = (
        f"NOT flat within {MAX_SLOPE}: {', '.join(found.moving)}; narrow widths do that, leave them out or lower the rate"
        if found.moving
        else f"flat within {MAX_SLOPE}: one rate serves widths {widths[0]} to {widths[-1]}"
    )
    return "\n".join([*lines, verdict, f"the picture: {folder / 'coordinates.png'}"]), not found.moving
