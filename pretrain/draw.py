"""A token from logits: penalty, temperature, top-k, top-p and min-p, then one uniform number per row.

No vocabulary is sorted. A filter keeps the tokens above a threshold, and the threshold is found by bisection over
the bits of float32, exactly; ties stay together. The draw inverts the cumulative distribution in two levels. A
row's token depends on its own logits, settings and key, bit for bit: filters that are off for a row leave its
numbers alone.

S slots (rows of a batch), V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Tokens in a block of the two-level cumulative sum.
_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How each slot draws. `top_k` 0 is off, `top_p` 1 is off, `min_p` 0 is off, `penalty` 1 is off."""

    temperature_S: Array
    top_k_S: Array
    top_p_S: Array
    min_p_S: Array
    penalty_S: Array
    seed_S2: Array


def draw_faults(
    *, temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float
) -> list[str]:
    """What is wrong with these settings, one line each; NaN is wrong everywhere."""
    faults = []
    if not (temperature >= 0 and math.isfinite(temperature)):
        faults.append(f"temperature must be at least 0 (0 is greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1, or none for all tokens, got {top_k}")
    if not 0 < top_p <= 1:
        faults.append(f"top_p must lie in (0, 1], got {top_p}; 1 keeps all tokens")
    if not 0 <= min_p < 1:
        faults.append(f"min_p must lie in [0, 1), got {min_p}; 0 keeps all tokens")
    if not (repetition_penalty > 0 and math.isfinite(repetition_penalty)):
        faults.append(f"repetition_penalty must be positive, got {repetition_penalty}; 1 is none")
    return faults


def seed_words(seed: int) -> np.ndarray:
    """A seed of up to 64 bits as the two words of a threefry key."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def draw(
    logits_SV: Float[Array, "S V"],
    seen_SV: Bool[Array, "S V"],
    position_S: Int[Array, " S"],
    settings: Settings,
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """The token at `position_S` of each slot's text, and its log-probability under the model itself.

    That is the log-softmax of the logits as they come, before penalty, temperature and filters. The random number
    of a token is a function of the slot's seed and the position.
    """
    scores_SV = lax.cond(
        (settings.penalty_S != 1).any(),
        _penalize,
        lambda scores, *_: scores,
        logits_SV,
        seen_SV,
        settings.penalty_S,
    )
    best_S = jnp.argmax(scores_SV, axis=1).astype(jnp.int32)
    token_S = lax.cond(
        (settings.temperature_S > 0).any(),
        _draw_some,
        lambda best_S, *_: best_S,
        best_S,
        scores_SV,
        position_S,
        settings,
    )
    top_S1 = logits_SV.max(axis=1, keepdims=True)
    lse_S = top_S1[:, 0] + jnp.log(jnp.exp(logits_SV - top_S1).sum(axis=1))
    return token_S, jnp.take_along_axis(logits_SV, token_S[:, None], axis=1)[:, 0] - lse_S


def _penalize(logits_SV: Array, seen_SV: Array, penalty_S: Array) -> Array:
    """Seen tokens are made less likely by the penalty's factor (arXiv 1909.05858, section 4.1, both signs)."""
    penalty_S1 = penalty_S[:, None]
    lowered_SV = jnp.where(logits_SV > 0, logits_SV / penalty_S1, logits_SV * penalty_S1)
    return jnp.where(seen_SV, lowered_SV, logits_SV)


def _draw_some(best_S: Array, scores_SV: Array, position_S: Array, settings: Settings) -> Array:
    greedy_S = settings.temperature_S <= 0
    temperature_S1 = jnp.where(greedy_S, 1.0, settings.temperature_S)[:, None]
    # The likeliest token weighs exactly 1, so every filter keeps it.
    weight_SV = jnp.exp((scores_SV - scores_SV.max(axis=1, keepdims=True)) / temperature_S1)
    filtered = (settings.top_k_S > 0) | (settings.top_p_S < 1) | (settings.min_p_S > 0)
    weight_SV = lax.cond(filtered.any(), _filter, lambda weight, _: weight, weight_SV, settings)
    key_S = jax.random.wrap_key_data(settings.seed_S2, impl="threefry2x32")
    uniform_S = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(
        key_S, position_S
    )
    drawn_S = invert_cumulative(weight_SV, uniform_S)
    return jnp.where(greedy_S | (drawn_S < 0), best_S, drawn_S)


