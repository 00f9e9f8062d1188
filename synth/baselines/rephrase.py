"""Rephrase (WRAP, arXiv 2401.16380; the styles of arXiv 2409.07431): the same content in other words, many times."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.document import Document, windows_of
from synth.generator import Item, Rejection
from synth.llm.api import Request
from synth.prompt import Prompt, load_prompt

STYLES = ("easy", "medium", "hard", "qa")


@dataclass(frozen=True, kw_only=True)
class Rephrase:
    """`versions` of every window in every style, style by style inside a version: a prefix holds all styles."""

    styles: tuple[str, ...] = ("easy", "medium", "hard")
    versions: int = 1
    window_characters: int | None = 2000
    max_tokens: int = 2048
    temperature: float = 1.0
    name: str = "rephrase"
    version: int = 1

    def __post_init__(self):
        unknown = [style for style in self.styles if style not in STYLES]
        if unknown or not self.styles:
            raise ConfigError(
                f"styles must be some of {', '.join(STYLES)}, got {', '.join(unknown) or 'none'}"
            )
        if self.versions < 1:
            raise ConfigError(f"versions must be at least 1, got {self.versions}")

    def prompts(self) -> tuple[Prompt, ...]:
        """One for each style."""
        return tuple(load_prompt(f"rephrase_{style}") for style in self.styles)

    def prepare(self, document: Document) -> list[Request]:
        """Nothing to ask beforehand."""
        return []

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """Nothing was asked."""
        return None

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """Version by version, style by style, window by window."""
        count = len(windows_of(document.text, self.window_characters))
        for number in range(self.versions):
            for style in self.styles:
                for window in range(count):
                    yield Item(key=f"{style}:{number}:{window}", kind=style, parts=(str(number), str(window)))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """The style's prompt with one window."""
        number, window = item.parts
        text = windows_of(document.text, self.window_characters)[int(window)]
        system, user = load_prompt(f"rephrase_{item.kind}").fill(document=text, version=number)
        return Request(system=system, user=user, max_tokens=self.max_tokens, temperature=self.temperature)

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """Any text but a copy of its window."""
        window = windows_of(document.text, self.window_characters)[int(item.parts[1])]
        return Rejection(reason="copied") if text.strip() == window else text.strip()
