"""Fictional worlds: entities of four types, six one-to-one relations, and everything that follows from them.

A statement is a chain of steps from one entity to another: one step is a fact, in its own direction or in the
inverse one, and a longer chain is derived ("the home of the teacher of X is Y"). Because relations are
one-to-one, every chain has at most one answer.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import ConfigError, stable_seed

TYPES = ("person", "place", "order", "treasure")


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`noun` leads from subject to object ("the teacher of"), `inverse_noun` back ("the pupil of")."""

    name: str
    subject: str
    object: str
    noun: str
    inverse_noun: str


RELATIONS = (
    Relation(name="teacher", subject="person", object="person", noun="teacher", inverse_noun="pupil"),
    Relation(name="home", subject="person", object="place", noun="home", inverse_noun="resident"),
    Relation(name="employer", subject="person", object="order", noun="employer", inverse_noun="servant"),
    Relation(name="seat", subject="order", object="place", noun="seat", inverse_noun="tenant"),
    Relation(name="keeper", subject="treasure", object="person", noun="keeper", inverse_noun="charge"),
    Relation(name="origin", subject="treasure", object="place", noun="origin", inverse_noun="relic"),
)


@dataclass(frozen=True, order=True)
class Step:
    """One edge of a chain: a relation, walked along or against its direction."""

    relation: str
    inverse: bool = False

    @property
    def noun(self) -> str:
        """The word that leads along this step."""
        relation = relation_named(self.relation)
        return relation.inverse_noun if self.inverse else relation.noun

    def reversed(self) -> "Step":
        """The same edge the other way."""
        return Step(self.relation, not self.inverse)


