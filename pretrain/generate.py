"""Text from a model: a few samples during training, drawn by full forward passes in one compiled loop."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pretrain.config import ConfigError
from pretrain.model.transformer import ModelConfig, Params, forward, logits
from pretrain.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What a run writes at each evaluation, to be read by a person."""

    prompts: tuple[str, ...] = ("",)
    max_new_tokens: int = 96
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"sample.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"sample.temperature must be at least 0 (0 is greedy), got {self.temperature}")


def sample_texts(params: Params, model: ModelConfig, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """One continuation for each prompt, the prompt included; it ends at the end of the document."""
    if not config.prompts:
        return []
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BT = np.full((len(prompts), lengths_B.max() + config.max_new_tokens), tokenizer.pad_id, np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jax.random.split(jax.random.key(config.seed), len(prompts))
    # A few short texts: one device is enough, and whole parameters there need no mesh in scope.
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    tokens_BT = np.asarray(_continue(params, tokens_BT, lengths_B, keys, config.temperature, model))
    texts = []
    for row, length in zip(tokens_BT, lengths_B, strict=True):
        ids = row[1 : length + config.max_new_tokens].tolist()
        if tokenizer.eos_id in ids[length - 1 :]:
            ids = ids[: ids.index(tokenizer.eos_id, length - 1)]
        texts.append(tokenizer.decode(ids))
    return texts


@functools.partial(jax.jit, static_argnames="model")
def _continue(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    keys_B: Any,
    temperature: jax.Array,
    model: ModelConfig,
) -> Int[Array, "B T"]:
    """Fill every row behind its prompt, token by token; the key of a token is its row's key and position."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)

    def draw(t: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        hidden_BTD = forward(params, model, tokens_BT, positions_BT, None)
        hidden_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, t - 1, 1, axis=1)
        logits_BV = logits(hidden_B1D, params, model)[:, 0]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), logits_BV.shape[1:]))(
            keys_B
        )
        new_B = jnp.argmax(logits_BV + temperature * noise_BV, axis=-1).astype(tokens_BT.dtype)
        old_B = jax.lax.dynamic_index_in_dim(tokens_BT, t, axis=1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            tokens_BT, jnp.where(t < lengths_B, old_B, new_B), t, axis=1
        )

    return jax.lax.fori_loop(1, tokens_BT.shape[1], draw, tokens_BT)
