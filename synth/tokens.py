"""From documents to what pretrain reads: one shuffled file of JSON lines, and prefixes of it by exact token count.

The corpus stage writes its documents in a seeded permutation, so a prefix is a random sample and smaller
budgets are parts of larger ones. Its output is a compressed JSON-lines file with `id` and `text`, which is
what `pretrain.data.source.JsonlConfig` reads; parents, recipe and call stay on every line.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import ConfigError, stable_seed, to_json
from synth.document import Document, Failure
from synth.near_duplicates import DuplicateFinder
from synth.shards import LineWriter
from synth.stage import Shard


class Counts(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Stage: all documents in a seeded order; `jaccard_max` drops near-duplicates of earlier ones, None keeps all."""

    seed: int = 0
    jaccard_max: float | None = None
    shingle_words: int = 13
    name: str = "corpus"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        if self.jaccard_max is not None and not 0 < self.jaccard_max <= 1:
            raise ConfigError(f"jaccard_max must lie in (0, 1] or be none, got {self.jaccard_max}")

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """The permuted documents. All texts are held in memory."""
        order = sorted(documents, key=lambda d: stable_seed(self.seed, "corpus", d.id))
        finder = None
        if self.jaccard_max is not None:
            finder = DuplicateFinder(jaccard_at_least=self.jaccard_max, shingle_words=self.shingle_words)
        for document in order:
            twin = finder.first_duplicate(document.text) if finder else None
            if twin is not None:
                yield Failure(
                    document=document.id, item=twin, reason="near_duplicate", detail="", dropped=True
                )
                continue
            if finder:
                finder.add(document.id, document.text)
            yield document


def write_prefix(
    documents: Iterable[Document], path: Path, tokenizer: Counts, budget_tokens: int
) -> tuple[int, int]:
    """Write the longest prefix of `documents` that holds at most `budget_tokens` tokens, one end mark a text included.

    Returns (documents, tokens). A smaller budget gives a prefix of a larger one.

    Raises:
      ConfigError: the corpus is smaller than the budget, or its first text is larger.
    """
    num_documents = num_tokens = 0
    full = False
    with LineWriter(path) as writer:
        for document in documents:
            more = len(tokenizer.encode(document.text)) + 1
            if num_tokens + more > budget_tokens:
                full = True
                break
            writer.write(document.to_line())
            num_documents += 1
            num_tokens += more
        if not num_documents or not full:
            raise ConfigError(
                f"a budget must lie between one text and the corpus, got {budget_tokens} tokens with "
                f"{num_tokens} in {num_documents} texts; write more texts or lower the budget"
            )
        writer.commit()
    return num_documents, num_tokens
