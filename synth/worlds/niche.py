"""Worlds as a source of documents and of questions: the niche corpus of the controlled experiment."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import stable_seed, to_json
from synth.document import Document, Failure
from synth.question import Question
from synth.stage import Shard
from synth.worlds.ask import ask_world
from synth.worlds.render import render_document
from synth.worlds.world import Statement, World, WorldConfig, make_worlds


@dataclass(frozen=True, kw_only=True)
class WorldDocuments:
    """Stage: one document a world, each fact once."""

    world: WorldConfig
    scenery: float = 0.0
    flip_probability: float = 0.5
    name: str = "sources"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Every `shard.count`-th world."""
        for index, (world, text, _) in enumerate(self.tell()):
            if index % shard.count == shard.index:
                yield Document(id=world.name, text=text, meta={"source": "worlds"})

    def tell(self) -> Iterator[tuple[World, str, dict[Statement, bool]]]:
        """Each world with its document and the facts that the document tells in reverse."""
        for world in make_worlds(self.world):
            chance = random.Random(stable_seed("niche", self.world.seed, world.name))
            text, flipped = render_document(
                world, chance, scenery=self.scenery, flip_probability=self.flip_probability
            )
            yield world, text, flipped


@dataclass(frozen=True, kw_only=True)
class WorldQuestions:
    """The questions about the documents of a `WorldDocuments`."""

    documents: WorldDocuments

    def load(self) -> list[Question]:
        """All questions, world after world."""
        config = self.documents.world
        return [
            question
            for world, _, flipped in self.documents.tell()
            for question in ask_world(world, flipped, max_hops=config.max_hops, seed=config.seed)
        ]
