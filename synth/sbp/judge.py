"""Relevance and factuality of synthetic texts by a language model with a stated rubric, real pairs among them.

The paper's judge and prompts are not published; ours is `prompts/sbp_judge.txt`, grades from 0 to 3. A text counts
as irrelevant or not factual at a grade of 0 or 1. Seconds of real pairs are graded in the same way without being
marked, so the judge's own strictness can be read off.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, stable_seed, to_json
from synth.document import Document
from synth.generator import Item, Rejection
from synth.llm.api import Request, parse_json
from synth.prompt import Prompt, load_prompt
from synth.sbp.pair import PAIR
from synth.sbp.parts import UNIQUE, VALIDATION, all_documents
from synth.stage import Shard

_KEYS = ("relevant", "factual")
_SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "integer"} for key in _KEYS},
    "required": list(_KEYS),
    "additionalProperties": False,
}
REAL_PAIRS = "real pairs"


@dataclass(frozen=True, kw_only=True)
class ToJudge:
    """Stage: a sample of the texts of each label and of real pairs, each with its seed document, in a common order."""

    labels: tuple[str, ...]
    sample: int = 200
    seed: int = 0
    name: str = "to_judge"
    version: int = 1
    gather: bool = True

    def __post_init__(self):
        if self.sample < 1:
            raise ConfigError(f"sample must be at least 1, got {self.sample}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The texts, their seeds, and real pairs."""
        return (UNIQUE, VALIDATION, "pair", *(f"texts_{label}" for label in self.labels))

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """The label is kept apart from what the judge reads; the order is shuffled."""
        seeds = {d.id: d.text for part in (UNIQUE, VALIDATION) for d in all_documents(shard, part)}
        found: list[Document] = []
        real = [
            (d.parents[0], seeds[d.parents[1]])
            for d in all_documents(shard, "pair")
            if (d.meta["kind"], d.meta["part"]) == (PAIR, VALIDATION)
        ]
        groups = {REAL_PAIRS: real}
        for label in self.labels:
            groups[label] = [
                (d.parents[0], d.text) for d in all_documents(shard, f"texts_{label}") if d.parents
            ]
        for label, pairs in groups.items():
            chance = random.Random(stable_seed("to_judge", self.seed, label))
            for number, (parent, text) in enumerate(chance.sample(pairs, min(self.sample, len(pairs)))):
                meta = {"label": label, "seed_text": seeds[parent]}
                identity = f"{stable_seed('judged', self.seed, label, number):016x}"
                found.append(
                    Document(id=identity, text=text, parents=(parent,), made_by=shard.recipe, meta=meta)
                )
        yield from sorted(found, key=lambda d: d.id)


@dataclass(frozen=True, kw_only=True)
class PairJudge:
    """A generator whose one item for a text is its grades."""

    max_characters: int = 8000
    max_tokens: int = 64
    name: str = "judge"
    version: int = 1

    def prompts(self) -> tuple[Prompt, ...]:
        """The rubric."""
        return (load_prompt("sbp_judge"),)

    def prepare(self, document: Document) -> list[Request]:
        """Nothing to ask beforehand."""
        return []

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """Nothing was asked."""
        return None

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """The grades; the label goes along for the report and is not in the request."""
        yield Item(key="grade", kind="grade", parts=(document.meta["label"],))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """Seed and text, cut."""
        system, user = load_prompt("sbp_judge").fill(
            seed=document.meta["seed_text"][: self.max_characters], text=document.text[: self.max_characters]
        )
        return Request(
            system=system, user=user, max_tokens=self.max_tokens, temperature=0.0, json_schema=_SCHEMA
        )

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """JSON with both grades in range."""
        try:
            found = parse_json(text)
        except ValueError as error:
            return Rejection(reason="malformed", detail=str(error))
        grades = {key: found.get(key) if isinstance(found, dict) else None for key in _KEYS}
        if not all(type(grade) is int and 0 <= grade <= 3 for grade in grades.values()):
            return Rejection(reason="malformed", detail=f"grades must be 0 to 3, got {grades}")
        return json.dumps(grades)


def judged_rates(grades: Iterable[Document]) -> dict[str, dict[str, float]]:
    """By label: how many were graded, and the shares that are irrelevant and not factual."""
    by_label: dict[str, list[dict[str, int]]] = {}
    for document in grades:
        by_label.setdefault(document.meta["parts"][0], []).append(json.loads(document.text))
    return {
        label: {
            "graded": len(found),
            "irrelevant": sum(g["relevant"] <= 1 for g in found) / len(found),
            "not_factual": sum(g["factual"] <= 1 for g in found) / len(found),
        }
        for label, found in sorted(by_label.items())
    }
