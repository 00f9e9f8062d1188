"""Pairs and triples of entities in a keyed order, and the calls that write about them (arXiv 2409.07431, section 2).

The order is a permutation that can be entered anywhere: a pair or a triple is unranked from its index, so the
n(n-1)(n-2)/6 triples are never listed. As in the authors' code all pairs come first, then a random prefix of
the triples; unlike it the pairs are permuted too, so that a budget below n(n-1)/2 is no alphabet of openings.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.document import Document, windows_of
from synth.entigraph.entities import SCHEMA, is_grounded, merge_entities, read_entities
from synth.generator import Item, Rejection
from synth.llm.api import Request
from synth.prompt import Prompt, load_prompt


def permuted(count: int, key: int) -> Iterator[int]:
    """The numbers below `count` in an order fixed by `key`, in constant memory.

    A four-round Feistel network over the smallest even number of bits that covers `count`, walked until the
    value falls below it (at most four steps on average).
    """
    half_bits = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1

    def shuffle(value: int) -> int:
        left, right = value >> half_bits, value & mask
        for round_number in range(4):
            body = f"{key}:{round_number}:{right}".encode()
            digest = hashlib.blake2b(body, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        return (left << half_bits) | right

    for start in range(count):
        value = shuffle(start)
        while value >= count:
            value = shuffle(value)
        yield value


def unrank_pair(rank: int) -> tuple[int, int]:
    """The pair i < j with rank = C(j, 2) + i."""
    j = (1 + math.isqrt(1 + 8 * rank)) // 2
    return rank - j * (j - 1) // 2, j


def unrank_triple(rank: int) -> tuple[int, int, int]:
    """The triple i < j < k with rank = C(k, 3) + C(j, 2) + i."""
    k = 2
    low, high = 2, 2 + math.ceil((6 * (rank + 1)) ** (1 / 3)) + 1
    while low <= high:  # the largest k with C(k, 3) <= rank; cube roots alone are off by one
        middle = (low + high) // 2
        if math.comb(middle, 3) <= rank:
            k, low = middle, middle + 1
        else:
            high = middle - 1
    return (*unrank_pair(rank - math.comb(k, 3)), k)


@dataclass(frozen=True, kw_only=True)
class EntiGraph:
    """Text about all pairs and a seeded prefix of all triples of a document's entities.

    `max_entities=None`, `max_triples=None` and no windows are the published method. A document longer than
    `window_characters` is cut at paragraphs: entities are asked of each window, and a relation sees the
    windows in which its entities occur, in order, up to the same length.
    """

    pairs: bool = True
    max_triples: int | None = 0
    max_entities: int | None = 64
    keep_summary: bool = True
    max_tokens: int = 2048
    temperature: float = 1.0
    window_characters: int | None = None
    name: str = "entigraph"

    def __post_init__(self):
        if self.max_entities is not None and self.max_entities < 2:
            raise ConfigError(f"max_entities must be at least 2 or none, got {self.max_entities}")
        if self.window_characters is not None and self.window_characters < 200:
            raise ConfigError(f"window_characters must be at least 200 or none, got {self.window_characters}")
        if not self.pairs and self.max_triples == 0:
            raise ConfigError("pairs=false and max_triples=0 leave nothing to write; allow one of them")

    @property
    def version(self) -> int:
        """Raised when the code changes what it makes."""
        return 1

    def prompts(self) -> tuple[Prompt, ...]:
        """Entities, pair, triple."""
        return tuple(load_prompt(f"entigraph_{kind}") for kind in ("entities", "pair", "triple"))

    def prepare(self, document: Document) -> list[Request]:
        """One call for each window: its summary and entities."""
        prompt = load_prompt("entigraph_entities")
        requests = []
        for window in windows_of(document.text, self.window_characters):
            system, user = prompt.fill(document=window)
            requests.append(
                Request(
                    system=system,
                    user=user,
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    json_schema=SCHEMA,
                )
            )
        return requests

    def read_prepared(self, document: Document, replies: list[str]) -> dict[str, Any] | Rejection:
        """Summary, merged entities, and which of them occur in the text (the others are kept and counted)."""
        read = []
        for reply in replies:
            entities = read_entities(reply)
            if isinstance(entities, Rejection):
                return entities
            read.append(entities)
        names = merge_entities([part["entities"] for part in read], self.max_entities)
        return {
            "summary": "\n\n".join(part["summary"] for part in read if part["summary"]),
            "entities": names,
            "grounded": [is_grounded(name, document.text) for name in names],
        }

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """Summary, pairs, triples."""
        names = prepared["entities"]
        if self.keep_summary and prepared["summary"]:
            yield Item(key="summary", kind="summary", text=prepared["summary"])
        if self.pairs:
            for rank in permuted(math.comb(len(names), 2), seed):
                i, j = unrank_pair(rank)
                yield Item(key=f"pair:{i},{j}", kind="pair", parts=(names[i], names[j]))
        for number, rank in enumerate(permuted(math.comb(len(names), 3), seed + 1)):
            if number == self.max_triples:
                return
            i, j, k = unrank_triple(rank)
            yield Item(key=f"triple:{i},{j},{k}", kind="triple", parts=(names[i], names[j], names[k]))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """The prompt of its kind, with the part of the document in which its entities occur."""
        names = dict(zip(("first", "second", "third"), item.parts, strict=False))
        text = windows_about(document.text, item.parts, self.window_characters)
        system, user = load_prompt(f"entigraph_{item.kind}").fill(document=text, **names)
        return Request(system=system, user=user, max_tokens=self.max_tokens, temperature=self.temperature)

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """Any text but a copy of the document."""
        if text.strip() == document.text.strip():
            return Rejection(reason="copied")
        return text.strip()


def windows_about(text: str, entities: tuple[str, ...], limit: int | None) -> str:
    """The windows that hold the entities, in order, joined up to `limit` characters; the first if none does.

    A window is scored by how many of the entities it holds; the best are taken, one for each entity at least
    as long as they fit.
    """
    windows = windows_of(text, limit)
    if len(windows) == 1 or limit is None:
        return windows[0]
    pieces = windows_of(text, max(200, limit // (2 * len(entities))))
    hits = [[is_grounded(entity, piece) for entity in entities] for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (-sum(hits[i]), i))
    for column in range(len(entities)):  # every entity has a piece of its own before any has two
        first = next((i for i in range(len(pieces)) if hits[i][column]), None)
        if first is not None:
            order.remove(first)
            order.insert(0, first)
    taken: set[int] = set()
    length = 0
    for i in order:
        if taken and (not any(hits[i]) or length + len(pieces[i]) + 7 > limit):
            continue
        taken.add(i)
        length += len(pieces[i]) + 7
    return "\n\n[...]\n\n".join(pieces[i] for i in sorted(taken))
