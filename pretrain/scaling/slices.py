"""A slice of a source: the documents whose hash falls between two numbers, for runs on fewer different documents.

Slices from 0 up nest, so a smaller one is a part of every larger one, and the slice that ends at 1 can be kept from
all of them as held-out text: runs on any share of the documents are then scored on the same ones.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from pretrain.config import ConfigError, stable_seed
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceConfig(SourceConfig):
    """The documents of `source` with low <= hash < high; its own name is not used."""

    source: SourceConfig
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.low < self.high <= 1:
            raise ConfigError(f"a slice needs 0 <= low < high <= 1, got low={self.low} and high={self.high}")

    def build(self, root: str) -> TextSource:
        return SlicedSource(self, self.source.build(root))

    def share(self, fraction: float) -> "SliceConfig":
        """The first `fraction` of this slice."""
        return dataclasses.replace(self, high=self.low + (self.high - self.low) * fraction)


@dataclasses.dataclass(frozen=True)
class SlicedSource:
    """See `SliceConfig`. Bad records belong to every slice."""

    config: SliceConfig
    whole: TextSource

    @property
    def identity(self) -> str:
        return self.whole.identity

    def content_files(self) -> list[tuple[str, Path]]:
        return self.whole.content_files()

    def content_fingerprint(self) -> str:
        return self.whole.content_fingerprint()

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        for document in self.whole.documents():
            if isinstance(document, BadRecord):
                yield document
            elif self.config.low <= stable_seed("slice", document.id) / 2**63 < self.config.high:
                yield dataclasses.replace(document, source=self.config.name)
