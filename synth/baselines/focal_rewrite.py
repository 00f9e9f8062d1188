"""Focal rewriting (arXiv 2603.23562): the document retold around one generated question after the other.

The questions are the generator's own; those of an evaluation are never shown to it."""

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
    "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
    "required": ["questions"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class FocalRewrite:
    """One text for each question and version."""

    versions: int = 1
    max_tokens: int = 2048
    temperature: float = 1.0
    name: str = "focal_rewrite"
    version: int = 1

    def __post_init__(self):
        if self.versions < 1:
            raise ConfigError(f"versions must be at least 1, got {self.versions}")

    def prompts(self) -> tuple[Prompt, ...]:
        """The planning prompt and the writing prompt."""
        return (load_prompt("focal_rewrite_questions"), load_prompt("focal_rewrite"))

    def prepare(self, document: Document) -> list[Request]:
        """One call: questions a reader could ask."""
        system, user = load_prompt("focal_rewrite_questions").fill(document=document.text)
        request = Request(
            system=system,
            user=user,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            json_schema=SCHEMA,
        )
        return [request]

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """The questions, each once."""
        try:
            reply = parse_json(replies[0])
        except ValueError as error:
            return Rejection(reason="malformed", detail=str(error))
        found = reply.get("questions") if isinstance(reply, dict) else None
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(f, str) and f.strip() for f in found)
        ):
            return Rejection(reason="malformed", detail='"questions" must be a list of texts, not empty')
        return list(dict.fromkeys(f.strip() for f in found))

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """Version by version, so that a prefix holds every question."""
        for number in range(self.versions):
            for index, question in enumerate(prepared):
                yield Item(key=f"focal:{number}:{index}", kind="focal", parts=(question, str(number)))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """The document and one question."""
        question, number = item.parts
        system, user = load_prompt("focal_rewrite").fill(
            document=document.text, question=question, version=number
        )
        return Request(system=system, user=user, max_tokens=self.max_tokens, temperature=self.temperature)

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """Any text but a copy of the document."""
        return Rejection(reason="copied") if text.strip() == document.text.strip() else text.strip()
