"""Near-duplicates: word shingles, exact Jaccard similarity, MinHash to find candidates; and texts that loop."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Lower-case words, punctuation dropped."""
    return _WORD.findall(text.lower())


def shingles_of(text: str, width: int) -> set[str]:
    """The distinct runs of `width` words; a shorter text is one shingle."""
    words = words_of(text)
    if len(words) <= width:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + width]) for i in range(len(words) - width + 1)}


def jaccard(a: set[str], b: set[str]) -> float:
    """|a and b| / |a or b|; 0 when both are empty."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def loops(text: str, *, span_words: int = 20, times: int = 3) -> bool:
    """Whether some span of `span_words` words occurs `times` times: the sign of a model that cannot stop."""
    words = words_of(text)
    seen: dict[tuple[str, ...], int] = {}
    for i in range(len(words) - span_words + 1):
        span = tuple(words[i : i + span_words])
        seen[span] = seen.get(span, 0) + 1
        if seen[span] >= times:
            return True
    return False


class DuplicateFinder:
    """Texts added one by one; each is compared with those before it. MinHash proposes, exact Jaccard decides.

    Memory grows with the shingles of all texts kept, about 100 bytes a shingle.
    """

    def __init__(
        self, *, jaccard_at_least: float = 0.5, shingle_words: int = 13, num_permutations: int = 128
    ):
        self._bound = jaccard_at_least
        self._width = shingle_words
        self._blank = MinHash(num_perm=num_permutations, seed=1)
        # A lower threshold in the index than in the decision: a missed candidate is never seen again.
        self._index = MinHashLSH(threshold=max(jaccard_at_least - 0.15, 0.05), num_perm=num_permutations)
        self._shingles: dict[str, set[str]] = {}

    def first_duplicate(self, text: str) -> str | None:
        """The key of an added text whose similarity is at least the bound: the most similar one, if any."""
        shingles = shingles_of(text, self._width)
        if not shingles:
            return None
        candidates = [str(key) for key in self._index.query(self._sketch(shingles))]
        scored = sorted((-jaccard(shingles, self._shingles[key]), key) for key in candidates)
        return scored[0][1] if scored and -scored[0][0] >= self._bound else None

    def add(self, key: str, text: str) -> None:
        """Remember a text under a new key."""
        shingles = shingles_of(text, self._width)
        if shingles:
            self._shingles[key] = shingles
            self._index.insert(key, self._sketch(shingles))

    def _sketch(self, shingles: Iterable[str]) -> MinHash:
        sketch = self._blank.copy()  # the permutations are the costly part of a new one
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        return sketch


def sketches_of(texts: Sequence[str], *, shingle_words: int = 13, num_permutations: int = 128) -> np.ndarray:
    """[len(texts), num_permutations]: the share of equal numbers in two rows estimates the Jaccard similarity.

    A text without words is similar to no other.
    """
    blank = MinHash(num_perm=num_permutations, seed=1)
    sketches = np.empty((len(texts), num_permutations), np.uint64)
    for i, text in enumerate(texts):
        sketch = blank.copy()
        shingles = shingles_of(text, shingle_words)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        sketches[i] = sketch.hashvalues if shingles else i + 2**40  # above all hashes, and no other's
    return sketches


def near_duplicate_rate(
    texts: Sequence[str], *, jaccard_at_least: float = 0.5, shingle_words: int = 13
) -> float:
    """The share of texts that near-duplicate an earlier one; 0 for no texts."""
    finder = DuplicateFinder(jaccard_at_least=jaccard_at_least, shingle_words=shingle_words)
    found = np.zeros(len(texts), dtype=bool)
    for i, text in enumerate(texts):
        found[i] = finder.first_duplicate(text) is not None
        finder.add(str(i), text)
    return float(found.mean()) if len(texts) else 0.0
