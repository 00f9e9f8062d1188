"""Nearest neighbors by cosine among vectors in many files: exact, inverted lists with product quantization, or a graph.

The search of an index only proposes. What it proposes is scored again from the stored vectors, one pair at a time in
one order of additions, and rows are numbered by sorted document id; so similarities, ties and results do not depend
on how the vectors lie in files. Quantizers are trained once, on a sample of all files; lists lie on the disk, one
file of lists for each file of vectors, and are read through the page cache. The only file that imports `faiss`.

Shapes: N vectors, D their width, Q queries, R neighbors asked for, S sampled rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from pretrain.config import ConfigError

_QUERIES_AT_ONCE = 4096
_SCORED_BYTES = 1 << 27
_BASE_ROWS = 1 << 16
_EXACT_MARGIN = 8  # neighbors beyond the last one asked for: a tie there is settled by the second scoring
_CENTER_ROWS = 1 << 17


class Vectors:
    """Vectors of many `.npy` files [n, D], read when asked for; row r belongs to the r-th id in sorted order.

    `mean` [D] is taken off, by default that of a fixed sample: pooled states of a model are all alike before that.
    Rows are scaled to length one. Memory holds the ids and one block of rows.

    Raises:
      ConfigError: ids are repeated, or do not match the files.
    """

    def __init__(
        self, files: Sequence[Path], ids: Sequence[Sequence[str]], *, mean: np.ndarray | None = None
    ):
        self._maps = [np.load(path, mmap_mode="r") for path in files]
        for path, values, own in zip(files, self._maps, ids, strict=True):
            if values.ndim != 2 or len(values) != len(own):
                raise ConfigError(
                    f"{path} must hold one vector for each of {len(own)} documents, got shape {values.shape}"
                )
        widths = {values.shape[1] for values in self._maps}
        if len(widths) != 1:
            raise ConfigError(f"files of vectors must share one width, got {sorted(widths)}")
        self.width = widths.pop()
        flat = [identity for own in ids for identity in own]
        order = sorted(range(len(flat)), key=flat.__getitem__)
        self.ids = [flat[i] for i in order]
        if any(a == b for a, b in zip(self.ids, self.ids[1:], strict=False)):
            raise ConfigError("documents to pair must have different ids, one occurs twice")
        starts = np.cumsum([0, *(len(values) for values in self._maps)])
        place = np.asarray(order, np.int64)
        self._file = np.searchsorted(starts, place, side="right") - 1
        self._row = place - starts[self._file]
        if mean is None:
            mean = self.read(self.sample(_CENTER_ROWS), scaled=False).mean(axis=0, dtype=float)
        self.mean = np.asarray(mean, np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_files(self) -> int:
        return len(self._maps)

    def rows_of(self, file: int) -> np.ndarray:
        """The rows that lie in a file, ascending."""
        return np.flatnonzero(self._file == file)

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """At most `count` rows, ascending: a function of the number of rows and the seed alone."""
        order = np.argsort(np.random.Philox(key=seed).random_raw(len(self)), kind="stable")
        return np.sort(order[:count])

    def read(self, rows: np.ndarray, *, scaled: bool = True) -> np.ndarray:
        """[len(rows), D] float32, centered and of length one."""
        out = np.empty((len(rows), self.width), np.float32)
        files = self._file[rows]
        for file in np.unique(files):
            mine = np.flatnonzero(files == file)
            out[mine] = self._maps[file][self._row[rows[mine]]]
        if scaled:
            out -= self.mean
            norm = np.sqrt(np.einsum("nd,nd->n", out, out))
            out /= np.where(norm > 0, norm, 1)[:, None]
        return out

    def similarities(self, query_QD: np.ndarray, rows_QR: np.ndarray) -> np.ndarray:
        """[Q, R]: each query with its own rows, every pair added up in the same order; -inf where a row is -1."""
        out = np.empty(rows_QR.shape, np.float32)
        step = max(1, _SCORED_BYTES // (4 * self.width * max(1, rows_QR.shape[1])))
        for start in range(0, len(out), step):
            rows = rows_QR[start : start + step]
            found, back = np.unique(np.maximum(rows, 0), return_inverse=True)
            base = self.read(found)[back.reshape(rows.shape)]
            out[start : start + step] = np.einsum("qd,qrd->qr", query_QD[start : start + step], base)
        np.clip(out, -1, 1, out=out)
        out[rows_QR < 0] = -np.inf
        return out


@dataclass(frozen=True, kw_only=True)
class Found:
    """Neighbors of some queries, nearest first; equal similarities by row. Missing ones are row -1, -inf."""

    queries: np.ndarray  # [Q]
    rows_QR: np.ndarray
    similarity_QR: np.ndarray


class Searcher(Protocol):
    """An index that is ready."""

    def propose(self, query_QD: np.ndarray) -> np.ndarray:
        """[Q, P]: rows worth scoring, in any order; -1 for none."""
        ...


class IndexConfig(Protocol):
    """How neighbors are searched. The class is the choice."""

    def build(self, vectors: Vectors, num_neighbors: int, folder: Path) -> Searcher:
        """Ready to propose for `num_neighbors`; `folder` takes what does not stay in memory."""
        ...


# --- exact -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Every pair is compared: time grows with N squared (about 20 minutes for 300,000 x 384 on two cores)."""

    def build(self, vectors: Vectors, num_neighbors: int, folder: Path) -> Searcher:
        return _ExactSearcher(vectors, num_neighbors + _EXACT_MARGIN)


