"""Shards of documents: zstd-compressed JSON lines, written to a temporary name and then renamed."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import zstandard

from pretrain.config import ConfigError
from synth.document import Document, document_from_line

SUFFIX = ".jsonl.zst"
_NAME = re.compile(r"(\d{5})-of-(\d{5})")
_ZSTD_LEVEL = 6  # fixed: the level is part of the bytes that a restart has to reproduce


def shard_stem(index: int, count: int) -> str:
    """`00003-of-00016`, the name that all files of one shard share."""
    return f"{index:05d}-of-{count:05d}"


def parse_stem(name: str) -> tuple[int, int] | None:
    """The (index, count) in a file name, or None when it names no shard."""
    match = _NAME.match(name)
    return (int(match[1]), int(match[2])) if match else None


class LineWriter:
    """Writes lines to `<path>.tmp`, compressed if the name says so; `commit` makes them `path` in one step.

    Leaving the `with` block without `commit` removes the temporary file, so a file that exists is whole.
    """

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(self._temporary, "wb")
        self._raw = self._file
        if path.suffix == ".zst":
            compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
            self._file = compressor.stream_writer(self._raw, closefd=False)  # type: ignore[assignment]
        self._committed = False

    def __enter__(self) -> "LineWriter":
        return self

    def write(self, line: bytes) -> None:
        """Append one line, newline included."""
        self._file.write(line)

    def commit(self) -> None:
        """Flush to the disk and rename into place."""
        if self._file is not self._raw:
            self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()
        os.replace(self._temporary, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._committed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._raw.close()
            self._temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name ends in .zst.

    Raises:
      ConfigError: the compressed file is damaged or cut.
    """
    with open(path, "rb") as raw:
        if path.suffix != ".zst":
            yield from raw
            return
        pending = b""
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        while True:
            try:
                chunk = reader.read(1 << 20)
            except zstandard.ZstdError as error:
                raise ConfigError(f"{path} is damaged ({error}); remove it to make it again") from error
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if pending:
            raise ConfigError(f"{path} ends in the middle of a line; remove it to make it again")


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one shard, in order."""
    for number, line in enumerate(read_lines(path), start=1):
        yield document_from_line(line, f"{path}:{number}")
