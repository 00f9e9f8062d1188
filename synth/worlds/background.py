"""What a base model reads before it meets the niche: open books, and worlds that stay the same.

Two sources for `pretrain`, made as they are read. `OpenBook` teaches to look things up in the text at hand: names are
drawn anew for every document, so nothing can be memorized, and answers can only be found in the document before
them. `Recurring` teaches the opposite: its worlds come again in every style and in questions, so a question without
a text must be answered from memory. Neither shares a fact with the niche.
"""

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pretrain.config import ConfigError, stable_seed
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource, fingerprint_of
from synth.question import Question
from synth.worlds.ask import ask_world
from synth.worlds.render import question, render, render_document
from synth.worlds.world import (
    Statement,
    World,
    WorldConfig,
    closure,
    edges_of,
    make_world,
    make_worlds,
    shortest_chains,
    spell,
)

_HELDOUT_SHARE = 0.25  # of the questions about recurring worlds: asked of the base, never shown to it
_QUESTIONS_A_BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class MadeSource(SourceConfig):
    """`count` documents, each a function of (seed, its number)."""

    seed: int
    count: int
    version: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, got {self.count}")

    def build(self, root: str) -> TextSource:
        """The source; it reads no file."""
        return _Made(self)

    @abstractmethod
    def written(self) -> Iterator[list[tuple[str, bool]]]:
        """The documents, each in parts with whether they are learned."""

    def texts(self) -> Iterator[str]:
        """The documents, whole."""
        return ("".join(text for text, _ in parts) for parts in self.written())

    def chances(self) -> Iterator[random.Random]:
        """The randomness of each document: a larger `count` continues a smaller one."""
        for number in range(self.count):
            yield random.Random(stable_seed("background", type(self).__name__, self.seed, number))


@dataclass(frozen=True)
class _Made:
    config: MadeSource
    identity: str = ""

    def content_files(self) -> list:
        return []

    def content_fingerprint(self) -> str:
        return fingerprint_of(self.identity, [])

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        name = self.config.name
        for number, parts in enumerate(self.config.written()):
            spans, end = [], 0
            for text, learned in parts:
                if learned:
                    spans.append((end, end + len(text)))
                end += len(text)
            yield TextDocument(
                id=f"{name}-{number}",
                text="".join(text for text, _ in parts),
                source=name,
                learned=tuple(spans) if len(spans) < len(parts) else None,
            )


@dataclass(frozen=True, kw_only=True)
class OpenBook(MadeSource):
    """A fresh world told as the niche is, then at most `num_questions` about it with their answers, none twice.

    Only answers are learned: names of a fresh world cannot be foreseen, and a small model that is asked to foresee
    them does not begin to read for long. Worlds have `num_facts` (least, most) facts. A share `hop_share` of the
    questions spans up to `max_hops` facts.
    """

    num_names: int
    per_type: tuple[int, ...] = (5, 4, 4, 4)
    num_facts: tuple[int, int]
    num_questions: int
    max_hops: int = 2
    hop_share: float = 0.0

    def written(self) -> Iterator[list[tuple[str, bool]]]:
        """Documents with their questions."""
        for chance in self.chances():
            names = [spell(i) for i in chance.sample(range(self.num_names), sum(self.per_type))]
            world = make_world("fresh", names, self.per_type, chance, chance.randint(*self.num_facts))
            facts = [told for fact in world.facts for told in (fact, fact.reversed())]
            derived = (
                [s for s in closure(world.facts, self.max_hops) if len(s.chain) > 1] if self.hop_share else []
            )
            chance.shuffle(facts)
            chance.shuffle(derived)
            parts = [(render_document(world, chance)[0], False)]
            for _ in range(min(self.num_questions, len(facts) + len(derived))):
                is_hop = derived and (not facts or chance.random() < self.hop_share)
                statement = (derived if is_hop else facts).pop()
                parts += [(f" {question(statement)} ", False), (statement.object, True), (".", False)]
            yield parts


@dataclass(frozen=True, kw_only=True)
class Recurring(MadeSource):
    """Worlds beside the niche of `world`: documents, texts about two entities, and blocks of questions with answers."""

    world: WorldConfig
    num_worlds: int

    def worlds(self) -> list[World]:
        """The worlds: they follow those of the niche, so they share no name with it."""
        niche = self.world.num_documents
        return make_worlds(replace(self.world, num_documents=niche + self.num_worlds))[niche:]

    def written(self) -> Iterator[list[tuple[str, bool]]]:
        """Each world in turn, in one of the three styles, learned whole."""
        worlds = self.worlds()
        shown = [self.split(world)[0] for world in worlds]
        for number, chance in enumerate(self.chances()):
            index = number % len(worlds)
            style = chance.random()
            if style < 0.4:
                text = render_document(worlds[index], chance)[0]
            elif style < 0.7:
                text = _about_two(worlds[index], chance, self.world.max_hops)
            else:
                asked = chance.choices(shown[index], k=_QUESTIONS_A_BLOCK)
                text = " ".join(f"{q.text} {q.options[q.gold]}." for q in asked)
            yield [(text, True)]

    def split(self, world: World) -> tuple[list[Question], list[Question]]:
        """The questions that texts ask, and those that none asks though their facts are told."""
        shown: list[Question] = []
        kept: list[Question] = []
        asked = ask_world(
            world, dict.fromkeys(world.facts, False), max_hops=self.world.max_hops, seed=self.seed
        )
        for q in asked:
            is_kept = random.Random(stable_seed("kept", self.seed, q.id)).random() < _HELDOUT_SHARE
            (kept if is_kept else shown).append(q)
        return shown, kept


@dataclass(frozen=True, kw_only=True)
class RecurringQuestions:
    """The questions about recurring worlds that no text of theirs asks."""

    recurring: Recurring

    def load(self) -> list[Question]:
        """All questions, world after world."""
        return [question for world in self.recurring.worlds() for question in self.recurring.split(world)[1]]


def _about_two(world: World, chance: random.Random, max_hops: int) -> str:
    """What links two entities, told first, then the facts about either: the form of a relation text."""
    first, second = chance.sample(sorted(world.entities), 2)
    chain = shortest_chains(edges_of(world.facts), first, max_hops).get(second, ())
    opening = [Statement(chain, first, second)] if len(chain) > 1 else []
    about = [fact for fact in world.facts if {fact.subject, fact.object} & {first, second}]
    chance.shuffle(about)
    return " ".join(render(statement, chance) for statement in [*opening, *about])