@dataclass(frozen=True, order=True)
class Statement:
    """`chain` leads from `subject` to `object`; one step that is not inverse is a fact as the world holds it."""

    chain: tuple[Step, ...]
    subject: str
    object: str

    def reversed(self) -> "Statement":
        """The same knowledge told from the other end."""
        return Statement(tuple(step.reversed() for step in reversed(self.chain)), self.object, self.subject)

    def canonical(self) -> "Statement":
        """The one of the two directions that stands for both: for a fact, its own."""
        if len(self.chain) == 1:
            return self.reversed() if self.chain[0].inverse else self
        return min(self, self.reversed())


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How many entities of each type a document has (in the order of `TYPES`), and how far questions reach.

    `num_facts` are told of all that hold between them; each entity is in one at least. None tells all.
    """

    seed: int = 0
    num_documents: int = 2
    per_type: tuple[int, ...] = (5, 4, 4, 4)
    num_facts: int | None = None
    max_hops: int = 2
    num_names: int = 4096

    def __post_init__(self):
        faults = []
        if len(self.per_type) != len(TYPES) or min(self.per_type) < 2:
            faults.append(f"per_type must give at least 2 of each of {', '.join(TYPES)}, got {self.per_type}")
        if self.num_documents < 1:
            faults.append(f"num_documents must be at least 1, got {self.num_documents}")
        if self.num_facts is not None and self.num_facts < 1:
            faults.append(f"num_facts must be at least 1, or none for all, got {self.num_facts}")
        if not 1 <= self.max_hops <= 3:
            faults.append(f"max_hops must lie in [1, 3], got {self.max_hops}")
        if sum(self.per_type) * self.num_documents > self.num_names:
            faults.append(
                f"{sum(self.per_type) * self.num_documents} entities need as many names, num_names is {self.num_names}"
            )
        if self.num_names > len(_ONSETS) ** 2 * len(_RIMES):
            faults.append(
                f"num_names must be at most {len(_ONSETS) ** 2 * len(_RIMES)}, got {self.num_names}"
            )
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class World:
    """The facts behind one document. `entities` maps each name to its type, in a fixed order."""

    name: str
    entities: dict[str, str]
    facts: tuple[Statement, ...]


def make_worlds(config: WorldConfig) -> list[World]:
    """All worlds of a config; no two share a name."""
    chance = random.Random(stable_seed("worlds", config.seed))
    names = [spell(i) for i in range(config.num_names)]
    chance.shuffle(names)
    return [
        make_world(f"world{index}", names, config.per_type, chance, config.num_facts)
        for index in range(config.num_documents)
    ]


def make_world(
    label: str,
    names: list[str],
    per_type: tuple[int, ...],
    chance: random.Random,
    num_facts: int | None = None,
) -> World:
    """One world that takes its names from the end of `names`; with `num_facts`, few of its facts (see `choose_facts`)."""
    by_type = {kind: [names.pop() for _ in range(count)] for kind, count in zip(TYPES, per_type, strict=True)}
    facts = []
    for relation in RELATIONS:
        subjects, objects = list(by_type[relation.subject]), list(by_type[relation.object])
        chance.shuffle(subjects)
        chance.shuffle(objects)
        if relation.subject == relation.object:
            objects = subjects[1:]  # a line of teachers: no one is their own, and it has two ends
        for subject, obj in zip(subjects, objects, strict=False):
            facts.append(Statement((Step(relation.name),), subject, obj))
    chance.shuffle(facts)
    if num_facts is not None:
        facts = choose_facts(facts, num_facts)
    entities = {name: kind for kind, members in by_type.items() for name in members}
    return World(name=label, entities=entities, facts=tuple(facts))


def choose_facts(facts: Sequence[Statement], count: int) -> list[Statement]:
    """`count` facts, those first that name two entities which none before names, then one, then any: all are told of
    as soon as `count` allows. In the order of `facts`.
    """
    named: set[str] = set()
    chosen: set[Statement] = set()
    for least in (2, 1, 0):
        for fact in facts:
            new = {fact.subject, fact.object} - named
            if fact not in chosen and len(new) >= least and len(chosen) < count:
                chosen.add(fact)
                named |= new
    return [fact for fact in facts if fact in chosen]


def closure(facts: tuple[Statement, ...], hops: int) -> list[Statement]:
    """Every statement of at most `hops` steps along a shortest path, in both directions, facts included.

    Of equally short paths the first in breadth-first order over sorted edges counts, from each end by itself.
    """
    edges = edges_of(facts)
    found = []
    for start in sorted(edges):
        for target, chain in shortest_chains(edges, start, hops).items():
            found.append(Statement(chain, start, target))
    return found


def edges_of(facts: tuple[Statement, ...]) -> dict[str, list[tuple[Step, str]]]:
    """The graph of the facts: for each entity its steps, both directions, sorted."""
    edges: dict[str, list[tuple[Step, str]]] = {}
    for fact in facts:
        for told in (fact, fact.reversed()):
            edges.setdefault(told.subject, []).append((told.chain[0], told.object))
    return {name: sorted(steps) for name, steps in edges.items()}


def shortest_chains(
    edges: dict[str, list[tuple[Step, str]]], start: str, hops: int
) -> dict[str, tuple[Step, ...]]:
    """Breadth-first: each entity within `hops` steps of `start`, with the chain that leads there."""
    chains: dict[str, tuple[Step, ...]] = {start: ()}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        if len(chains[here]) == hops:
            continue
        for step, there in edges.get(here, []):
            if there not in chains:
                chains[there] = (*chains[here], step)
                queue.append(there)
    del chains[start]
    return chains


def relation_named(name: str) -> Relation:
    """The relation of that name."""
    return next(relation for relation in RELATIONS if relation.name == name)


_ONSETS = tuple("b d f g h k l m n p r s t v z th sh br dr gr kr tr st sk".split())
_RIMES = tuple(
    "ade ane ale ore one olu ila ino esh umar ovin elda arn ith ond ara ewen iro ut ask em ock".split()
)


def spell(index: int) -> str:
    """The `index`-th name: a capitalized word of two syllables, different for every index."""
    index, first = divmod(index * 7919 % (len(_ONSETS) ** 2 * len(_RIMES)), len(_ONSETS))
    rime, second = divmod(index, len(_ONSETS))
    vowel = "aeiou"[(first + rime) % 5]
    return f"{_ONSETS[first]}{vowel}{_ONSETS[second]}{_RIMES[rime]}".capitalize()
