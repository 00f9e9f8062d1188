"""Documents to vectors: the reference model's own hidden states, averaged; so the bootstrap needs nothing from outside.

The paper embeds with Qwen3-Embedding-0.6B; any embedder fits behind `EmbedderConfig`. A shard of documents becomes
one `.npy` file of float32 vectors beside the stage's document that names it; centering and scaling are left to the
search, which sees all files.

Letters: B rows of a batch, T positions, D width.
"""

import asyncio
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pretrain.checkpoint import restore_params
from pretrain.config import ConfigError, local, stable_seed, to_json
from pretrain.model.transformer import ModelConfig, Params, abstract_params, forward
from pretrain.rundir import file_sha256
from pretrain.tokenizer import Tokenizer
from synth.document import Document
from synth.llm.api import Overloaded
from synth.near_duplicates import words_of
from synth.sbp.parts import UNIQUE, VALIDATION, own_documents, workdir_of
from synth.sbp.tune import TOKENIZER, TokenizerFile, checkpoint_of
from synth.shards import shard_stem
from synth.stage import Shard

_TEXTS_AT_ONCE = 4096
_SHORTEST_BUCKET = 32


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The pretrained model: where its parameters are, what shape it has, its tokenizer."""

    checkpoint: Path
    model: ModelConfig
    tokenizer: Tokenizer


class Embedder(Protocol):
    """Texts to vectors."""

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), D] float32, as they come: neither centered nor scaled."""
        ...


