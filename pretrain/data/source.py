"""Where documents come from: files, the standard library, memory; every source yields the same three values.

A source is read at preparation time only; the training process reads rows. A record that cannot be read is
an error that names file and line, or, with `on_bad_record="count"`, a `BadRecord` that ends up in the report.
"""

import abc
import ast
import codecs
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import zstandard
from array_record.python import array_record_module

from pretrain.config import ConfigError, stable_seed, to_json
from pretrain.rundir import file_sha256

_COMPRESSED = (".gz", ".zst")
_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A text with an id. With `first`, a pair: only `text`, the second, is learned.

    `learned` are spans [start, stop) of characters, in order, that are learned (the answers of a dialogue); the rest
    of the text is only read. Each span, and each gap between two, is encoded by itself. None learns all.
    """

    id: str
    text: str
    source: str = ""
    first: str | None = None
    learned: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self):
        if self.learned is None:
            return
        if self.first is not None:
            raise ValueError(f"document {self.id!r} is a pair, of which the second text is learned whole")
        borders = [border for span in self.learned for border in span]
        if not borders or borders != sorted(set(borders)) or borders[0] < 0 or borders[-1] > len(self.text):
            raise ValueError(
                f"learned spans of document {self.id!r} must rise inside its {len(self.text)} characters "
                f"and hold one at least, got {self.learned}"
            )

    def parts(self) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is learned."""
        if self.learned is None:
            return [(self.text, True)]
        found, end = [], 0
        for start, stop in self.learned:
            found += [(self.text[end:start], False), (self.text[start:stop], True)]
            end = stop
        return [(text, learned) for text, learned in [*found, (self.text[end:], False)] if text]


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that holds no document, and why."""

    where: str  # file:line
    reason: str


class TextSource(Protocol):
    """Documents in a fixed order, as often as asked."""

    @property
    def identity(self) -> str: ...  # what decides the documents, beside the config and the files

    def content_files(self) -> list[tuple[str, Path]]: ...  # (name that moves with the corpus, path)

    def content_fingerprint(self) -> str: ...  # reads every file

    def documents(self) -> Iterator[TextDocument | BadRecord]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(abc.ABC):
    """A named source of documents.

    `max_epochs` caps how often training reads each row. `heldout_percent` overrides data.heldout_percent: 0 to
    train on everything, 100 to only evaluate. `on_overflow` says what happens to a pair longer than a row.
    """

    name: str
    max_epochs: float | None = None
    heldout_percent: float | None = None
    on_bad_record: Literal["error", "count"] = "error"
    on_overflow: Literal["error", "drop", "truncate"] = "error"
    # Decides neither documents nor rows, so a table outlives a change of it.
    NOT_IN_TABLE: ClassVar[tuple[str, ...]] = ("max_epochs",)

    def __post_init__(self):
        faults = []
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name[0] in ".-":
            faults.append(
                f"name must be letters, digits, '-', '_' or '.', got {self.name!r}; it names a folder"
            )
        if self.max_epochs is not None and self.max_epochs <= 0:
            faults.append(f"max_epochs must be positive or none, got {self.max_epochs}")
        if self.heldout_percent is not None and not 0 <= self.heldout_percent <= 100:
            faults.append(f"heldout_percent must lie in [0, 100], got {self.heldout_percent}")
        if faults:
            raise ValueError("\n".join(faults))

    @abc.abstractmethod
    def build(self, root: str) -> TextSource:
        """Open the source; relative paths are below `root`.

        Raises:
          ConfigError: it is not there.
        """


def fingerprint_of(identity: str, files: list[tuple[str, Path]]) -> str:
    """Hash of what decides the documents of a source, beside its config."""
    parts = [identity, *(f"{name} {file_hash(path)}" for name, path in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The sha256 of a corpus file; ConfigError when it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise ConfigError(f"a corpus file must be readable, got {path}: {error.strerror or error}") from error


def heldout(document_id: str, percent: float, seed: int) -> bool:
    """Whether a document is kept from training: a hash of its id decides, so it never changes sides."""
    return stable_seed("heldout", seed, document_id) < percent / 100 * 2**63


# --- files -------------------------------------------------------------------------------------------


def find_files(root: str, path: str, name: str) -> list[tuple[str, Path]]:
    """The files that `path` (a file, or a glob) names below `root`, in order of their names.

    Raises:
      ConfigError: there is none.
    """
    base = Path(root)
    if base.joinpath(path).is_file():
        found = base / path
        return [(found.name, found)]
    pattern = Path(path)
    if pattern.is_absolute():
        base = Path(pattern.anchor)
        pattern = pattern.relative_to(base)
    # Names are relative to the fixed part of the pattern: a corpus that moves keeps them.
    parts = list(pattern.parts)
    while parts and not any(c in parts[0] for c in "*?["):
        base = base / parts.pop(0)
    files = sorted(p for p in base.glob("/".join(parts)) if p.is_file()) if parts and base.is_dir() else []
    if not files:
        where = f"data.root is {root!r}" if root else "data.root is not set"
        near = _near_file(Path(root, path))
        raise ConfigError(
            f"data.sources.{name}.path must name a corpus file, got {path!r}, which is not there ({where}){near}"
        )
    return [(p.relative_to(base).as_posix(), p) for p in files]


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    stem = path.name.split(".")[0].lower()
    near = sorted(p.name for p in path.parent.iterdir() if p.name.lower().startswith(stem[:3]) and stem)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_bytes(path: Path) -> Iterator[bytes]:
    """The decompressed content of a file in pieces.

    Raises:
      ConfigError: it cannot be opened.
      EOFError, ValueError: the compressed data is damaged (what came before has been yielded).
    """
    try:
        with open(path, "rb") as raw:
            if path.suffix in _COMPRESSED and not os.fstat(raw.fileno()).st_size:
                raise EOFError  # gzip takes no bytes at all for an empty file
            if path.suffix == ".zst":
                yield from _zstd_pieces(raw)
                return
            stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while piece := stream.read(_PIECE_BYTES):
                yield piece
    except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"the compressed data is damaged ({error})") from error
    except EOFError as error:
        raise ValueError("the compressed data ends early; the file was cut off") from error
    except OSError as error:
        raise ConfigError(f"a corpus file must be readable, got {path}: {error.strerror or error}") from error


def _zstd_pieces(raw: Any) -> Iterator[bytes]:
    """The content of all frames, the last of which must end: zstandard's own reader takes a part of one for the whole."""
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    # Little is read at a time because a call returns all that its input holds.
    while data := raw.read(_PIECE_BYTES >> 4):
        while data:
            frame = frame or decompressor.decompressobj()
            if piece := frame.decompress(data):
                yield piece
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file without their end."""
    rest = b""
    for piece in read_bytes(path):
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def decode_text(data: bytes) -> str:
    """UTF-8 to text; ValueError says where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from error


