"""How varied a corpus is: distinct n-grams, self-BLEU on a sample, lengths, and coverage of the planned parts."""

import math
import random
from collections import Counter
from collections.abc import Sequence

from synth.near_duplicates import shingles_of, words_of


def distinct_ngrams(texts: Sequence[str], width: int) -> float:
    """Different n-grams over all n-grams of all texts; 0 for no n-grams."""
    seen: set[str] = set()
    total = 0
    for text in texts:
        words = words_of(text)
        total += max(len(words) - width + 1, 0)
        seen |= shingles_of(text, width) if len(words) >= width else set()
    return len(seen) / total if total else 0.0


def self_bleu(texts: Sequence[str], *, sample: int = 50, seed: int = 0) -> float:
    """Mean BLEU-4 (with brevity penalty, add-one on counts) of a sampled text against the other sampled ones.

    Near 1: the texts repeat each other. 0 for fewer than two texts.
    """
    chosen = random.Random(seed).sample(list(texts), min(sample, len(texts)))
    if len(chosen) < 2:
        return 0.0
    grams = [[_ngram_counts(text, n) for n in range(1, 5)] for text in chosen]
    lengths = [len(words_of(text)) for text in chosen]
    scores = []
    for i in range(len(chosen)):
        precision = 0.0
        for n in range(4):
            most: Counter[str] = Counter()
            for j in range(len(chosen)):
                if j != i:
                    most |= grams[j][n]
            total = sum(grams[i][n].values())
            matched = sum(min(count, most[gram]) for gram, count in grams[i][n].items())
            precision += math.log((matched + 1) / (total + 1)) / 4
        others = [length for j, length in enumerate(lengths) if j != i]
        closest = min(others, key=lambda length: (abs(length - lengths[i]), length))
        brevity = min(0.0, 1 - closest / lengths[i]) if lengths[i] else 0.0
        scores.append(math.exp(precision + brevity))
    return sum(scores) / len(scores)


def _ngram_counts(text: str, width: int) -> Counter[str]:
    words = words_of(text)
    return Counter(" ".join(words[i : i + width]) for i in range(len(words) - width + 1))


def copied_fraction(text: str, parent: str, width: int = 8) -> float:
    """The share of the text's word n-grams that stand in its parent; 0 for a text shorter than `width`."""
    if len(words_of(text)) < width:
        return 0.0
    own = shingles_of(text, width)
    return len(own & shingles_of(parent, width)) / len(own)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, 5 %, median, mean, 95 %, maximum; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(fraction: float) -> float:
        return float(ordered[min(int(fraction * len(ordered)), len(ordered) - 1)])

    mean = sum(ordered) / len(ordered)
    return {"min": at(0), "p05": at(0.05), "median": at(0.5), "mean": mean, "p95": at(0.95), "max": at(1)}
