"""Baselines of the held-out score: unigram and interpolated bigram over the same tokens, and `xz -9e`.

The bigram is Jelinek and Mercer's (1980) deleted interpolation with the bucketed weights of Chen and
Goodman (1998, section 2.3): p(b|a) = w2 c(ab)/c(a) + w1 c(b)/N + w0/V, with weights that depend on how
often `a` was seen. The weights are fitted by EM on a slice of the *train* rows that is left out of the
counts while fitting; the final counts use all train rows. Held-out text takes part in nothing but the score.
A compressor adapts while it reads, but it starts from nothing: it sees no training text.

Shapes: B rows, T targets in a row, T1 = T + 1 tokens, X counted (previous, next) pairs, V vocabulary.
"""

import dataclasses
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pretrain.config import ConfigError

# Contexts with less than 1, 2, 4, .. 2^16 occurrences share their weights.
_NUM_BUCKETS = 18
_EM_ROUNDS = 30
_MAX_FITTED_PAIRS = 1_000_000
_MERGED_PAIRS = 4_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows as the model sees them: target t + 1 of a row counts when its weight is positive."""

    tokens_BT1: np.ndarray
    weights_BT: np.ndarray
    source_B: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ngrams:
    """Counts of tokens and of the pairs that occur; a pair (a, b) has the key a * V + b."""

    vocab_size: int
    num_tokens: int
    unigram_V: np.ndarray
    context_V: np.ndarray
    pair_keys: np.ndarray
    pair_counts: np.ndarray

    def parts_3X(self, keys_X: np.ndarray) -> np.ndarray:
        """The uniform, unigram and bigram estimates of p(b|a); each sums to one over b."""
        previous_X, next_X = np.divmod(keys_X, self.vocab_size)
        place_X = np.minimum(np.searchsorted(self.pair_keys, keys_X), len(self.pair_keys) - 1)
        count_X = np.where(self.pair_keys[place_X] == keys_X, self.pair_counts[place_X], 0)
        unigram_X = self.unigram_V[next_X] / self.num_tokens
        context_X = self.context_V[previous_X]
        # Nothing is known after a context that was never seen: its bigram is the unigram.
        bigram_X = np.where(context_X > 0, count_X / np.maximum(1, context_X), unigram_X)
        return np.stack([np.full(len(keys_X), 1.0 / self.vocab_size), unigram_X, bigram_X])

    def bucket_X(self, keys_X: np.ndarray) -> np.ndarray:
        count_X = self.context_V[keys_X // self.vocab_size]
        return np.minimum(np.frexp(count_X.astype(np.float64))[1], _NUM_BUCKETS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramBaseline:
    """A fitted model: counts, and interpolation weights for (uniform, unigram, bigram) by bucket."""

    counts: _Ngrams
    unigram_weights_2: np.ndarray
    bigram_weights_K3: np.ndarray

    def unigram_nats(self, previous_X: np.ndarray, next_X: np.ndarray) -> np.ndarray:
        """-log p(next), in nats, for each pair."""
        parts_3X = self.counts.parts_3X(_keys(previous_X, next_X, self.counts.vocab_size))
        return -np.log(self.unigram_weights_2 @ parts_3X[:2])

    def bigram_nats(self, previous_X: np.ndarray, next_X: np.ndarray) -> np.ndarray:
        """-log p(next | previous), in nats, for each pair."""
        keys_X = _keys(previous_X, next_X, self.counts.vocab_size)
        weights_X3 = self.bigram_weights_K3[self.counts.bucket_X(keys_X)]
        return -np.log(np.einsum("xc,cx->x", weights_X3, self.counts.parts_3X(keys_X)))


def fit_ngrams(train: Iterable[TokenRows], *, vocab_size: int, fit_fraction: float = 0.1) -> NgramBaseline:
    """Count pairs in `train` and fit the interpolation weights on every `1/fit_fraction`-th row of it.

    Memory grows with the number of different pairs, not with the number of tokens.

    Raises:
      ConfigError: the train rows hold no target.
    """
    counted, fitted, num_rows = _PairCounter(), [np.zeros(0, np.int64)], 0
    num_fitted, stride = 0, max(2, round(1 / fit_fraction))
    for rows in train:
        fit_B = (np.arange(len(rows.tokens_BT1)) + num_rows) % stride == stride - 1
        num_rows += len(fit_B)
        if num_fitted >= _MAX_FITTED_PAIRS:
            fit_B[:] = False
        fitted.append(_keys_of_rows(rows, fit_B, vocab_size))
        num_fitted += len(fitted[-1])
        counted.add(_keys_of_rows(rows, ~fit_B, vocab_size))
    fitted_X = np.concatenate(fitted)
    partial = counted.ngrams(vocab_size)
    if partial.num_tokens + len(fitted_X) == 0:
        raise ConfigError(
            "the n-gram baselines need train rows with at least one target, got none; check data.sources"
        )
    counted.add(fitted_X)
    complete = counted.ngrams(vocab_size)
    if partial.num_tokens == 0 or len(fitted_X) == 0:
        # Fewer rows than the stride: too little text for anything but a fixed guess.
        third_K3 = np.full((_NUM_BUCKETS, 3), 1 / 3)
        return NgramBaseline(counts=complete, unigram_weights_2=np.full(2, 0.5), bigram_weights_K3=third_K3)
    parts_3X = partial.parts_3X(fitted_X)
    return NgramBaseline(
        counts=complete,
        unigram_weights_2=_fit_weights(parts_3X[:2], np.zeros(len(fitted_X), np.int64), 1)[0],
        bigram_weights_K3=_fit_weights(parts_3X, partial.bucket_X(fitted_X), _NUM_BUCKETS),
    )


class _PairCounter:
    """Counts keys, merging what it holds once in a few million: sorting is the cost of all this."""

    def __init__(self) -> None:
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, keys_X: np.ndarray) -> None:
        self._waiting.append(keys_X)
        if sum(map(len, self._waiting)) >= _MERGED_PAIRS:
            self._merge()

    def ngrams(self, vocab_size: int) -> _Ngrams:
        """What was counted so far."""
        self._merge()
        previous, following = np.divmod(self._keys, vocab_size)
        return _Ngrams(
            vocab_size=vocab_size,
            num_tokens=int(self._counts.sum()),
            unigram_V=np.bincount(following, weights=self._counts, minlength=vocab_size),
            context_V=np.bincount(previous, weights=self._counts, minlength=vocab_size),
            pair_keys=self._keys,
            pair_counts=self._counts,
        )

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting = []
        self._keys, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(place, np.concatenate([self._counts, counts]), len(self._keys)).astype(
            np.int64
        )


def _keys_of_rows(rows: TokenRows, chosen_B: np.ndarray, vocab_size: int) -> np.ndarray:
    previous_X, next_X, _, _ = _pairs(rows, chosen_B)
    return _keys(previous_X, next_X, vocab_size)


def _keys(previous_X: np.ndarray, next_X: np.ndarray, vocab_size: int) -> np.ndarray:
    return previous_X.astype(np.int64) * vocab_size + next_X


def _pairs(
    rows: TokenRows, chosen_B: np.ndarray | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(previous, next, weight, source) of every target with a positive weight, flat."""
    tokens_BT1, weights_BT = np.asarray(rows.tokens_BT1)[chosen_B], np.asarray(rows.weights_BT)[chosen_B]
    counts_BT = weights_BT > 0
    source_BT = np.broadcast_to(np.asarray(rows.source_B)[chosen_B][:, None], weights_BT.shape)
    return (
        tokens_BT1[:, :-1][counts_BT],
        tokens_BT1[:, 1:][counts_BT],
        weights_BT[counts_BT].astype(np.float64),
        source_BT[counts_BT],
    )