def checked_text(value: Any, key: str) -> str:
    """A string that can be written as UTF-8; ValueError says what is wrong."""
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {key!r} holds half a surrogate pair at character {error.start}, which is no Unicode"
        ) from error
    return value


def document_of(record: Any, where: str, config: Any) -> TextDocument:
    """The document in a mapping with `text_key`, `id_key` and, for pairs, `first_key`; ValueError when none is."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, got {type(record).__name__}")
    values = {}
    for key in filter(None, (config.text_key, config.first_key)):
        if key not in record:
            raise ValueError(
                f"the record has no field {key!r}; it has: {', '.join(sorted(map(str, record))[:8])}"
            )
        values[key] = checked_text(record[key], key)
    identity = record.get(config.id_key)
    return TextDocument(
        id=where if identity is None else checked_text(str(identity), config.id_key),
        text=values[config.text_key],
        source=config.name,
        first=values[config.first_key] if config.first_key else None,
    )


def bad_record(config: SourceConfig, path: Path | str, line: int | None, error: ValueError) -> BadRecord:
    """Count the record, or refuse the corpus, as the config says.

    Raises:
      ConfigError: bad records are errors.
    """
    where = str(path) if line is None else f"{path}:{line}"
    if config.on_bad_record == "error":
        raise ConfigError(
            f"{where}: {error}; repair the record or set data.sources.{config.name}.on_bad_record=count to leave it out"
        ) from error
    return BadRecord(where, str(error))


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Documents of files, one reader function for all."""

    config: Any
    found: list[tuple[str, Path]]
    read: Any  # (name, path, config) -> iterator of documents and bad records
    identity: str = ""

    def content_files(self) -> list[tuple[str, Path]]:
        return self.found

    def content_fingerprint(self) -> str:
        return fingerprint_of(self.identity, self.found)

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        for name, path in self.found:
            yield from self.read(name, path, self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlConfig(SourceConfig):
    """Files with a JSON object in each line; `.gz` and `.zst` are decompressed, `path` may be a glob.

    A record without `id_key` is named by its file and line.
    """

    path: str
    text_key: str = "text"
    id_key: str = "id"
    first_key: str | None = None

    def build(self, root: str) -> TextSource:
        return FileSource(self, find_files(root, self.path, self.name), _read_jsonl)


def _read_jsonl(name: str, path: Path, config: JsonlConfig) -> Iterator[TextDocument | BadRecord]:
    number = 0
    try:
        for number, line in enumerate(read_lines(path), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield document_of(_parse_json(decode_text(line)), f"{name}:{number}", config)
            except ValueError as error:
                yield bad_record(config, path, number, error)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        yield bad_record(config, path, number + 1, error)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deeply") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """A folder of text files, each a document; `glob` chooses them."""

    path: str
    glob: str = "**/*.txt"

    def build(self, root: str) -> TextSource:
        folder = Path(root, self.path)
        if not folder.is_dir():
            raise ConfigError(
                f"data.sources.{self.name}.path must name a folder, got {str(folder)!r}, which is none"
            )
        return FileSource(self, find_files(str(folder), self.glob, self.name), _read_text_file)


def _read_text_file(name: str, path: Path, config: FolderConfig) -> Iterator[TextDocument | BadRecord]:
    try:
        yield TextDocument(name, decode_text(b"".join(read_bytes(path))), config.name)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        yield bad_record(config, path, None, error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFileConfig(SourceConfig):
    """Long plain texts, cut into documents of about `document_bytes` at line ends.

    One file as one document would lie on one side of the held-out split as a whole.
    """

    path: str
    document_bytes: int = 1 << 14

    def __post_init__(self):
        super().__post_init__()
        if self.document_bytes < 1:
            raise ValueError(f"document_bytes must be positive, got {self.document_bytes}")

    def build(self, root: str) -> TextSource:
        return FileSource(self, find_files(root, self.path, self.name), _read_long_text)


def _read_long_text(name: str, path: Path, config: TextFileConfig) -> Iterator[TextDocument | BadRecord]:
    number, count, size, lines = 0, 0, 0, []
    try:
        for number, line in enumerate(read_lines(path), 1):
            try:
                lines.append(decode_text(line))
            except ValueError as error:
                yield bad_record(config, path, number, error)
                continue
            size += len(line) + 1
            if size >= config.document_bytes:
                yield TextDocument(f"{name}#{count}", "\n".join(lines) + "\n", config.name)
                count, size, lines = count + 1, 0, []
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        yield bad_record(config, path, number + 1, error)
    if lines:
        yield TextDocument(f"{name}#{count}", "\n".join(lines) + "\n", config.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordConfig(SourceConfig):
    """ArrayRecord files of JSON objects, or of plain UTF-8 texts when `text_key` is none."""

    path: str
    text_key: str | None = "text"
    id_key: str = "id"
    first_key: str | None = None

    def build(self, root: str) -> TextSource:
        return FileSource(self, find_files(root, self.path, self.name), _read_array_record)


def _read_array_record(
    name: str, path: Path, config: ArrayRecordConfig
) -> Iterator[TextDocument | BadRecord]:
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        if not reader.ok():  # a file that is none has no records and fails when it is closed
            reader.close()
    except RuntimeError as error:
        yield bad_record(config, path, None, ValueError(f"not a readable ArrayRecord file ({error})"))
        return
    for index in range(reader.num_records()):
        where = f"{name}:{index}"
        try:
            text = decode_text(reader.read([index])[0])
            if config.text_key is None:
                yield TextDocument(where, text, config.name)
            else:
                yield document_of(_parse_json(text), where, config)
        except ConfigError:
            raise
        except (ValueError, RuntimeError) as error:
            yield bad_record(config, path, index, ValueError(str(error)))


# --- no files of the user ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibConfig(SourceConfig):
    """The standard library of the running Python: module sources, and the language reference that `help()` shows.

    Real text that every machine with Python has. Tests and what pip installed are left out.
    """

    def build(self, root: str) -> TextSource:
        return StdlibSource(self, Path(sysconfig.get_paths()["stdlib"]))


_TOPICS = "pydoc_data/topics.py"
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)


@dataclasses.dataclass(frozen=True)
class StdlibSource:
    """See `StdlibConfig`. Another Python is another corpus, not a changed one."""

    config: StdlibConfig
    folder: Path

    @property
    def identity(self) -> str:
        return f"{platform.python_implementation()} {platform.python_version()}"

    def content_fingerprint(self) -> str:
        return fingerprint_of(self.identity, self.content_files())

    def content_files(self) -> list[tuple[str, Path]]:
        found = []
        for folder, names, files in os.walk(self.folder):
            # Pruned here: what pip installed may be a hundred times the library.
            names[:] = [n for n in names if n not in _LEFT_OUT and not n.startswith("config-")]
            for path in (Path(folder, file) for file in files if file.endswith(".py")):
                found.append((path.relative_to(self.folder).as_posix(), path))
        if (self.folder / _TOPICS).is_file():
            found.append((_TOPICS, self.folder / _TOPICS))
        return sorted(found)

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        for name, path in self.content_files():
            try:
                text = decode_text(b"".join(read_bytes(path)))
            except ValueError as error:
                if isinstance(error, ConfigError):
                    raise
                # Two modules are Latin-1 on purpose; they are no fault of the user.
                yield BadRecord(name, str(error))
                continue
            if name == _TOPICS:
                yield from self._topics(text)
            else:
                yield TextDocument(name, text, self.config.name)

    def _topics(self, text: str) -> Iterator[TextDocument]:
        """The pages of the language reference: a literal dict, read without running the module."""
        topics = next(
            ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "topics"
        )
        for topic in sorted(topics):
            yield TextDocument(f"topics/{topic}", topics[topic], self.config.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(SourceConfig):
    """Documents written in the config itself: tests, and texts that a program made."""

    documents: tuple[TextDocument, ...]

    def build(self, root: str) -> TextSource:
        return MemorySource(self)


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """See `MemoryConfig`."""

    config: MemoryConfig

    @functools.cached_property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(to_json(self.config.documents)).encode()).hexdigest()

    def content_files(self) -> list[tuple[str, Path]]:
        return []

    def content_fingerprint(self) -> str:
        return fingerprint_of(self.identity, [])

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        for document in self.config.documents:
            try:
                for value, key in ((document.text, "text"), (document.first or "", "first")):
                    checked_text(value, key)
            except ValueError as error:
                yield bad_record(self.config, f"data.sources.{self.config.name}.documents", None, error)
                continue
            yield dataclasses.replace(document, source=self.config.name)
