"""The parts of a corpus: what is learned again and again, what the oracle has besides, and what is only measured.

A hash of the document's id decides, so a document never changes sides, and parts do not depend on shards; passages
of one document stay together. Each part is a stage, hence a folder of shards that pretraining reads as they are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, stable_seed, to_json
from synth.document import Document, Failure, windows_of
from synth.shards import read_documents
from synth.stage import Shard, Stage

UNIQUE, ORACLE, VALIDATION, TEST = "unique", "oracle", "validation", "test"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of all documents: `validation` chooses between settings, `test` is reported, `unique` is of the rest."""

    unique: float = 0.05
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self):
        faults = [
            f"{name} must lie in (0, 1), got {getattr(self, name)}"
            for name in ("unique", "validation", "test")
            if not 0 < getattr(self, name) < 1
        ]
        if self.validation + self.test >= 1:
            faults.append("validation and test must leave documents to learn from, their sum is 1 or more")
        if faults:
            raise ConfigError(*faults)

    def stages(self, seed: int) -> tuple["Part", ...]:
        """One stage a part. The oracle's documents include the unique ones."""
        held = self.validation + self.test
        ends = {
            VALIDATION: (0.0, self.validation),
            TEST: (self.validation, held),
            UNIQUE: (held, held + self.unique * (1 - held)),
            ORACLE: (held, 1.0),
        }
        return tuple(Part(name=name, start=a, stop=b, seed=seed) for name, (a, b) in ends.items())


@dataclass(frozen=True, kw_only=True)
class Part:
    """Stage: the documents of `sources` whose hash lies in [start, stop) of the unit interval."""

    name: str
    start: float
    stop: float
    seed: int
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ("sources",)

    def identity(self) -> Mapping[str, Any]:
        """The bounds and the seed."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Its documents, each with the name of its part."""
        for document in own_documents(shard, "sources"):
            place = stable_seed("part", self.seed, root_of(document)) / 2**63
            if self.start <= place < self.stop:
                yield replace(document, meta={**document.meta, "part": self.name})


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Stage: the documents of another stage in passages of at most `characters`, cut at paragraphs where possible.

    Two documents must fit one row of the synthesizer. A passage is a document of its own whose `meta` names the
    whole; `min_characters` leaves out what says too little to be paired.
    """

    inner: Stage
    characters: int
    min_characters: int = 1
    name: str = "sources"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        if not 1 <= self.min_characters <= self.characters:
            raise ConfigError(
                f"min_characters must lie in [1, characters={self.characters}], got {self.min_characters}"
            )

    def identity(self) -> Mapping[str, Any]:
        """The sizes, and what the inner stage depends on."""
        sizes = {"characters": self.characters, "min_characters": self.min_characters}
        return {**sizes, "inner": dict(self.inner.identity())}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Passages in the order of documents; failures pass through."""
        for made in self.inner.run(documents, shard=shard):
            if isinstance(made, Failure):
                yield made
                continue
            for number, text in enumerate(windows_of(made.text, self.characters)):
                if len(text) >= self.min_characters:
                    yield replace(
                        made, id=f"{made.id}#{number}", text=text, meta={**made.meta, "document": made.id}
                    )


def root_of(document: Document) -> str:
    """The id of the whole document that this is, or is a passage of."""
    return document.meta.get("document", document.id)


def own_documents(shard: Shard, stage: str) -> Iterator[Document]:
    """What this shard has to work on of a needed stage: its own file when the counts agree, else every n-th document."""
    paths = shard.needed[stage]
    if len(paths) == shard.count:
        yield from read_documents(paths[shard.index])
    else:
        for position, document in enumerate(all_documents(shard, stage)):
            if position % shard.count == shard.index:
                yield document


def all_documents(shard: Shard, stage: str) -> Iterator[Document]:
    """All documents of a needed stage."""
    for path in shard.needed[stage]:
        yield from read_documents(path)


def only_document(shard: Shard, stage: str) -> Document:
    """The one document of a needed stage that makes a single thing."""
    (document,) = all_documents(shard, stage)
    return document


def workdir_of(shard: Shard) -> Path:
    """The folder that holds those of the stages."""
    return shard.scratch.parent.parent
