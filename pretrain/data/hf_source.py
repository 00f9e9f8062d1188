"""Documents from Hugging Face `datasets` (extra `[hf]`; a config imports this file)."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from pretrain.config import ConfigError
from pretrain.data.source import (
    BadRecord,
    SourceConfig,
    TextDocument,
    TextSource,
    bad_record,
    document_of,
    fingerprint_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfDatasetsConfig(SourceConfig):
    """A split of a dataset: a name on the hub, or a folder below data.root written by `save_to_disk`.

    A dataset of the hub is downloaded whole; `revision` pins its version and should be a commit.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    text_key: str = "text"
    id_key: str = "id"
    first_key: str | None = None

    def build(self, root: str) -> TextSource:
        folder = Path(root, self.path)
        try:
            if folder.is_dir():
                loaded: Any = datasets.load_from_disk(str(folder))
                if isinstance(loaded, datasets.DatasetDict):
                    loaded = loaded[self.split]
            else:
                loaded = datasets.load_dataset(
                    self.path, self.subset, split=self.split, revision=self.revision
                )
        except (OSError, ValueError, KeyError, RuntimeError, ConnectionError) as error:
            raise ConfigError(
                f"data.sources.{self.name}.path must be a dataset of the hub or a folder below data.root, got "
                f"{self.path!r} (split {self.split!r}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        for field in ("text_key", "first_key"):
            key = getattr(self, field)
            if key is not None and key not in loaded.column_names:
                raise ConfigError(
                    f"data.sources.{self.name}.{field} must be a column of the dataset, got {key!r}; "
                    f"it has: {', '.join(sorted(loaded.column_names)[:8])}"
                )
        return HfSource(self, loaded)


@dataclasses.dataclass(frozen=True)
class HfSource:
    """See `HfDatasetsConfig`."""

    config: HfDatasetsConfig
    loaded: Any

    @functools.cached_property
    def identity(self) -> str:
        """Of the rows: the library's own fingerprint also counts how and where they were made."""
        digest = hashlib.sha256()
        columns = sorted(self._columns())
        for batch in self.loaded.select_columns(columns).iter(1024):
            digest.update(repr([batch[column] for column in columns]).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def content_files(self) -> list[tuple[str, Path]]:
        return []

    def content_fingerprint(self) -> str:
        return fingerprint_of(self.identity, [])

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        rows = self.loaded.select_columns(self._columns())
        for number, record in enumerate(rows, 1):
            try:
                yield document_of(record, f"{self.config.path}:{number}", self.config)
            except ValueError as error:
                yield bad_record(self.config, self.config.path, number, error)

    def _columns(self) -> list[str]:
        wanted = {self.config.text_key, self.config.id_key, self.config.first_key}
        return [column for column in self.loaded.column_names if column in wanted]
