"""Statements as sentences and sentences as statements: `read(render(s)) == {s}` is a law.

Every relation has frames for both directions; frame 0 of each direction spells a chain of nouns and also
serves derived statements. The question frame ("Asked for the home of X, one says Y.") is never used by any
text that an arm trains on; fresh worlds teach it.
"""

import random
import re
from collections.abc import Iterable, Sequence

from synth.worlds.world import RELATIONS, Statement, Step, World

# {s} subject, {o} object of the fact; the first tuple names the subject first, the second the object first.
_FRAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "teacher": (
        ("{s} learned everything from {o}.", "{s} studied for years under {o}."),
        ("{o} taught {s}.", "{o} raised {s} in the craft."),
    ),
    "home": (
        ("{s} lived in {o}.", "{s} never left {o}."),
        ("{o} gave shelter to {s}.", "In {o} stood the house of {s}."),
    ),
    "employer": (
        ("{s} worked for {o}.", "{s} took wages from {o}."),
        ("{o} paid {s}.", "{o} had {s} on its rolls."),
    ),
    "seat": (
        ("{s} held its councils in {o}.", "{s} was governed from {o}."),
        ("{o} housed the halls of {s}.", "{o} hosted {s}."),
    ),
    "keeper": (
        ("{s} was guarded by {o}.", "{s} lay in the care of {o}."),
        ("{o} watched over {s}.", "{o} guarded {s}."),
    ),
    "origin": (
        ("{s} was made in {o}.", "{s} came from {o}."),
        ("{o} once brought forth {s}.", "The smiths of {o} made {s}."),
    ),
}
_CHAIN = "The {nouns} of {s} was {o}."
_QUESTION = "Asked for the {nouns} of {s}, one says {o}."
_SCENERY = (
    "The winters were long.",
    "Little else is written of those days.",
    "Rain fell for a week.",
    "The roads were bad.",
    "Nobody remembers the songs.",
)
_NAME = r"([A-Z][a-z]+)"
_STEP_OF_NOUN = {
    noun: Step(relation.name, inverse)
    for relation in RELATIONS
    for noun, inverse in ((relation.noun, False), (relation.inverse_noun, True))
}


def _compile() -> list[tuple[re.Pattern[str], str, bool]]:
    patterns = []
    for name, directions in _FRAMES.items():
        for object_first, frames in enumerate(directions):
            for frame in frames:
                body = re.escape(frame).replace(r"\{s\}", _NAME).replace(r"\{o\}", _NAME)
                patterns.append((re.compile(body), name, bool(object_first)))
    return patterns


_PATTERNS = _compile()
_CHAIN_PATTERN = re.compile(rf"(?:The|Asked for the) ([a-z ]+) of {_NAME}(?: was|, one says) {_NAME}\.")
_SENTENCE = re.compile(r"[^.]+\.")


def nouns_of(chain: Sequence[Step]) -> str:
    """ "home of the teacher" for the chain teacher, home: the last step is named first."""
    return " of the ".join(step.noun for step in reversed(chain))


def render(statement: Statement, chance: random.Random, *, flip: bool | None = None) -> str:
    """One sentence. A fact uses any frame of its direction, a derived statement the chain frame.

    `flip` tells it from the other end; None leaves that to chance.
    """
    if flip if flip is not None else chance.random() < 0.5:
        statement = statement.reversed()
    if len(statement.chain) > 1:
        return _CHAIN.format(nouns=nouns_of(statement.chain), s=statement.subject, o=statement.object)
    step = statement.chain[0]
    fact = statement.canonical()
    frames = (*_FRAMES[step.relation][step.inverse], "")
    frame = chance.choice(frames)
    if not frame:
        return _CHAIN.format(nouns=step.noun, s=statement.subject, o=statement.object)
    return frame.format(s=fact.subject, o=fact.object)


def rerender(sentence: str, chance: random.Random, *, flip: bool) -> str:
    """The same statement in another frame; a sentence that states nothing stays as it is."""
    told = read_sentence(sentence)
    if told is None:
        return sentence
    for _ in range(20):
        new = render(told, chance, flip=flip)
        if new != sentence:
            return new
    return render(told, chance, flip=flip)


def question(statement: Statement) -> str:
    """The question frame up to the answer: "Asked for the home of X, one says"."""
    text = _QUESTION.format(nouns=nouns_of(statement.chain), s=statement.subject, o="")
    return text.removesuffix(" .")


def render_document(
    world: World, chance: random.Random, *, scenery: float = 0.0, flip_probability: float = 0.5
) -> tuple[str, dict[Statement, bool]]:
    """A niche document: each fact once, one direction, random order. Also tells which facts were told in reverse.

    `scenery` is the share of facts followed by a sentence that states nothing.
    """
    sentences = []
    flipped = {}
    facts = list(world.facts)
    chance.shuffle(facts)
    for fact in facts:
        flipped[fact] = chance.random() < flip_probability
        sentences.append(render(fact, chance, flip=flipped[fact]))
        if chance.random() < scenery:
            sentences.append(chance.choice(_SCENERY))
    return " ".join(sentences), flipped


def sentences_of(text: str) -> list[str]:
    """The sentences, each with its period; headings and blank lines do not matter."""
    return [match.group().strip() for match in _SENTENCE.finditer(text)]


def read_sentence(sentence: str) -> Statement | None:
    """What a sentence states, in the direction it is told, or None."""
    sentence = sentence.rpartition("Answer: ")[2].strip()  # what stands before is the question
    match = _CHAIN_PATTERN.fullmatch(sentence)
    if match is not None:
        steps = [_STEP_OF_NOUN.get(noun) for noun in match[1].split(" of the ")]
        if all(step is not None for step in steps):
            return Statement(tuple(step for step in reversed(steps) if step is not None), match[2], match[3])
    for pattern, name, object_first in _PATTERNS:
        match = pattern.fullmatch(sentence)
        if match is not None:
            return Statement((Step(name, object_first),), match[1], match[2])
    return None


def read(text: str) -> set[Statement]:
    """All that a text states, each statement in its canonical direction."""
    told = (read_sentence(sentence) for sentence in sentences_of(text))
    return {statement.canonical() for statement in told if statement is not None}


def words_in_use() -> list[str]:
    """Every word but names that rendered text can hold, lower and upper case as they occur."""
    frames: Iterable[str] = [frame for pair in _FRAMES.values() for frames in pair for frame in frames]
    texts = [*frames, *_SCENERY, _CHAIN.format(nouns="", s="", o=""), _QUESTION.format(nouns="", s="", o="")]
    nouns = [noun for relation in RELATIONS for noun in (relation.noun, relation.inverse_noun)]
    words = (word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text)))
    return sorted({*words, *nouns})
