"""Question-answer pairs: batches of generated questions with answers (the QA arm of arXiv 2409.07431)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.document import Document, windows_of
from synth.generator import Item, Rejection
from synth.llm.api import Request
from synth.prompt import Prompt, load_prompt


@dataclass(frozen=True, kw_only=True)
class QaPairs:
    """`batches` calls for each window, `questions_per_batch` questions asked for in each."""

    batches: int = 4
    questions_per_batch: int = 8
    window_characters: int | None = None
    max_tokens: int = 2048
    temperature: float = 1.0
    name: str = "qa_pairs"
    version: int = 1

    def __post_init__(self):
        for field in ("batches", "questions_per_batch"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")

    def prompts(self) -> tuple[Prompt, ...]:
        """One prompt."""
        return (load_prompt("qa_pairs"),)

    def prepare(self, document: Document) -> list[Request]:
        """Nothing to ask beforehand."""
        return []

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """Nothing was asked."""
        return None

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """Batch by batch, window by window."""
        count = len(windows_of(document.text, self.window_characters))
        for batch in range(self.batches):
            for window in range(count):
                yield Item(key=f"qa:{batch}:{window}", kind="qa", parts=(str(batch), str(window)))

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """One batch about one window."""
        batch, window = item.parts
        text = windows_of(document.text, self.window_characters)[int(window)]
        system, user = load_prompt("qa_pairs").fill(
            document=text, batch=str(int(batch) + 1), number=str(self.questions_per_batch)
        )
        return Request(system=system, user=user, max_tokens=self.max_tokens, temperature=self.temperature)

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """A text with at least one question and its answer."""
        if "Question:" not in text or "Answer:" not in text:
            return Rejection(reason="malformed", detail="no Question: with an Answer:")
        return text.strip()
