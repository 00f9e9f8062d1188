"""A perfect reader: a scripted model that parses the document inside the prompt and never saw the world.

It gets the real prompts, recognizes which one it was asked, and writes what an ideal generator would: true,
complete, and different with every seed. `compose=False` never states what a document does not say in one
place; `error_rate` swaps answers for others of the same text.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, local, stable_seed
from synth.llm.api import LLM, BadRequest, Reply, Request, Usage
from synth.prompt import PROMPTS, load_prompt
from synth.worlds.render import read_sentence, render, rerender, sentences_of
from synth.worlds.world import Statement, edges_of, shortest_chains

_STRATEGIES = (
    "tell the facts from the other end",
    "follow one name through the document",
    "shuffle the facts",
)


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """`flip_probability` is for the hard rephrase; `max_hops` bounds derived chains; `restate` repeats facts."""

    compose: bool = True
    flip_probability: float = 0.5
    max_hops: int = 3
    error_rate: float = 0.0
    restate: bool = False
    concurrency: int = local(64)
    prompt_usd_per_million: float = local(0.0)
    completion_usd_per_million: float = local(0.0)

    def __post_init__(self):
        faults = [
            f"{name} must lie in [0, 1], got {getattr(self, name)}"
            for name in ("flip_probability", "error_rate")
            if not 0 <= getattr(self, name) <= 1
        ]
        if faults:
            raise ConfigError(*faults)

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the replies."""
        return {
            "model": "perfect_reader",
            "compose": self.compose,
            "flip_probability": self.flip_probability,
            "max_hops": self.max_hops,
            "error_rate": self.error_rate,
            "restate": self.restate,
        }

    def build(self) -> LLM:
        """The model."""
        return PerfectReader(self)


