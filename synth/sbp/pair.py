"""Pairs of related documents: drawn from all neighbors above a similarity, never only the nearest.

The nearest neighbors of a document share its noise, and a synthesizer tuned on them gets worse than untuned; drawn
from all above a threshold, two documents are close to independent given what they are about. Which of them are drawn
is decided by a hash of the two ids, so the pairs are the same for any number of files and shards. With
`sample_above` held, raising `threshold` only removes pairs.

The control gives every first document a second one of another pair, of about the same length: equal numbers,
equal lengths, no relation.

Shapes: N documents, R neighbors of each, P pairs.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.config import ConfigError, stable_seed, to_json
from synth.document import Document, derive_id
from synth.near_duplicates import jaccard, shingles_of, sketches_of, words_of
from synth.neighbors import Exact, IndexConfig, Searcher, Vectors, recall, search
from synth.sbp.parts import UNIQUE, VALIDATION, all_documents, root_of, workdir_of
from synth.stage import Shard

PAIR, RANDOM, REPORT = "pair", "random", "report"
_SKETCH_MARGIN = 0.15  # a sketch of 128 numbers errs by about 0.04, so little above this is missed
_HISTOGRAM_BINS = 100


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """Which neighbors become pairs.

    `num_neighbors` are looked at. A pair needs a similarity above `threshold`; None sets it where documents have
    `neighbors_per_document` above it on average (similarities of pooled states mean nothing across embedders).
    `max_per_first` of a document's neighbors above `sample_above` (None: the threshold) are drawn, near-duplicates
    set aside; `max_per_second` caps how often one is a second document. `label_key` names a field of `meta` for
    which the report counts how often both documents agree.
    """

    num_neighbors: int = 200
    threshold: float | None = None
    neighbors_per_document: float = 20.0
    sample_above: float | None = None
    max_per_first: int = 8
    max_per_second: int = 32
    jaccard_max: float = 0.5
    shingle_words: int = 13
    recall_sample: int = 500
    label_key: str | None = None

    def __post_init__(self):
        faults = []
        for name in ("num_neighbors", "max_per_first", "max_per_second", "shingle_words", "recall_sample"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("threshold", "sample_above"):
            value = getattr(self, name)
            if value is not None and not -1 <= value < 1:
                faults.append(f"{name} must lie in [-1, 1) or be none, got {value}")
        if self.sample_above is not None and (self.threshold is None or self.threshold < self.sample_above):
            faults.append("sample_above needs a threshold that is not below it")
        if not self.neighbors_per_document > 0:
            faults.append(f"neighbors_per_document must be positive, got {self.neighbors_per_document}")
        if not 0 < self.jaccard_max <= 1:
            faults.append(f"jaccard_max must lie in (0, 1], got {self.jaccard_max}")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of the two documents of each pair, by first row, then second; and how similar they are."""

    first_P: np.ndarray
    second_P: np.ndarray
    similarity_P: np.ndarray

    def __len__(self) -> int:
        return len(self.first_P)

    def take(self, chosen: np.ndarray) -> "Pairs":
        """Some of them."""
        return Pairs(
            first_P=self.first_P[chosen],
            second_P=self.second_P[chosen],
            similarity_P=self.similarity_P[chosen],
        )


