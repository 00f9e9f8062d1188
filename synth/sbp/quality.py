"""What the synthetic texts are like, beside held-out real ones and beside the paper's table.

Definitions are ours, because the paper's judge and prompts are not published. repetition: a span of 20 words stands
three times in a text. duplicate: a text near-duplicates an earlier one of the sample. seed copy: it near-duplicates
its own seed (what the filter left). corpus copy: it near-duplicates some document that was learned from. novel: the
share of its 8-grams that no learned document has.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, stable_seed, to_json
from synth.document import Document
from synth.near_duplicates import DuplicateFinder, jaccard, loops, near_duplicate_rate, shingles_of, words_of
from synth.quality.diversity import distinct_ngrams, quantiles
from synth.sbp.parts import TEST, UNIQUE, all_documents
from synth.stage import Shard

# Percent, from reports of arXiv 2509.15248.
PAPER_DUPLICATES_IN = 1_000_000  # texts
PAPER_COLUMNS = ("paper, 200B 3B", "paper, 1T 3B", "paper, 1T 6B", "paper, real text")
PAPER_JUDGED = ((25.6, 7.8, 6.0, None), (15.1, 8.7, 6.5, 1.8))  # irrelevant to the seed; not factual
PAPER = {
    "repetition": (4.3, 3.9, 2.6, 1.8),
    "duplicate": (0.8, 0.8, 0.3, 0.7),
    "seed_copy": (0.1, 0.9, 0.3, None),
}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Stage: one document for each kind of text and one for held-out real ones, from seeded samples of `sample` texts."""

    labels: tuple[str, ...]
    sample: int = 2000
    jaccard_at: float = 0.5
    shingle_words: int = 13
    novel_words: int = 8
    seed: int = 0
    name: str = "quality"
    version: int = 1
    gather: bool = True

    def __post_init__(self):
        if self.sample < 1:
            raise ConfigError(f"sample must be at least 1, got {self.sample}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The learned documents, the real ones to compare with, and the texts."""
        return (UNIQUE, TEST, *(f"texts_{label}" for label in self.labels))

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Real text first."""
        learned = {d.id: d.text for d in all_documents(shard, UNIQUE)}
        finder = DuplicateFinder(jaccard_at_least=self.jaccard_at, shingle_words=self.shingle_words)
        for identity, text in learned.items():
            finder.add(identity, text)
        known = {gram for text in learned.values() for gram in _hashes(text, self.novel_words)}
        for stage in (TEST, *(f"texts_{label}" for label in self.labels)):
            texts = _sampled(
                all_documents(shard, stage), self.sample, stable_seed("quality", self.seed, stage)
            )
            if not texts:
                raise ConfigError(f"stage {stage} must leave texts to measure, it left none")
            yield Document(
                id=stage, text="", made_by=shard.recipe, meta=self._measure(texts, learned, finder, known)
            )

    def _measure(
        self, sampled: list[Document], learned: Mapping[str, str], finder: DuplicateFinder, known: set[int]
    ) -> dict[str, Any]:
        texts = [d.text for d in sampled]
        width = self.shingle_words
        novel = total = 0
        for text in texts:
            grams = _hashes(text, self.novel_words)
            novel += sum(gram not in known for gram in grams)
            total += len(grams)
        seeds = [(d.text, learned[d.parents[0]]) for d in sampled if d.parents]
        copies = [jaccard(shingles_of(a, width), shingles_of(b, width)) >= self.jaccard_at for a, b in seeds]
        duplicates = near_duplicate_rate(texts, jaccard_at_least=self.jaccard_at, shingle_words=width)
        return {
            "sampled": len(texts),
            "repetition": sum(map(loops, texts)) / len(texts),
            "duplicate": duplicates,
            "seed_copy": sum(copies) / len(copies) if copies else None,
            "corpus_copy": sum(finder.first_duplicate(text) is not None for text in texts) / len(texts),
            "novel": novel / total if total else None,
            "distinct_4": distinct_ngrams(texts, 4),
            "words": quantiles([float(len(words_of(text))) for text in texts]),
        }


def _hashes(text: str, width: int) -> set[int]:
    words = words_of(text)
    return {hash(tuple(words[i : i + width])) for i in range(len(words) - width + 1)}


def _sampled(documents: Iterable[Document], count: int, seed: int) -> list[Document]:
    """A uniform sample in the order of the documents met (reservoir)."""
    chance = random.Random(seed)
    chosen: list[Document] = []
    for seen, document in enumerate(documents):
        if len(chosen) < count:
            chosen.append(document)
        elif (place := chance.randrange(seen + 1)) < count:
            chosen[place] = document
    return chosen