def _fit_weights(parts_CX: np.ndarray, bucket_X: np.ndarray, num_buckets: int) -> np.ndarray:
    """EM for mixture weights [num_buckets, C]; a bucket without evidence takes the weights of all pairs."""
    num_parts = len(parts_CX)
    weights_KC = np.full((num_buckets, num_parts), 1.0 / num_parts)
    size_K = np.bincount(bucket_X, minlength=num_buckets).astype(np.float64)
    overall_C = weights_KC[0]
    for _ in range(_EM_ROUNDS):
        joint_CX = weights_KC[bucket_X].T * parts_CX
        joint_CX /= joint_CX.sum(axis=0)
        evidence_KC = np.stack([np.bincount(bucket_X, part_X, num_buckets) for part_X in joint_CX], axis=1)
        overall_C = evidence_KC.sum(axis=0) / max(1.0, size_K.sum())
        # One pseudo-pair with the overall weights keeps every weight positive, so nothing unseen has
        # probability zero, and it fills the empty buckets.
        weights_KC = (evidence_KC + overall_C + 1e-9) / (size_K[:, None] + 1.0 + num_parts * 1e-9)
    return weights_KC


# --- scores ------------------------------------------------------------------------------------------


def ngram_bits_per_byte(
    baseline: NgramBaseline,
    heldout: Iterable[TokenRows],
    *,
    heldout_bytes: Mapping[str, int],
    labels: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Bits per byte of `unigram` and `bigram` on held-out rows, by source and under "overall".

    Args:
      heldout: the rows that the model is scored on; `source_B` indexes `labels`.
      heldout_bytes: UTF-8 bytes of the held-out text behind those rows, by source.
    """
    nats = {"unigram": np.zeros(len(labels)), "bigram": np.zeros(len(labels))}
    for rows in heldout:
        previous_X, next_X, weight_X, source_X = _pairs(rows)
        for name, of_pairs in (("unigram", baseline.unigram_nats), ("bigram", baseline.bigram_nats)):
            nats[name] += np.bincount(source_X, weight_X * of_pairs(previous_X, next_X), len(labels))
    return {name: _per_byte(dict(zip(labels, n, strict=True)), heldout_bytes) for name, n in nats.items()}


def _per_byte(nats: Mapping[str, float], num_bytes: Mapping[str, int]) -> dict[str, float]:
    scores = {label: float(nats[label]) / math.log(2) / count for label, count in num_bytes.items() if count}
    total = sum(float(nats[label]) for label in num_bytes)
    return {"overall": total / math.log(2) / sum(num_bytes.values()), **scores}


def xz_bits_per_byte(heldout_texts: Mapping[str, bytes]) -> dict[str, float]:
    """Bits per byte of `xz -9e` on the same bytes: each source alone, and all of them in one stream.

    Raises:
      ConfigError: there are no bytes.
    """
    texts = {label: text for label, text in heldout_texts.items() if text}
    if not texts:
        raise ConfigError("the xz baseline needs held-out bytes, got none; raise data.heldout_percent")
    whole = b"".join(texts.values())
    by_source = {label: _xz_bits(text) / len(text) for label, text in texts.items()}
    return {"overall": _xz_bits(whole) / len(whole), **by_source}


def _xz_bits(text: bytes) -> int:
    # FORMAT_XZ, CRC64 and this preset are what the command line tool uses: same bytes out.
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def baseline_bits_per_byte(
    train: Iterable[TokenRows],
    heldout: Iterable[TokenRows],
    heldout_texts: Mapping[str, bytes],
    *,
    vocab_size: int,
    labels: Sequence[str],
) -> dict[str, dict[str, float]]:
    """`unigram`, `bigram` and `xz` in bits per byte of the held-out text: each by source and "overall"."""
    ngrams = ngram_bits_per_byte(
        fit_ngrams(train, vocab_size=vocab_size),
        heldout,
        heldout_bytes={label: len(text) for label, text in heldout_texts.items()},
        labels=labels,
    )
    return {**ngrams, "xz": xz_bits_per_byte(heldout_texts)}
