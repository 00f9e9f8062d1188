"""Documents from Parquet files, read row group by row group (extra `[parquet]`; a config imports this file)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

_BATCH_ROWS = 1024


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
    """A bad record is a row: of a group that cannot be read, every row that did not arrive is one."""
    try:
        # Arrow alone notices little of what a changed byte does to a page; files with checksums say it.
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        yield bad_record(config, path, None, ValueError(f"not a readable Parquet file ({error})"))
        return
    with file:
        first_row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            done = 0
            try:
                for document in _read_group(file, group, name, path, first_row, config):
                    done += 1
                    yield document
            except (pyarrow.ArrowException, OSError) as error:
                reason = ValueError(
                    f"row group {group + 1} of {file.num_row_groups} cannot be read from here on ({error})"
                )
                for row in range(done + 1, num_rows + 1):
                    yield bad_record(config, path, first_row + row, reason)
            first_row += num_rows


def _read_group(
    file: Any, group: int, name: str, path: Path, first_row: int, config: ParquetConfig
) -> Iterator[TextDocument | BadRecord]:
    """One result for each row, in order."""
    names = file.schema_arrow.names
    wanted = [key for key in (config.text_key, config.id_key, config.first_key) if key in names]
    # Named here, because a record of the wanted columns does not know the others.
    missing = [key for key in (config.text_key, config.first_key) if key and key not in names]
    if missing:
        listed = ", ".join(sorted(names)[:8])
        reason = ValueError(f"the file has no column {missing[0]!r}; it has: {listed}")
        for row in range(file.metadata.row_group(group).num_rows):
            yield bad_record(config, path, first_row + row + 1, reason)
        return
    number = first_row
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=wanted):
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:  # in one of its texts, which Arrow reads without a look at them
            records = None
        for row in range(batch.num_rows):
            number += 1
            try:
                record = batch.slice(row, 1).to_pylist()[0] if records is None else records[row]
                yield document_of(record, f"{name}:{number}", config)
            except ValueError as error:
                yield bad_record(config, path, number, error)
