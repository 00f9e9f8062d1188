"""The function that the judge's questions go to: the recipe's model with the weights of the artifact."""

import jax
import jax.numpy as jnp
import numpy as np
import recipe
import weights

from pretrain.model.transformer import forward, logits


def load(folder):
    """int32 [B, T] -> float32 logits [B, T, V]."""
    params = weights.load(folder + "/model.safetensors")

    @jax.jit
    def run(tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        hidden_BTD = forward(params, recipe.MODEL, tokens_BT, positions_BT, jnp.ones_like(positions_BT))
        return logits(hidden_BTD, params, recipe.MODEL)

    return lambda tokens_BT: np.asarray(run(tokens_BT), np.float32)
