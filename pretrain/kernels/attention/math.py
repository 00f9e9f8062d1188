"""Tile mathematics shared by the TPU and the Hopper kernels: logits, mask, and the gradient of a score.

Pure elementwise jnp on tiles of either orientation; reductions and matrix products are the business of each kernel.
Logits are kept in base 2 (t = s·log2 e), because both chips have exp2 in hardware and not exp.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Large but finite: -inf - -inf is NaN. A row that is wholly masked in its first tiles gathers ones, which the first
# real logit wipes out, because exp2(MASKED - real) is zero.
MASKED = -0.7 * 3.4028235e38


def exponents(
    products: Float[Array, "..."], scale: float, softcap: float | None
) -> tuple[Float[Array, "..."], float]:
    """x and c such that c·x are the base-2 logits of raw products q·k; with a soft cap x is the tanh.

    Left apart, the factor costs nothing: exp2(c·x - top) is one multiply-add and one exponential.
    """
    if softcap is None:
        return products, scale * LOG2E
    return jnp.tanh(products * (scale / softcap)), softcap * LOG2E


def logits_base2(
    products: Float[Array, "..."], scale: float, softcap: float | None
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Base-2 logits from raw products q·k, and the tanh of the soft cap for the backward pass."""
    x, factor = exponents(products, scale, softcap)
    return x * factor, None if softcap is None else x


def visible(q_pos: Array, k_lo: Array, k_pos: Array) -> Bool[Array, "..."]:
    """The one predicate of forward and backward, so that their masks agree bit for bit."""
    return (k_pos <= q_pos) & (k_pos >= k_lo)


def score_gradient(
    p: Float[Array, "..."],
    dp: Float[Array, "..."],
    delta: Float[Array, "..."],
    tanh: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """d loss / d (q·k) / scale, from probabilities, their cotangent and delta = rowsum(o ∘ do) - dlse."""
    ds = p * (dp - delta)
    return ds if tanh is None else ds * (1.0 - tanh * tanh)
