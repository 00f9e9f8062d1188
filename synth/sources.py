"""The first stage: documents of the outside world, with their title in the text and a content hash as recipe."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, local, to_json
from pretrain.data.source import BadRecord, SourceConfig
from synth.document import Document, Failure
from synth.stage import Shard


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Documents of pretrain's text sources; `documents` takes some ids only, `limit` the first ones."""

    sources: tuple[SourceConfig, ...]
    root: str = local(".")
    documents: tuple[str, ...] = ()
    limit: int | None = None
    name: str = "sources"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The config and what is in the files now."""
        content = {source.name: source.build(self.root).content_fingerprint() for source in self.sources}
        return {**to_json(self, identity_only=True), "content": content}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Every `shard.count`-th document."""
        taken = 0
        wanted = set(self.documents)
        for source in self.sources:
            for record in source.build(self.root).documents():
                if isinstance(record, BadRecord):
                    yield Failure(
                        document=record.where, item="source", reason="bad_record", detail=record.reason
                    )
                    continue
                if wanted and record.id not in wanted:
                    continue
                if taken == self.limit:
                    return
                if taken % shard.count == shard.index:
                    yield Document(id=record.id, text=record.text.strip(), meta={"source": record.source})
                taken += 1
        if wanted and taken < len(wanted):
            raise ConfigError(f"all ids in documents must be in the sources, found {taken} of {len(wanted)}")