def all_neighbors(vectors: Vectors, searcher: Searcher, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, R] rows and similarities of the neighbors of every document, once in memory: 1.6 GB of a million with 200."""
    rows_NR = np.full((len(vectors), num_neighbors), -1, np.int32)
    similarity_NR = np.full(rows_NR.shape, -np.inf, np.float32)
    for found in search(vectors, searcher, num_neighbors):
        places = slice(found.rows_QR.shape[1])
        rows_NR[found.queries, places] = found.rows_QR
        similarity_NR[found.queries, places] = found.similarity_QR
    return rows_NR, similarity_NR


def draw_pairs(
    rows_NR: np.ndarray,
    similarity_NR: np.ndarray,
    keys_N: np.ndarray,
    rule: PairRule,
    threshold: float,
    is_barred: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Pairs:
    """The pairs of documents with these neighbors (-1: none). `keys_N` are hashes of their ids.

    `is_barred(first, second)` says which of two arrays of rows must not be pairs: `Barred`.
    """
    above = threshold if rule.sample_above is None else rule.sample_above
    first_X, place_X = np.nonzero(similarity_NR > above)
    second_X = rows_NR[first_X, place_X]
    candidates = Pairs(first_P=first_X, second_P=second_X, similarity_P=similarity_NR[first_X, place_X])
    candidates = candidates.take(candidates.first_P != candidates.second_P)
    candidates = candidates.take(~is_barred(candidates.first_P, candidates.second_P))
    priority = _mix(keys_N[candidates.first_P] ^ _mix(keys_N[candidates.second_P]))
    kept = _lowest(candidates.first_P, priority, rule.max_per_first)
    candidates, priority = candidates.take(kept), priority[kept]
    kept = _lowest(candidates.second_P, priority, rule.max_per_second)
    candidates = candidates.take(kept)
    candidates = candidates.take(candidates.similarity_P > threshold)
    return candidates.take(np.lexsort((candidates.second_P, candidates.first_P)))


def threshold_for(similarity_NR: np.ndarray, neighbors_per_document: float) -> float:
    """The similarity that `neighbors_per_document` neighbors exceed on average, as far as they were looked for."""
    values = np.sort(similarity_NR[np.isfinite(similarity_NR)])[::-1]
    count = int(neighbors_per_document * len(similarity_NR))
    if not len(values):
        return 1.0
    return float(values[min(count, len(values) - 1)])


def derange(pairs: Pairs, length_N: np.ndarray, seed: int) -> Pairs:
    """The same firsts with the seconds of other pairs of about equal length, none its own and none the first itself.

    Seconds are exchanged inside buckets of equal length, doubling bounds; a bucket in which they cannot be joins
    the next longer one.

    Raises:
      ConfigError: there are too few different documents.
    """
    bucket_P = np.floor(np.log2(np.maximum(length_N[pairs.second_P], 1))).astype(int)
    found: list[tuple[np.ndarray, np.ndarray]] = []  # members, their new seconds
    left = np.zeros(0, int)
    for bucket in np.unique(bucket_P).tolist():
        left = np.concatenate([left, np.flatnonzero(bucket_P == bucket)])
        seconds = _deranged(pairs, left, stable_seed("derange", seed, bucket))
        if seconds is not None:
            found.append((left, seconds))
            left = np.zeros(0, int)
    while len(left):  # the longest cannot do alone
        if not found:
            raise ConfigError(
                f"random pairs need more than a few different documents, got {len(np.unique(pairs.second_P))} seconds "
                f"in {len(pairs)} pairs; lower the threshold or take more documents"
            )
        left = np.concatenate([found.pop()[0], left])
        seconds = _deranged(pairs, left, stable_seed("derange", seed, "joined", len(found)))
        if seconds is not None:
            found.append((left, seconds))
            left = np.zeros(0, int)
    second_P = pairs.second_P.copy()
    for members, seconds in found:
        second_P[members] = seconds
    return Pairs(first_P=pairs.first_P, second_P=second_P, similarity_P=np.zeros(len(pairs), np.float32))


def _deranged(pairs: Pairs, members: np.ndarray, seed: int) -> np.ndarray | None:
    """A permutation of the members' seconds with no forbidden place, by exchanges; None when it does not settle."""
    first_P, second_P = pairs.first_P[members], pairs.second_P[members]
    count = len(second_P)
    chance = random.Random(seed)
    order = list(range(count))
    chance.shuffle(order)

    def wrong(i: int, j: int) -> bool:
        return second_P[j] == second_P[i] or second_P[j] == first_P[i]

    for _ in range(50):
        faults = [i for i in range(count) if wrong(i, order[i])]
        if not faults:
            return second_P[order]
        for i in faults:
            j = chance.randrange(count)
            order[i], order[j] = order[j], order[i]
    return None


