"""The raw corpus as an arm: each document as it is, as often as asked, with no call at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.document import Document
from synth.generator import Item, Rejection
from synth.llm.api import Request
from synth.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """`times` copies of every document. Epochs of a data mixture do the same without the copies."""

    times: int = 1
    name: str = "raw"
    version: int = 1

    def __post_init__(self):
        if self.times < 1:
            raise ConfigError(f"times must be at least 1, got {self.times}")

    def prompts(self) -> tuple[Prompt, ...]:
        """None."""
        return ()

    def prepare(self, document: Document) -> list[Request]:
        """Nothing to ask."""
        return []

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """Nothing was asked."""
        return None

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """The document itself, again and again."""
        for number in range(self.times):
            yield Item(key=f"raw:{number}", kind="raw", text=document.text)

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """Never called: every item carries its text."""
        raise AssertionError("an item of the raw corpus carries its text")

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """The text as it is."""
        return text
