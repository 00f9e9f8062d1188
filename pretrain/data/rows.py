"""The row table: packed rows in ArrayRecord shards beside a manifest of content hashes.

    <folder>/00000.array_record  00001.array_record  ..  manifest.json

Each row is a record of its own, so any row is one read. A record holds tokens, segment ids, positions and weights
one after the other, little-endian, in the dtypes of the manifest. ArrayRecord checks a hash of every record it
reads; the manifest has hashes of whole shards, and one over all rows that no compression changes.

Letters: B rows, T targets in a row, T1 = T + 1 positions.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from pretrain.config import ConfigError
from pretrain.data.pack import Row
from pretrain.rundir import file_sha256, write_json_atomic

MANIFEST = "manifest.json"
_FORMAT = 1
# A third of the bytes of no compression; reading is still far faster than any model.
_WRITER_OPTIONS = "group_size:1,zstd:1"
REBUILD = "set data.rebuild=true to build it again"


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows on the host, with the names and shapes of a `Batch`."""

    tokens_BT1: np.ndarray  # int32
    segment_ids_BT1: np.ndarray  # int32
    positions_BT1: np.ndarray  # int32
    weights_BT: np.ndarray  # float32
    source_B: np.ndarray  # int32; index into the list of source labels


def empty_rows(num_rows: int, row_length: int, pad_id: int = 0) -> Rows:
    """Rows of padding: nothing to learn, nothing to attend to."""
    shape = (num_rows, row_length + 1)
    return Rows(
        tokens_BT1=np.full(shape, pad_id, np.int32),
        segment_ids_BT1=np.zeros(shape, np.int32),
        positions_BT1=np.zeros(shape, np.int32),
        weights_BT=np.zeros((num_rows, row_length), np.float32),
        source_B=np.zeros(num_rows, np.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row is laid out in a record."""

    row_length: int
    vocab_size: int

    @functools.cached_property
    def dtypes(self) -> dict[str, str]:
        """By field, in the order of the record; as narrow as the values allow."""
        return {
            "tokens": "<u2" if self.vocab_size <= 1 << 16 else "<u4",
            "segment_ids": "<u2" if self.row_length < 1 << 16 else "<u4",
            "positions": "<u2" if self.row_length < 1 << 16 else "<u4",
            "weights": "<f2",
        }

    @functools.cached_property
    def _layout(self) -> list[tuple[np.dtype, int, int]]:
        """(dtype, count, first byte) of each field."""
        layout, offset = [], 0
        for field, dtype in self.dtypes.items():
            count = self.row_length + (field != "weights")
            layout.append((np.dtype(dtype), count, offset))
            offset += count * np.dtype(dtype).itemsize
        return layout

    @functools.cached_property
    def record_bytes(self) -> int:
        dtype, count, offset = self._layout[-1]
        return offset + count * dtype.itemsize

    def encode(self, row: Row) -> bytes:
        """A row as one record."""
        return b"".join(getattr(row, field).astype(dtype).tobytes() for field, dtype in self.dtypes.items())

    def decode(self, record: bytes, rows: Rows, index: int) -> None:
        """Write a record into place `index` of `rows`; ValueError when it is no row of this format."""
        if len(record) != self.record_bytes:
            raise ValueError(f"it has {len(record)} bytes, a row has {self.record_bytes}")
        targets = (rows.tokens_BT1, rows.segment_ids_BT1, rows.positions_BT1, rows.weights_BT)
        for target, (dtype, count, offset) in zip(targets, self._layout, strict=True):
            target[index] = np.frombuffer(record, dtype, count, offset)
        largest = int(rows.tokens_BT1[index].max())
        if largest >= self.vocab_size:
            raise ValueError(f"it holds token {largest}, the vocabulary ends at {self.vocab_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What the manifest says about one shard."""

    file: str
    rows: int
    bytes: int
    sha256: str
    rows_sha256: str  # of the records, whatever the compression


def write_shard(path: Path, rows: Iterable[Row], row_format: RowFormat) -> Shard:
    """Write one shard and force it to the disk.

    Raises:
      OSError, RuntimeError: the storage refuses.
    """
    digest = hashlib.sha256()
    count = 0
    writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for row in rows:
        record = row_format.encode(row)
        digest.update(record)
        writer.write(record)
        count += 1
    writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return Shard(
        file=path.name, rows=count, bytes=size, sha256=file_sha256(path), rows_sha256=digest.hexdigest()
    )


def write_table_manifest(
    folder: Path, shards: Sequence[Shard], row_format: RowFormat, facts: Mapping[str, Any]
) -> None:
    """Finish the table in `folder`; `facts` says what its rows are made of."""
    body = {
        "format": _FORMAT,
        **facts,
        "row_length": row_format.row_length,
        "vocab_size": row_format.vocab_size,
        "dtypes": row_format.dtypes,
        "rows": sum(shard.rows for shard in shards),
        "rows_sha256": hashlib.sha256("\n".join(shard.rows_sha256 for shard in shards).encode()).hexdigest(),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_sealed(folder / MANIFEST, body)


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write JSON with a hash of itself."""
    write_json_atomic(path, {**body, "sha256": _seal(body)})


def read_sealed(path: Path, expected_format: int = _FORMAT) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
      ConfigError: it is not what was written, or of another format.
      FileNotFoundError: it is not there.
    """
    try:
        body = json.loads(path.read_bytes())
        found = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} must be the manifest of a finished table, got {error!r}; {REBUILD}"
        ) from error
    if found != _seal(body):
        raise ConfigError(
            f"{path} must be as it was written, got other content than its hash {found[:12]} says; {REBUILD}"
        )
    if body.get("format") != expected_format:
        raise ConfigError(
            f"{path} must be of format {expected_format}, got {body.get('format')}: written by another version; {REBUILD}"
        )
    return body


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """Rows of a shard, as ArrayRecord wants them told: it then opens no file before it is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RowTable:
    """A finished table, read row by row in any order, from any thread. Cheap to open.

    Raises:
      ConfigError: no table, a changed manifest, a shard that is missing or has another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.manifest = read_sealed(self.folder / MANIFEST)
        except FileNotFoundError as error:
            raise ConfigError(f"a row table has a {MANIFEST}, {self.folder} has none; {REBUILD}") from error
        self.format = RowFormat(
            row_length=self.manifest["row_length"], vocab_size=self.manifest["vocab_size"]
        )
        instructions = []
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ConfigError(f"shard {path} must have {shard['bytes']} bytes, it {state}; {REBUILD}")
            instructions.append(_Instruction(str(path), 0, shard["rows"], shard["rows"]))
        self._source = array_record_data_source.ArrayRecordDataSource(instructions) if instructions else None

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def num_tokens(self) -> int:
        """Targets with a positive weight."""
        return self.manifest["target_tokens"]

    @property
    def rows_sha256(self) -> str:
        return self.manifest["rows_sha256"]

    def read_into(self, row: int, rows: Rows, index: int) -> None:
        """Write row number `row` into place `index` of `rows`.

        Raises:
          ConfigError: the record is damaged, or a token lies outside the vocabulary.
        """
        assert self._source is not None, f"{self.folder} is empty"
        try:
            self.format.decode(self._source[row], rows, index)
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"row {row} of table {self.folder} is damaged: {error}; {REBUILD}") from error

    def read(self, indices: Sequence[int] | range, source: int = 0) -> Rows:
        """Several rows; `source` is their label."""
        rows = empty_rows(len(indices), self.format.row_length)
        rows.source_B[:] = source
        for index, row in enumerate(indices):
            self.read_into(int(row), rows, index)
        return rows

    def verify(self) -> None:
        """Compare every shard with the hash in the manifest.

        Raises:
          ConfigError: a shard holds other bytes than were written.
        """
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            found = file_sha256(path)
            if found != shard["sha256"]:
                raise ConfigError(
                    f"shard {path} must have sha256 {shard['sha256'][:12]}, got {found[:12]}; {REBUILD}"
                )
