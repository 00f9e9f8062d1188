"""Which passages may answer a question: by words (BM25), by vectors, or by knowing the document (the ceiling)."""

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.config import ConfigError, to_json
from pretrain.rundir import write_atomic
from synth.neighbors import Exact, IndexConfig, Searcher, Vectors
from synth.retrieval.chunk import Passage

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked, and about which document; only the ceiling looks at the document."""

    text: str
    document: str


class Retriever(Protocol):
    """Passages, ready to be searched."""

    def find(self, queries: Sequence[Query], count: int) -> list[list[int]]:
        """For each query the numbers of at most `count` passages, best first; ties go to the earlier passage."""
        ...


class RetrieverConfig(Protocol):
    """How passages are searched. The class is the choice."""

    def build(self, passages: Sequence[Passage], folder: Path) -> Retriever:
        """Ready to search; `folder` keeps what is costly to make again."""
        ...


# --- by words ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bm25Config:
    """Okapi BM25 (Robertson and Zaragoza 2009) with the never-negative inverse document frequency of Lucene."""

    k1: float = 1.2
    b: float = 0.75

    def __post_init__(self):
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ConfigError(f"k1 must not be negative and b lie in [0, 1], got {self.k1} and {self.b}")

    def build(self, passages: Sequence[Passage], folder: Path) -> Retriever:
        return Bm25(self, passages)


class Bm25:
    """See `Bm25Config`. Postings in memory."""

    def __init__(self, config: Bm25Config, passages: Sequence[Passage]):
        counts = [Counter(words_of(passage.shown)) for passage in passages]
        lengths = np.array([sum(count.values()) for count in counts], float)
        mean = lengths.mean() if len(lengths) else 1.0
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                numbers, frequencies = postings.setdefault(word, ([], []))
                numbers.append(number)
                frequencies.append(times)
        self._num_passages = len(passages)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (numbers, frequencies) in postings.items():
            rows, times = np.array(numbers), np.array(frequencies, float)
            rarity = math.log(1 + (len(passages) - len(rows) + 0.5) / (len(rows) + 0.5))
            norm = config.k1 * (1 - config.b + config.b * lengths[rows] / mean)
            self._postings[word] = (rows, rarity * times * (config.k1 + 1) / (times + norm))

    def scores(self, text: str) -> np.ndarray:
        """The score of every passage."""
        total = np.zeros(self._num_passages)
        for word in words_of(text):
            if word in self._postings:
                rows, weights = self._postings[word]
                total[rows] += weights
        return total

    def find(self, queries: Sequence[Query], count: int) -> list[list[int]]:
        return [np.argsort(-self.scores(q.text), kind="stable")[:count].tolist() for q in queries]


# --- by vectors --------------------------------------------------------------------------------------


class Embedder(Protocol):
    """Texts to vectors; the inner product of unit vectors is their similarity."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32."""
        ...


class EmbedderConfig(Protocol):
    """Which embedder. The class is the choice."""

    def build(self) -> Embedder: ...


@dataclass(frozen=True, kw_only=True)
class HashedWords:
    """Words hashed to `width` places, each counted as the square root of its frequency: vectors with no model."""

    width: int = 4096

    def __post_init__(self):
        if self.width < 2:
            raise ConfigError(f"width must be at least 2, got {self.width}")

    def build(self) -> Embedder:
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, width] float32."""
        out = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(out, texts, strict=True):
            for word, times in Counter(words_of(text)).items():
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                place = int.from_bytes(digest[:7], "big") % self.width
                row[place] += math.sqrt(times) * (1 if digest[7] & 1 else -1)
        return out


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Nearest neighbors among the vectors of the passages, by the index of `neighbors`."""

    embedder: EmbedderConfig
    index: IndexConfig = Exact()

    def build(self, passages: Sequence[Passage], folder: Path) -> Retriever:
        embedder = self.embedder.build()
        texts = [passage.shown for passage in passages]
        key = hashlib.sha256(json.dumps([to_json(self.embedder), texts]).encode()).hexdigest()[:16]
        path = folder / f"passages-{key}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _save(path, embedder.embed(texts))
        names = [f"{number:09d}" for number in range(len(passages))]  # sorted as the passages are
        width = np.load(path, mmap_mode="r").shape[1]
        vectors = Vectors([path], [names], mean=np.zeros(width, np.float32))
        return Dense(embedder, vectors, self.index, folder / f"index-{key}")


def _save(path: Path, vectors: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors.astype(np.float32))
    write_atomic(path, buffer.getvalue())


class Dense:
    """See `DenseConfig`."""

    def __init__(self, embedder: Embedder, vectors: Vectors, index: IndexConfig, folder: Path):
        self._embedder, self._vectors, self._index, self._folder = embedder, vectors, index, folder
        self._searchers: dict[int, Searcher] = {}

    def find(self, queries: Sequence[Query], count: int) -> list[list[int]]:
        count = min(count, len(self._vectors))
        if count not in self._searchers:
            self._searchers[count] = self._index.build(self._vectors, count, self._folder)
        query_QD = self._embedder.embed([query.text for query in queries]).astype(np.float32)
        norm_Q1 = np.linalg.norm(query_QD, axis=1, keepdims=True)
        query_QD = query_QD / np.where(norm_Q1 > 0, norm_Q1, 1)
        rows_QP = np.sort(self._searchers[count].propose(query_QD), axis=1).astype(np.int64)
        similarity_QP = self._vectors.similarities(query_QD, rows_QP)
        order = np.argsort(-similarity_QP, axis=1, kind="stable")[:, :count]
        rows = np.take_along_axis(rows_QP, order, axis=1)
        return [[row for row in found if row >= 0] for found in rows.tolist()]


# --- the ceiling -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """The passages of the right document in reading order: what perfect retrieval would allow."""

    def build(self, passages: Sequence[Passage], folder: Path) -> Retriever:
        numbers: dict[str, list[int]] = {}
        for number, passage in enumerate(passages):
            numbers.setdefault(passage.document, []).append(number)
        return Oracle(numbers)


@dataclass(frozen=True)
class Oracle:
    """See `OracleConfig`."""

    numbers: Mapping[str, Sequence[int]]

    def find(self, queries: Sequence[Query], count: int) -> list[list[int]]:
        return [list(self.numbers.get(query.document, ()))[:count] for query in queries]


# --- measuring ---------------------------------------------------------------------------------------


def recall(
    found: Sequence[Sequence[int]], queries: Sequence[Query], passages: Sequence[Passage], k: int
) -> float:
    """The share of queries with a passage of their document among the first `k`."""
    hits = [
        any(passages[number].document == query.document for number in numbers[:k])
        for numbers, query in zip(found, queries, strict=True)
    ]
    return sum(hits) / len(hits) if hits else 0.0