def _filter(weight_SV: Array, settings: Settings) -> Array:
    """Zero the tokens that top-k, then top-p of what is left, then min-p leave out."""

    def keep_k(weight_SV: Array) -> Array:
        wanted_S = jnp.where(settings.top_k_S > 0, settings.top_k_S, weight_SV.shape[1])
        threshold_S = bisect(weight_SV, lambda above_SV: above_SV.sum(axis=1) >= wanted_S)
        return jnp.where(weight_SV >= threshold_S[:, None], weight_SV, 0.0)

    def keep_p(weight_SV: Array) -> Array:
        wanted_S = settings.top_p_S * weight_SV.sum(axis=1)
        threshold_S = bisect(
            weight_SV, lambda above_SV: jnp.where(above_SV, weight_SV, 0.0).sum(axis=1) >= wanted_S
        )
        threshold_S = jnp.where(settings.top_p_S < 1, threshold_S, 0.0)
        return jnp.where(weight_SV >= threshold_S[:, None], weight_SV, 0.0)

    weight_SV = lax.cond((settings.top_k_S > 0).any(), keep_k, lambda weight: weight, weight_SV)
    weight_SV = lax.cond((settings.top_p_S < 1).any(), keep_p, lambda weight: weight, weight_SV)
    return jnp.where(weight_SV >= settings.min_p_S[:, None], weight_SV, 0.0)


def bisect(weight_SV: Float[Array, "S V"], enough) -> Float[Array, " S"]:
    """The largest float32 t in [0, 1] for which enough(weight >= t) holds in each row; 0 where none does.

    Non-negative floats are ordered as their bits are, so thirty halvings find it exactly.
    """
    # Zero, made of the weights so that inside shard_map it varies over the mesh as they do.
    low_S = (weight_SV[:, 0] < 0).astype(jnp.int32)
    high_S = low_S + int(np.float32(1).view(np.int32))

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_S, high_S = bounds
        middle_S = low_S + (high_S - low_S + 1) // 2
        threshold_S1 = lax.bitcast_convert_type(middle_S, jnp.float32)[:, None]
        ok_S = enough(weight_SV >= threshold_S1)
        return jnp.where(ok_S, middle_S, low_S), jnp.where(ok_S, high_S, middle_S - 1)

    low_S, _ = lax.fori_loop(0, 30, halve, (low_S, high_S))
    return lax.bitcast_convert_type(low_S, jnp.float32)


def invert_cumulative(weight_SV: Float[Array, "S V"], uniform_S: Float[Array, " S"]) -> Int[Array, " S"]:
    """The token at `uniform_S` of the cumulative weights; never one of weight 0, -1 where rounding finds none."""
    slots, vocab = weight_SV.shape
    blocks = -(-vocab // _BLOCK)
    weight_SCX = jnp.pad(weight_SV, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(slots, blocks, _BLOCK)
    upto_SC = jnp.cumsum(weight_SCX.sum(axis=2), axis=1)
    target_S1 = (uniform_S * upto_SC[:, -1])[:, None]
    # The first block whose end lies above the target.
    block_S = jnp.minimum((upto_SC <= target_S1).sum(axis=1), blocks - 1)
    before_SC = jnp.concatenate([jnp.zeros_like(upto_SC[:, :1]), upto_SC[:, :-1]], axis=1)
    rest_S1 = target_S1 - jnp.take_along_axis(before_SC, block_S[:, None], axis=1)
    weight_SX = jnp.take_along_axis(weight_SCX, block_S[:, None, None], axis=1)[:, 0]
    # The first token whose cumulative weight passes what is left has a weight of its own.
    inside_S = (jnp.cumsum(weight_SX, axis=1) <= rest_S1).sum(axis=1)
    token_S = (block_S * _BLOCK + inside_S).astype(jnp.int32)
    return jnp.where(inside_S < _BLOCK, token_S, -1)
