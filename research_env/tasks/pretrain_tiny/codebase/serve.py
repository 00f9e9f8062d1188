"""The function that the judge's questions go to: the recipe's model with the weights of the artifact."""

import jax
import numpy as np
import recipe
import weights

from pretrain.model.transformer import forward, logits


def load(folder):
    """int32 [B, T] -> float32 logits [B, T, V]."""
    params = weights.load(folder + "/model.safetensors")

    @jax.jit
    def run(tokens_BT):
        return logits(forward(params, recipe.MODEL, tokens_BT), params, recipe.MODEL)

    return lambda tokens_BT: np.asarray(run(tokens_BT), np.float32)
