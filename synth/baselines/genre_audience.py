"""Massive genre-audience rewriting (MGA, arXiv 2502.04235): the document for other readers, in other forms."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.document import Document
from synth.generator import Item, Rejection
from synth.llm.api import Request, parse_json
from synth.prompt import Prompt, load_prompt

SCHEMA = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"genre": {"type": "string"}, "audience": {"type": "string"}},
                "required": ["genre", "audience"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class GenreAudience:
    """One text for each pair of genre and audience, and version."""

    versions: int = 1
    max_tokens: int = 2048
    temperature: float = 1.0
    name: str = "genre_audience"
    version: int = 1

    def __post_init__(self):
        if self.versions < 1:
            raise ConfigError(f"versions must be at least 1, got {self.versions}")

    def prompts(self) -> tuple[Prompt, ...]:
        """The planning prompt and the writing prompt."""
        return (load_prompt("genre_audience_plan"), load_prompt("genre_audience"))

    def prepare(self, document: Document) -> list[Request]:
        """One call: five pairs of a genre and an audience."""
        system, user = load_prompt("genre_audience_plan").fill(document=document.text)
        request = Request(
            system=system,
            user=user,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            json_schema=SCHEMA,
        )
        return [request]

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """The pairs as [genre, audience]."""
        try:
            reply = parse_json(replies[0])
        except ValueError as error:
            return Rejection(reason="malformed", detail=str(error))
        found = reply.get("pairs") if isinstance(reply, dict) else None
        if not isinstance(found, list) or not found:
            return Rejection(reason="malformed", detail='"pairs" must be a list, not empty')
        pairs = []
        for pair in found:
            texts = [pair.get(key) for key in ("genre", "audience")] if isinstance(pair, dict) else [None]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                return Rejection(reason="malformed", detail="a pair must have a genre and an audience")
            pairs.append(texts)
        return pairs

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """Version by version, so that a prefix holds every pair."""
        for number in range(self.versions):
            for index, (genre, audience) in enumerate(prepared):
                yield Item(key=f"genre:{number}:{index}", kind="genre", parts=(genre, audience, str(number)))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """The document and one pair."""
        genre, audience, number = item.parts
        system, user = load_prompt("genre_audience").fill(
            document=document.text, genre=genre, audience=audience, version=number
        )
        return Request(system=system, user=user, max_tokens=self.max_tokens, temperature=self.temperature)

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """Any text but a copy of the document."""
        return Rejection(reason="copied") if text.strip() == document.text.strip() else text.strip()