@dataclass(frozen=True)
class _ExactSearcher:
    vectors: Vectors
    count: int

    def propose(self, query_QD: np.ndarray) -> np.ndarray:
        best: tuple[np.ndarray, np.ndarray] | None = None
        for start in range(0, len(self.vectors), _BASE_ROWS):
            rows = np.arange(start, min(start + _BASE_ROWS, len(self.vectors)))
            found = faiss.knn(
                query_QD,
                self.vectors.read(rows),
                min(self.count, len(rows)),
                metric=faiss.METRIC_INNER_PRODUCT,
            )
            best = _merge(best, (found[0], found[1] + start), self.count)
        assert best is not None
        return best[1]


# --- inverted lists with product quantization --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InvertedLists:
    """Vectors in `num_lists` clusters, each kept as `num_bytes` codes of one byte (arXiv 1702.08734, IVFPQ).

    `num_probes` clusters are looked at for a query, and `propose_factor` times the neighbors asked for are scored
    from the vectors themselves. Sizes of None follow the number of vectors.
    """

    num_lists: int | None = None  # None: 4 sqrt(N)
    num_probes: int = 32
    num_bytes: int = 64
    propose_factor: int = 4
    num_train: int = 1 << 17
    seed: int = 0

    def __post_init__(self):
        faults = []
        for name in ("num_probes", "num_bytes", "propose_factor", "num_train"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_lists is not None and self.num_lists < 1:
            faults.append(f"num_lists must be at least 1 or none, got {self.num_lists}")
        if faults:
            raise ConfigError(*faults)

    def build(self, vectors: Vectors, num_neighbors: int, folder: Path) -> Searcher:
        """Train on a sample of all files, then fill the lists of each file of vectors and leave them on the disk.

        Raises:
          ConfigError: the width does not divide into `num_bytes` parts, or there are too few vectors to train on.
        """
        lists = self.num_lists or max(1, round(4 * math.sqrt(len(vectors))))
        least = max(lists, 256)
        if vectors.width % self.num_bytes or len(vectors) < least:
            raise ConfigError(
                f"inverted lists need a width divisible by num_bytes={self.num_bytes} and at least {least} vectors, "
                f"got width {vectors.width} and {len(vectors)} vectors; use Exact() or other sizes"
            )
        folder.mkdir(parents=True, exist_ok=True)
        coarse = faiss.IndexFlatIP(vectors.width)
        empty = faiss.IndexIVFPQ(coarse, vectors.width, lists, self.num_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        for clustering in (empty.cp, empty.pq.cp):
            clustering.seed = self.seed + 1234
            clustering.min_points_per_centroid = 1
        empty.cp.niter = 10
        empty.train(vectors.read(vectors.sample(self.num_train, self.seed)))
        indices = []
        for file in range(vectors.num_files):
            filled = faiss.clone_index(empty)
            rows = vectors.rows_of(file)
            for start in range(0, len(rows), _BASE_ROWS):
                part = rows[start : start + _BASE_ROWS]
                filled.add_with_ids(vectors.read(part), part)
            path = folder / f"{file:05d}.faiss"
            faiss.write_index(filled, str(path))
            del filled
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            index.nprobe = min(self.num_probes, lists)
            indices.append(index)
        count = self.propose_factor * num_neighbors + _EXACT_MARGIN
        return _ListsSearcher(indices, min(count, len(vectors)))


@dataclass(frozen=True)
class _ListsSearcher:
    indices: list[Any]
    count: int

    def propose(self, query_QD: np.ndarray) -> np.ndarray:
        best: tuple[np.ndarray, np.ndarray] | None = None
        for index in self.indices:
            best = _merge(best, index.search(query_QD, self.count), self.count)
        assert best is not None
        return best[1]


# --- a graph -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A navigable small-world graph over all vectors (arXiv 1603.09320, HNSW), whole in memory.

    Built by one thread in the order of ids, because the graph depends on the order of insertion.
    """

    num_links: int = 32
    num_candidates_build: int = 80
    num_candidates: int = 128

    def __post_init__(self):
        faults = [
            f"{name} must be at least 2, got {getattr(self, name)}"
            for name in ("num_links", "num_candidates_build", "num_candidates")
            if getattr(self, name) < 2
        ]
        if faults:
            raise ConfigError(*faults)

    def build(self, vectors: Vectors, num_neighbors: int, folder: Path) -> Searcher:
        index = faiss.IndexHNSWFlat(vectors.width, self.num_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.num_candidates_build
        index.hnsw.efSearch = max(self.num_candidates, num_neighbors + _EXACT_MARGIN)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            for start in range(0, len(vectors), _BASE_ROWS):
                index.add(vectors.read(np.arange(start, min(start + _BASE_ROWS, len(vectors)))))
        finally:
            faiss.omp_set_num_threads(threads)
        return _ListsSearcher([index], min(num_neighbors + _EXACT_MARGIN, len(vectors)))


# --- searching ---------------------------------------------------------------------------------------


def search(
    vectors: Vectors, searcher: Searcher, num_neighbors: int, queries: np.ndarray | None = None
) -> Iterator[Found]:
    """The nearest `num_neighbors` rows of each query row (all rows by default) other than itself, block by block."""
    queries = np.arange(len(vectors)) if queries is None else queries
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        block = queries[start : start + _QUERIES_AT_ONCE]
        query_QD = vectors.read(block)
        rows_QP = np.sort(searcher.propose(query_QD), axis=1).astype(np.int64)
        rows_QP[rows_QP == block[:, None]] = -1
        similarity_QP = vectors.similarities(query_QD, rows_QP)
        # Rows ascend, so a stable sort settles equal similarities by row.
        order_QR = np.argsort(-similarity_QP, axis=1, kind="stable")[:, :num_neighbors]
        yield Found(
            queries=block,
            rows_QR=np.take_along_axis(rows_QP, order_QR, axis=1),
            similarity_QR=np.take_along_axis(similarity_QP, order_QR, axis=1),
        )


def recall(
    vectors: Vectors, searcher: Searcher, num_neighbors: int, *, sample: int = 1000, seed: int = 0
) -> float:
    """The share of the exact nearest `num_neighbors` that `searcher` finds, over a sample of queries."""
    queries = vectors.sample(sample, seed)
    exact = Exact().build(vectors, num_neighbors, Path())
    hits = total = 0
    pairs = zip(
        search(vectors, searcher, num_neighbors, queries),
        search(vectors, exact, num_neighbors, queries),
        strict=True,
    )
    for found, right in pairs:
        for mine, true in zip(found.rows_QR, right.rows_QR, strict=True):
            true = true[true >= 0]
            hits += len(np.intersect1d(mine, true))
            total += len(true)
    return hits / total if total else 1.0


def _merge(
    best: tuple[np.ndarray, np.ndarray] | None, found: tuple[np.ndarray, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` most similar of two lists of (similarity, row) for each query."""
    if best is None:
        return found
    similarity = np.concatenate([best[0], found[0]], axis=1)
    rows = np.concatenate([best[1], found[1]], axis=1)
    if similarity.shape[1] <= count:
        return similarity, rows
    keep = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    return np.take_along_axis(similarity, keep, axis=1), np.take_along_axis(rows, keep, axis=1)