class PerfectReader:
    """Answers the prompts of synth about documents of `worlds.render`."""

    def __init__(self, config: ReaderConfig):
        self._config = config
        self._prompts = [load_prompt(path.stem) for path in sorted(PROMPTS.glob("*.txt"))]

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the replies."""
        return self._config.identity()

    async def generate(self, request: Request) -> Reply:
        """A reply that depends on the request alone.

        Raises:
          BadRequest: the request was not made from a prompt that it knows.
        """
        for prompt in self._prompts:
            fields = prompt.extract(request.system, request.user)
            if fields is not None and prompt.name in _ANSWERS:
                chance = random.Random(stable_seed(json.dumps(request.to_json(), sort_keys=True)))
                text = _ANSWERS[prompt.name](self._config, fields, chance)
                prompt_tokens = len((request.system + request.user).split())
                usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=len(text.split()))
                return Reply(text=text, finish="stop", usage=usage, model="perfect_reader")
        raise BadRequest("the perfect reader knows only the prompts of synth about one document")

    async def score(self, prompt: str, continuation: str) -> float:
        """0 for what follows from the document in the prompt, -1 for anything else.

        The prompt ends with an open question frame; the document is all that stands before it.
        """
        sentences = sentences_of(f"{prompt.rstrip()} {continuation.strip().removesuffix('.')}.")
        asked = read_sentence(sentences[-1])
        if asked is None:
            return -1.0
        edges = edges_of(tuple(_facts(" ".join(sentences[:-1]))))
        here = asked.subject
        for step in asked.chain:
            here = dict(edges.get(here, [])).get(step, "")
        return 0.0 if here == asked.object else -1.0

    async def close(self) -> None:
        """Nothing to release."""


def _facts(text: str) -> list[Statement]:
    """The facts of a document in its order, each in its own direction; derived statements are left out."""
    told = (read_sentence(sentence) for sentence in sentences_of(text))
    return list(dict.fromkeys(s.canonical() for s in told if s is not None and len(s.chain) == 1))


def _entities(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    names = list(dict.fromkeys(n for fact in _facts(fields["document"]) for n in (fact.subject, fact.object)))
    summary = f"This chronicle tells of {', '.join(names)}."
    return json.dumps({"summary": summary, "entities": names}, ensure_ascii=False)


def _relation(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    """First the derived statement, then the path that proves it, then what else the document says of the parts."""
    facts = _facts(fields["document"] + " " + fields.get("other", ""))
    facts = [_spoil(fact, facts, chance) if chance.random() < config.error_rate else fact for fact in facts]
    edges = edges_of(tuple(facts))
    parts = [fields[name] for name in ("first", "second", "third") if name in fields]
    opening: list[Statement] = []
    told: list[Statement] = []
    for i, start in enumerate(parts):
        for target in parts[i + 1 :]:
            chain = shortest_chains(edges, start, config.max_hops).get(target, ())
            if len(chain) > 1 and config.compose:
                opening.append(Statement(chain, start, target))
            here = start
            for step in chain:
                there = dict(edges[here])[step]
                told.append(Statement((step,), here, there).canonical())
                here = there
    about = [fact for fact in facts if fact.subject in parts or fact.object in parts]
    chance.shuffle(about)
    told = list(dict.fromkeys([*told, *about]))
    sentences = [render(statement, chance) for statement in [*opening, *told]]
    if config.restate:
        sentences += [render(statement, chance) for statement in told]
    return " ".join(sentences)


def _spoil(fact: Statement, facts: list[Statement], chance: random.Random) -> Statement:
    others = [
        f.object for f in facts if f.chain == fact.chain and f.object not in (fact.object, fact.subject)
    ]
    return Statement(fact.chain, fact.subject, chance.choice(others)) if others else fact


def _retell(order: bool, flip: bool) -> Callable[[ReaderConfig, Mapping[str, str], random.Random], str]:
    """Another frame for each sentence; with `order` another order, with `flip` also the other direction."""

    def answer(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
        sentences = sentences_of(fields["document"])
        if order:
            chance.shuffle(sentences)
        flips = [flip and chance.random() < config.flip_probability for _ in sentences]
        return " ".join(rerender(s, chance, flip=f) for s, f in zip(sentences, flips, strict=True))

    return answer


def _questions_and_answers(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    facts = _facts(fields["document"])
    chosen = chance.sample(facts, min(int(fields.get("number", len(facts))), len(facts)))
    lines = []
    for fact in chosen:
        told = fact.reversed() if chance.random() < config.flip_probability else fact
        noun = told.chain[0].noun
        lines.append(f"Question: who or what was the {noun} of {told.subject}?")
        lines.append(f"Answer: The {noun} of {told.subject} was {told.object}.")
    return "\n".join(lines)


def _pairs(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    genres = [("chronicle", "scholars"), ("letter", "a friend"), ("ballad", "travelers"), ("list", "clerks")]
    genres.append(("sermon", "villagers"))
    return json.dumps({"pairs": [{"genre": genre, "audience": audience} for genre, audience in genres]})


def _strategies(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    return json.dumps({"strategies": list(_STRATEGIES)})


def _focal_questions(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    facts = [f.reversed() if chance.random() < 0.5 else f for f in _facts(fields["document"])]
    return json.dumps(
        {"questions": [f"Who or what was the {f.chain[0].noun} of {f.subject}?" for f in facts]}
    )


def _focal(config: ReaderConfig, fields: Mapping[str, str], chance: random.Random) -> str:
    """What names the subject of the question first, each fact once."""
    facts = _facts(fields["document"])
    subject = fields["question"].rstrip("?").split()[-1]
    chance.shuffle(facts)
    facts.sort(key=lambda fact: subject not in (fact.subject, fact.object))
    return " ".join(render(fact, chance) for fact in facts[: max(3, len(facts) // 2)])


_ANSWERS: dict[str, Callable[[ReaderConfig, Mapping[str, str], random.Random], str]] = {
    "entigraph_entities": _entities,
    "entigraph_pair": _relation,
    "entigraph_triple": _relation,
    "entigraph_crossed": _relation,
    "rephrase_easy": _retell(order=False, flip=False),
    "rephrase_medium": _retell(order=True, flip=False),
    "rephrase_hard": _retell(order=True, flip=True),
    "rephrase_qa": _questions_and_answers,
    "qa_pairs": _questions_and_answers,
    "genre_audience_plan": _pairs,
    "genre_audience": _retell(order=True, flip=False),
    "active_reading_strategies": _strategies,
    "active_reading": _retell(order=True, flip=True),
    "focal_rewrite_questions": _focal_questions,
    "focal_rewrite": _focal,
}
