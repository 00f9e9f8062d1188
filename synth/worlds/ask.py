"""Facts become questions: as stated, in reverse, and two or three steps away, with a one-hop lure among the options."""

import random
from collections.abc import Mapping

from pretrain.config import stable_seed
from synth.question import Question
from synth.worlds.render import question
from synth.worlds.world import Statement, World, closure, edges_of

NUM_OPTIONS = 4


def ask_world(
    world: World, told_in_reverse: Mapping[Statement, bool], *, max_hops: int, seed: int
) -> list[Question]:
    """All questions about one world: `same`, `reverse` (against the direction of the document), `hop2`, `hop3`.

    All but `same` are also tagged `inferred`: the document does not say it in so many words.

    Options are entities of the answer's type from the same document, the gold position is uniform, and a hop
    question holds the answer of its last-but-one cut as a lure where that has the right type (tag `lured`).
    """
    chance = random.Random(stable_seed("ask", seed, world.name))
    edges = edges_of(world.facts)
    questions = []
    for statement in sorted(closure(world.facts, max_hops)):
        tags = [f"hop{len(statement.chain)}", "inferred"]
        if len(statement.chain) == 1:
            fact = statement.canonical()
            same = told_in_reverse[fact] == (statement != fact)
            tags = ["same"] if same else ["reverse", "inferred"]
        kind = world.entities[statement.object]
        others = [
            name
            for name, its_kind in world.entities.items()
            if its_kind == kind and name not in (statement.object, statement.subject)
        ]
        lure = _lure(statement, edges)
        options = [statement.object]
        if lure in others:
            options.append(lure)
            others.remove(lure)
            tags.append("lured")
        if len(options) + len(others) < NUM_OPTIONS:
            continue  # too few of this type in the document for four options
        options += chance.sample(others, NUM_OPTIONS - len(options))
        chance.shuffle(options)
        questions.append(
            Question(
                id=f"{world.name}:{len(questions)}",
                document=world.name,
                text=question(statement),
                options=tuple(options),
                gold=options.index(statement.object),
                tags=tuple(tags),
            )
        )
    return questions


def _lure(statement: Statement, edges: Mapping[str, list]) -> str:
    """Where the last step leads from the subject itself: right for who skips the steps before it."""
    if len(statement.chain) == 1:
        return ""
    return dict(edges[statement.subject]).get(statement.chain[-1], "")