def _lowest(group_X: np.ndarray, priority_X: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` entries with the lowest priority in each group."""
    order = np.lexsort((priority_X, group_X))
    ordered = group_X[order]
    is_start = np.ones(len(ordered), bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_start)
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    return np.sort(order[rank < count])


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the value."""
    x = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- what must not be a pair -------------------------------------------------------------------------


class Barred:
    """Which rows must not be paired: near-duplicates, and passages of one document.

    Sketches propose near-duplicates, shingles of the texts decide.
    """

    def __init__(self, texts: list[str], roots: list[str], rule: PairRule):
        self._texts, self._rule = texts, rule
        self._root_N = np.unique(np.array(roots), return_inverse=True)[1]
        self._sketch_NS = sketches_of(texts, shingle_words=rule.shingle_words)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        bound, width = self._rule.jaccard_max, self._rule.shingle_words
        found = self._root_N[first] == self._root_N[second]
        for start in range(0, len(first), 1 << 16):
            part = slice(start, start + (1 << 16))
            alike = (self._sketch_NS[first[part]] == self._sketch_NS[second[part]]).mean(axis=1)
            for i in np.flatnonzero(alike >= bound - _SKETCH_MARGIN) + start:
                a, b = (shingles_of(self._texts[int(row[i])], width) for row in (first, second))
                found[i] |= jaccard(a, b) >= bound
        return found


# --- the stage ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Stage: pairs of the unique and of the validation documents, as many random ones, and a report for each part.

    A pair is a document without text whose parents are (first, second); `meta["kind"]` is pair, random or report.
    """

    rule: PairRule = field(default_factory=PairRule)
    index: IndexConfig = field(default_factory=Exact)
    seed: int = 0
    name: str = "pair"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = (UNIQUE, VALIDATION, "embed")

    def identity(self) -> Mapping[str, Any]:
        """The rule, the index, the seed."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """First the unique documents, whose threshold and mean the validation documents share.

        Raises:
          ConfigError: no pair lies above the threshold.
        """
        files = list(all_documents(shard, "embed"))
        threshold, mean = self.rule.threshold, None
        for part in (UNIQUE, VALIDATION):
            own = {d.id: d for d in all_documents(shard, part)}
            chosen = [d for d in files if d.meta["part"] == part]
            paths = [workdir_of(shard) / d.meta["file"] for d in chosen]
            vectors = Vectors(paths, [d.meta["ids"] for d in chosen], mean=mean)
            mean = vectors.mean
            searcher = self.index.build(
                vectors, self.rule.num_neighbors, shard.scratch.parent / f"index-{part}"
            )
            rows_NR, similarity_NR = all_neighbors(vectors, searcher, self.rule.num_neighbors)
            if threshold is None:
                threshold = threshold_for(similarity_NR, self.rule.neighbors_per_document)
            texts = [own[i].text for i in vectors.ids]
            keys_N = np.array([stable_seed("pair", self.seed, i) for i in vectors.ids], np.uint64)
            barred = Barred(texts, [root_of(own[i]) for i in vectors.ids], self.rule)
            pairs = draw_pairs(rows_NR, similarity_NR, keys_N, self.rule, threshold, barred)
            if not len(pairs):
                raise ConfigError(
                    f"pairing must find pairs among the {len(own)} documents of {part}, got none above {threshold:.3f}; "
                    "lower rule.threshold or raise rule.neighbors_per_document"
                )
            length_N = np.array([len(words_of(text)) for text in texts])
            for kind, chosen_pairs in ((PAIR, pairs), (RANDOM, derange(pairs, length_N, self.seed))):
                yield from self._documents(kind, part, chosen_pairs, vectors.ids, shard.recipe)
            report = {
                **_report(rows_NR, similarity_NR, pairs, threshold),
                "recall": recall(vectors, searcher, self.rule.num_neighbors, sample=self.rule.recall_sample),
            }
            if self.rule.label_key is not None:
                label_N = [str(own[i].meta.get(self.rule.label_key, i)) for i in vectors.ids]
                report |= _agreement(label_N, pairs)
            yield Document(
                id=f"report-{part}",
                text="",
                made_by=shard.recipe,
                meta={"kind": REPORT, "part": part, **report},
            )

    def _documents(
        self, kind: str, part: str, pairs: Pairs, ids: list[str], recipe: str
    ) -> Iterator[Document]:
        rows = zip(pairs.first_P.tolist(), pairs.second_P.tolist(), pairs.similarity_P.tolist(), strict=True)
        for number, (first, second, similarity) in enumerate(rows):
            parents = (ids[first], ids[second])
            yield Document(
                id=derive_id(parents, recipe, f"{kind}:{part}:{number}"),
                text="",
                parents=parents,
                made_by=recipe,
                meta={"kind": kind, "part": part, "similarity": round(similarity, 6)},
            )


def _report(rows_NR: np.ndarray, similarity_NR: np.ndarray, pairs: Pairs, threshold: float) -> dict[str, Any]:
    """Numbers of one part: how similar neighbors are, how many pairs, how often a document is in one."""
    finite = similarity_NR[np.isfinite(similarity_NR)]
    counts, edges = np.histogram(finite, bins=_HISTOGRAM_BINS, range=(-1, 1))
    as_first, as_second = Counter(pairs.first_P.tolist()), Counter(pairs.second_P.tolist())
    num_documents = len(rows_NR)
    return {
        "documents": num_documents,
        "pairs": len(pairs),
        "threshold": threshold,
        "neighbors_above": float((similarity_NR > threshold).sum() / num_documents),
        "documents_that_are_first": len(as_first) / num_documents,
        "documents_that_are_second": len(as_second) / num_documents,
        "most_often_second": max(as_second.values()),
        "similarity_of_pairs": float(pairs.similarity_P.mean()),
        "histogram": {"edges": np.round(edges, 4).tolist(), "counts": counts.tolist()},
    }


def _agreement(label_N: Sequence[str], pairs: Pairs) -> dict[str, float]:
    """How often the two documents of a pair have one label, and of two documents taken blindly."""
    same = [
        label_N[a] == label_N[b] for a, b in zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True)
    ]
    share = np.array(list(Counter(label_N).values())) / len(label_N)
    return {"same_label": float(np.mean(same)), "same_label_by_chance": float((share**2).sum())}
