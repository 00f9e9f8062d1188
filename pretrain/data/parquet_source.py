"""Documents from Parquet files, read row group by row group (extra `[parquet]`; a config imports this file)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from pretrain.data.source import (
    BadRecord,
    FileSource,
    SourceConfig,
    TextDocument,
    TextSource,
    bad_record,
    document_of,
    find_files,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetConfig(SourceConfig):
    """Parquet files with a column of texts; `path` may be a glob. A row without `id_key` is named by file and row."""

    path: str
    text_key: str = "text"
    id_key: str = "id"
    first_key: str | None = None

    def build(self, root: str) -> TextSource:
        return FileSource(self, find_files(root, self.path, self.name), _read_parquet)


def _read_parquet(name: str, path: Path, config: ParquetConfig) -> Iterator[TextDocument | BadRecord]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = {config.text_key, config.id_key, config.first_key}
            columns = [column for column in file.schema_arrow.names if column in wanted]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    try:
                        yield document_of(record, f"{name}:{number}", config)
                    except ValueError as error:
                        yield bad_record(config, path, number, error)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow reads ahead, so the number is of the last row that arrived.
        reason = ValueError(f"the Parquet data after this row cannot be read ({error})")
        yield bad_record(config, path, number, reason)