class EmbedderConfig(Protocol):
    """Which embedder. The class is the choice; those that bring their own model do not look at `reference`."""

    def build(self, reference: Callable[[], Reference]) -> Embedder: ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the vectors beside the reference model and the texts."""
        ...


# --- our own model -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnStatesConfig:
    """The last hidden states of the reference model, averaged over the tokens of a text cut at `max_tokens`."""

    max_tokens: int = 1024
    tokens_at_once: int = 16384

    def __post_init__(self):
        if not 1 <= self.max_tokens <= self.tokens_at_once:
            raise ConfigError(
                f"max_tokens must lie in [1, tokens_at_once={self.tokens_at_once}], got {self.max_tokens}"
            )

    def build(self, reference: Callable[[], Reference]) -> Embedder:
        found = reference()
        shapes = abstract_params(found.model, found.tokenizer.vocab_size)
        return OwnStates(self, restore_params(found.checkpoint, shapes), found.model, found.tokenizer)

    def identity(self) -> Mapping[str, Any]:
        """The config; the model is an input of the stage."""
        return to_json(self, identity_only=True)


class OwnStates:
    """See `OwnStatesConfig`. Texts are sorted into buckets of doubling length, one compiled program each."""

    def __init__(self, config: OwnStatesConfig, params: Params, model: ModelConfig, tokenizer: Tokenizer):
        self._config, self._params, self._model, self._tokenizer = config, params, model, tokenizer

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.vectors`."""
        bos = self._tokenizer.bos_id
        rows = [[bos, *ids[: self._config.max_tokens - 1]] for ids in self._tokenizer.encode_batch(texts)]
        out = np.empty((len(texts), self._model.width), np.float32)
        for length, members in buckets([len(row) for row in rows], self._config.max_tokens):
            num_rows = max(1, self._config.tokens_at_once // length)
            for start in range(0, len(members), num_rows):
                part = members[start : start + num_rows]
                tokens_BT = np.full((num_rows, length), self._tokenizer.pad_id, np.int32)
                length_B = np.ones(num_rows, np.int32)
                for i, member in enumerate(part):
                    tokens_BT[i, : len(rows[member])] = rows[member]
                    length_B[i] = len(rows[member])
                out[part] = np.asarray(mean_states(self._params, tokens_BT, length_B, self._model))[
                    : len(part)
                ]
        return out


def buckets(lengths: Sequence[int], longest: int) -> Iterator[tuple[int, list[int]]]:
    """(bucket length, indices of what fits it and no shorter one), shortest first; lengths double up to `longest`."""
    length, done = min(_SHORTEST_BUCKET, longest), -1
    while done < longest:
        members = [i for i, n in enumerate(lengths) if done < n <= length]
        if members:
            yield length, members
        done, length = length, min(2 * length, longest)


@functools.partial(jax.jit, static_argnames="model")
def mean_states(
    params: Params, tokens_BT: Int[Array, "B T"], length_B: Int[Array, " B"], model: ModelConfig
) -> Float[Array, "B D"]:
    """Hidden states averaged over the first `length_B` tokens. Padding stands behind them, so it changes nothing."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    counted_BT = positions_BT < length_B[:, None]
    hidden_BTD = forward(params, model, tokens_BT, positions_BT, counted_BT.astype(jnp.int32))
    kept_BTD = jnp.where(counted_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
    return jnp.sum(kept_BTD, axis=1) / length_B[:, None].astype(jnp.float32)


# --- a model behind a URL ----------------------------------------------------------------------------


class VectorModel(Protocol):
    """An open connection that embeds; `EndpointLLM` is one."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]: ...

    async def close(self) -> None: ...


class VectorModelConfig(Protocol):
    """How to open one; `EndpointConfig` is one."""

    concurrency: int

    def identity(self) -> Mapping[str, Any]: ...

    def build(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class AskedConfig:
    """Vectors by a server, `texts_a_call` at once; a busy server is asked again up to `max_attempts` times.

    Texts are cut at `max_characters`. Nothing is kept between runs beyond whole shards of the stage.
    """

    model: VectorModelConfig
    texts_a_call: int = local(64)
    max_characters: int = 8000
    max_attempts: int = local(6)
    first_wait_s: float = local(1.0)

    def __post_init__(self):
        faults = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("texts_a_call", "max_characters", "max_attempts")
            if getattr(self, name) < 1
        ]
        if faults:
            raise ConfigError(*faults)

    def identity(self) -> Mapping[str, Any]:
        """The model and where texts are cut."""
        return {"model": dict(self.model.identity()), "max_characters": self.max_characters}

    def build(self, reference: Callable[[], Reference]) -> Embedder:
        return Asked(self)


@dataclass(frozen=True)
class Asked:
    """See `AskedConfig`."""

    config: AskedConfig

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.vectors`.

        Raises:
          Overloaded: the server stayed busy.
        """
        return asyncio.run(self._all([text[: self.config.max_characters] or " " for text in texts]))

    async def _all(self, texts: Sequence[str]) -> np.ndarray:
        model: VectorModel = self.config.model.build()
        gate = asyncio.Semaphore(self.config.model.concurrency)

        async def ask(part: Sequence[str]) -> list[list[float]]:
            async with gate:
                for attempt in range(self.config.max_attempts):
                    try:
                        return await model.embed(part)
                    except Overloaded as error:
                        if attempt + 1 == self.config.max_attempts:
                            raise
                        wait_s = self.config.first_wait_s * 2**attempt
                        await asyncio.sleep(max(wait_s, error.retry_after_s or 0.0))
            raise AssertionError("every attempt returns or raises")

        size = self.config.texts_a_call
        try:
            parts = await asyncio.gather(*(ask(texts[i : i + size]) for i in range(0, len(texts), size)))
        finally:
            await model.close()
        return np.array([vector for part in parts for vector in part], np.float32)


# --- no model at all ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HashedWordsConfig:
    """Words hashed to signed coordinates, counted by 1 + log: a control that knows words and nothing else."""

    width: int = 384

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"width must be at least 1, got {self.width}")

    def build(self, reference: Callable[[], Reference]) -> Embedder:
        return HashedWords(self.width)

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)


class HashedWords:
    """See `HashedWordsConfig`."""

    def __init__(self, width: int):
        self._width = width
        self._place: dict[str, tuple[int, float]] = {}

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.vectors`."""
        out = np.zeros((len(texts), self._width), np.float32)
        for row, text in zip(out, texts, strict=True):
            words, counts = np.unique(words_of(text), return_counts=True)
            for word, count in zip(words.tolist(), counts.tolist(), strict=True):
                place, sign = self._place.get(word) or self._hash(word)
                row[place] += sign * (1 + np.log(count))
        return out

    def _hash(self, word: str) -> tuple[int, float]:
        key = stable_seed("word", word)
        self._place[word] = (key // 2 % self._width, 1.0 if key % 2 else -1.0)
        return self._place[word]


# --- the stage ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Stage: vectors of the unique and the validation documents; one document for each file of them."""

    embedder: EmbedderConfig
    model: ModelConfig
    name: str = "embed"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = (UNIQUE, VALIDATION, TOKENIZER, "reference")

    def identity(self) -> Mapping[str, Any]:
        """The embedder."""
        return {"embedder": self.embedder.identity()}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """`meta` says which file, whose vectors, and what the file holds."""
        workdir = workdir_of(shard)

        def reference() -> Reference:
            return Reference(
                checkpoint=checkpoint_of(shard, "reference"),
                model=self.model,
                tokenizer=TokenizerFile.of(shard).build(),
            )

        embedder = self.embedder.build(reference)
        for part in (UNIQUE, VALIDATION):
            path = shard.scratch.parent / f"{part}-{shard_stem(shard.index, shard.count)}.npy"
            ids, blocks = [], []
            for texts in _at_once(own_documents(shard, part)):
                ids += [d.id for d in texts]
                blocks.append(embedder.vectors([d.text for d in texts]))
            if not blocks:
                continue
            values = np.concatenate(blocks)
            _save(path, values)
            shard.tally.counts["embedded"] += len(values)
            yield Document(
                id=f"vectors-{part}-{shard.index:05d}",
                text="",
                made_by=shard.recipe,
                meta={
                    "part": part,
                    "file": str(path.relative_to(workdir)),
                    "sha256": file_sha256(path),
                    "width": values.shape[1],
                    "ids": ids,
                },
            )


def _at_once(documents: Iterator[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    for document in documents:
        block.append(document)
        if len(block) == _TEXTS_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def _save(path: Path, values: np.ndarray) -> None:
    """The whole file or none."""
    building = path.with_suffix(".building")
    with open(building, "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    os.replace(building, path)
