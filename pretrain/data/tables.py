"""Documents ==> row tables on disk: built once, reused while nothing changed, refused when something did.

    <workdir>/tables/tokenizer-<key8>/     tokenizer.json  built.json
    <workdir>/tables/<source>-<key8>/      train/  heldout/  heldout.jsonl.gz  built.json

The key is a hash of what the config says (source, tokenizer, row length, split, seed); `built.json` holds what was
found then (hashes of the corpus files). Another config has another folder; another corpus behind the same config
is an error, because runs that resume would silently change their data.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import ConfigError, local, stable_seed, to_json
from pretrain.data.mixture import MixtureStage
from pretrain.data.pack import (
    Overflow,
    Overflowed,
    Piece,
    Specials,
    document_pieces,
    pack_window,
    pair_piece,
    seeded_order,
    windows,
)
from pretrain.data.rows import REBUILD, RowFormat, Rows, RowTable, Shard, write_shard, write_table_manifest
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource, heldout
from pretrain.rundir import storage_errors, write_atomic, write_json_atomic
from pretrain.tokenizer import Tokenizer

# (what is being read, documents so far)
Progress = Callable[[str, int], None]

_BUILT = "built.json"
_ENCODE_CHARACTERS = 4_000_000  # encoded at a time, on all cores
_SHOWN_BAD_RECORDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, how they become rows, and in which mixture rows are read.

    `root` is the folder that relative source paths start from. Without `stages` sources are drawn in proportion to
    their rows. At most `heldout_max_bytes` of each source are scored; held-out documents beyond are left unused.
    """

    sources: tuple[Any, ...]
    tokenizer: Any
    row_length: int
    batch_rows: int
    stages: tuple[MixtureStage, ...] = ()
    heldout_percent: float = 1.0
    heldout_max_bytes: int = 1_000_000
    root: str = local("")
    num_workers: int = local(0)  # processes that pack; 0: one a core
    rebuild: bool = local(False)

    def __post_init__(self):
        faults = []
        names = [source.name for source in self.sources]
        if not names:
            faults.append("sources must name at least one source, got none")
        if len(set(names)) < len(names):
            faults.append(f"sources must have distinct names, got {', '.join(names)}")
        if self.row_length < 2:
            faults.append(f"row_length must be at least 2, got {self.row_length}")
        if self.batch_rows < 1:
            faults.append(f"batch_rows must be at least 1, got {self.batch_rows}")
        if not 0 < self.heldout_percent < 100:
            faults.append(f"heldout_percent must lie between 0 and 100, got {self.heldout_percent}")
        if self.heldout_max_bytes < 1:
            faults.append(f"heldout_max_bytes must be positive, got {self.heldout_max_bytes}")
        if self.num_workers < 0:
            faults.append(f"num_workers must not be negative, got {self.num_workers}")
        if faults:
            raise ValueError("\n".join(faults))


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Everything training reads, and what is worth knowing about it."""

    tokenizer: Tokenizer
    train_tables: dict[str, RowTable]
    heldout_tables: dict[str, RowTable]
    heldout_bytes: dict[str, int]
    folders: dict[str, Path]
    fingerprint: str
    report: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Names that a row's source index stands for."""
        return list(self.train_tables)

    def train_rows(self) -> Iterator[Rows]:
        """All rows for training, source by source."""
        return _all_rows(self.train_tables)

    def heldout_rows(self) -> Iterator[Rows]:
        """All held-out rows, source by source."""
        return _all_rows(self.heldout_tables)

    def heldout_texts(self) -> dict[str, bytes]:
        """The bytes behind the held-out rows, by source."""
        return {name: b"".join(t.encode() for t in _read_texts(path)) for name, path in self.folders.items()}


def _all_rows(tables: Mapping[str, RowTable], rows_at_once: int = 1024) -> Iterator[Rows]:
    for source, table in enumerate(tables.values()):
        for start in range(0, len(table), rows_at_once):
            yield table.read(range(start, min(start + rows_at_once, len(table))), source)


def prepare_tables(config: DataConfig, workdir: str | Path, seed: int, progress: Progress | None = None) -> PreparedData:
    """Build what is missing, check what is there, open it.

    Raises:
      ConfigError: a corpus is missing, empty, unreadable, or changed since its table was built.
    """
    progress = progress or (lambda stage, done: None)
    sources = {source.name: source.build(config.root) for source in config.sources}
    contents = {name: source.content_fingerprint() for name, source in sources.items()}
    home = Path(workdir) / "tables"
    with _removed_if_empty(home), _locked(home):
        tokenizer = _tokenizer(config, sources, contents, home, seed, progress)
        folders = {s.name: _source_folder(config, s, sources[s.name], tokenizer, home, seed) for s in config.sources}
        for source in config.sources:
            folder, content = folders[source.name], {source.name: contents[source.name]}
            if not _reusable(folder, content, config.rebuild):
                with _built_in_place(folder) as building:
                    _build_source(config, source, sources[source.name], tokenizer, building, seed, progress)
                    write_json_atomic(building / _BUILT, {"contents": content})
    return _open(tokenizer, folders)


def _open(tokenizer: Tokenizer, folders: dict[str, Path]) -> PreparedData:
    train, scored, num_bytes, report = {}, {}, {}, {}
    for name, folder in folders.items():
        train[name], scored[name] = RowTable(folder / "train"), RowTable(folder / "heldout")
        for table in (train[name], scored[name]):
            made_with = table.manifest["tokenizer_sha256"]
            if made_with != tokenizer.sha256:
                raise ConfigError(
                    f"a row table must be read with the tokenizer that made it ({made_with[:12]}), got tokenizer "
                    f"{tokenizer.sha256[:12]} for {table.folder}; {REBUILD}"
                )
        num_bytes[name] = scored[name].manifest["text_bytes"]
        report[name] = {
            "train": {k: v for k, v in train[name].manifest.items() if k not in ("shards", "format", "dtypes")},
            "heldout": {k: v for k, v in scored[name].manifest.items() if k not in ("shards", "format", "dtypes")},
        }
    if not any(num_bytes.values()):
        raise ConfigError("evaluation needs held-out documents, got none; raise data.heldout_percent or heldout_max_bytes")
    hashes = [f"{name} {train[name].rows_sha256} {scored[name].rows_sha256}" for name in folders]
    fingerprint = hashlib.sha256("\n".join([tokenizer.sha256, *hashes]).encode()).hexdigest()
    return PreparedData(tokenizer, train, scored, num_bytes, folders, fingerprint, report)


# --- folders -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _removed_if_empty(home: Path) -> Iterator[None]:
    """Make `home`; when the block fails before anything was built there, leave no folder that was not there."""
    missing = [p for p in (home, *home.parents) if not p.exists()]
    try:
        with storage_errors(home):
            home.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            if folder.is_dir() and all(p.name == ".lock" for p in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One builder at a time; the kernel frees the lock however the holder ends."""
    with storage_errors(home):
        file = open(home / ".lock", "a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in home.glob("*.building"):  # of a killed builder: we hold the lock
            shutil.rmtree(leftover)
        yield


@contextlib.contextmanager
def _built_in_place(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and not at all when it does not."""
    building = folder.with_name(f"{folder.name}.building")
    with storage_errors(building, (OSError, RuntimeError)):
        building.mkdir(parents=True)
        try:
            yield building
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)


def _reusable(folder: Path, contents: Mapping[str, str], rebuild: bool) -> bool:
    """Whether a finished folder was built from the same contents.

    Raises:
      ConfigError: it was built from others, and no rebuild is wanted.
    """
    path = folder / _BUILT
    if not path.exists() or rebuild:
        return False
    built = json.loads(path.read_text())["contents"]
    changed = sorted(name for name, value in contents.items() if built.get(name) != value)
    if changed:
        raise ConfigError(
            f"a corpus must not change after its rows were built, {', '.join(changed)} did (rows in {folder}); "
            "set data.rebuild=true to build them again, or use another run.workdir"
        )
    return True


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _source_identity(source: SourceConfig) -> Any:
    """The fields of a source that decide its rows."""
    return {k: v for k, v in to_json(source, identity_only=True).items() if k not in source.NOT_IN_TABLE}


def _source_folder(
    config: DataConfig, source: SourceConfig, opened: TextSource, tokenizer: Tokenizer, home: Path, seed: int
) -> Path:
    split = [config.heldout_percent, config.heldout_max_bytes]
    key = _key(_source_identity(source), opened.identity, tokenizer.sha256, config.row_length, split, seed)
    return home / f"{source.name}-{key}"


# --- the tokenizer -----------------------------------------------------------------------------------


def _tokenizer(
    config: DataConfig,
    sources: Mapping[str, TextSource],
    contents: Mapping[str, str],
    home: Path,
    seed: int,
    progress: Progress,
) -> Tokenizer:
    """The config's tokenizer, trained on the training texts where it has to be, then kept beside the tables."""

    def texts(max_bytes: int) -> Iterator[str]:
        return _sampled_texts(config, sources, seed, max_bytes)

    if not config.tokenizer.trained:
        return config.tokenizer.build(config.root, texts)
    of_sources = [[_source_identity(s), sources[s.name].identity] for s in config.sources]
    folder = home / f"tokenizer-{_key(to_json(config.tokenizer), of_sources, config.heldout_percent, seed)}"
    if not _reusable(folder, contents, config.rebuild):
        progress("tokenizer", 0)
        with _built_in_place(folder) as building:
            config.tokenizer.build(config.root, texts).save(building / "tokenizer.json")
            write_json_atomic(building / _BUILT, {"contents": dict(contents)})
    return config.tokenizer.load((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _sampled_texts(config: DataConfig, sources: Mapping[str, TextSource], seed: int, max_bytes: int) -> Iterator[str]:
    """Training documents, a random share of them when all together are more than `max_bytes`."""

    def documents() -> Iterator[TextDocument]:
        for source in config.sources:
            for document in sources[source.name].documents():
                if isinstance(document, TextDocument) and not _is_heldout(config, source, document, seed):
                    yield document

    total = sum(len(d.text.encode()) for d in documents())
    share = min(1.0, max_bytes / max(1, total))
    for document in documents():
        if share == 1.0 or stable_seed("tokenizer", seed, document.source, document.id) < share * 2**63:
            yield document.text
            if document.first is not None:
                yield document.first


def _is_heldout(config: DataConfig, source: SourceConfig, document: TextDocument, seed: int) -> bool:
    percent = config.heldout_percent if source.heldout_percent is None else source.heldout_percent
    return heldout(document.id, percent, seed)


# --- building ----------------------------------------------------------------------------------------


def _build_source(
    config: DataConfig,
    source: SourceConfig,
    opened: TextSource,
    tokenizer: Tokenizer,
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Both tables of one source, and the text of its scored documents."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        train = _TokenFile(Path(scratch) / "train", tokenizer)
        kept: list[TextDocument] = []
        bad: list[BadRecord] = []
        for document in opened.documents():
            if isinstance(document, BadRecord):
                bad.append(document)
            elif _is_heldout(config, source, document, seed):
                kept.append(document)
            else:
                train.add(document)
                progress(source.name, train.num_documents)
        train.close()
        if not train.num_documents and source.heldout_percent != 100:
            found = f"{len(kept)} held-out ones and {len(bad)} bad records" if kept or bad else "none at all"
            raise ConfigError(f"data.sources.{source.name} must hold documents to train on, got {found}; check its path")
        chosen = _within(kept, config.heldout_max_bytes)
        scored = _TokenFile(Path(scratch) / "heldout", tokenizer)
        for document in chosen:
            scored.add(document)
        scored.close()
        facts: dict[str, Any] = {"bad_records": len(bad)}
        facts["first_bad_records"] = [dataclasses.asdict(b) for b in bad[:_SHOWN_BAD_RECORDS]]
        _build_table(config, source, train, folder / "train", tokenizer, stable_seed(seed, source.name), facts)
        facts = {"unused_documents": len(kept) - len(chosen)}
        _build_table(config, source, scored, folder / "heldout", tokenizer, stable_seed(seed, source.name), facts)
    lines = "".join(json.dumps([d.text], ensure_ascii=False) + "\n" for d in chosen)
    write_atomic(folder / "heldout.jsonl.gz", gzip.compress(lines.encode(), mtime=0))


def _within(documents: list[TextDocument], max_bytes: int) -> list[TextDocument]:
    """Documents in the order of their ids' hashes, as many as fit."""
    kept, total = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).digest()):
        size = len(document.text.encode())
        if total + size <= max_bytes:
            kept.append(document)
            total += size
    return kept


def _read_texts(folder: Path) -> Iterator[str]:
    for line in gzip.decompress((folder / "heldout.jsonl.gz").read_bytes()).splitlines():
        yield json.loads(line)[0]


class _TokenFile:
    """Token ids of many documents in one file, so that packing reads them by index from any process."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path = path
        self._tokenizer = tokenizer
        self._file = open(path, "wb")
        self._waiting: list[TextDocument] = []
        self._characters = 0
        self._ends = [0]
        self._first_lengths: list[int] = []
        self.num_bytes = 0
        self.num_documents = 0

    def add(self, document: TextDocument) -> None:
        self._waiting.append(document)
        self.num_documents += 1
        self.num_bytes += len(document.text.encode())
        self._characters += len(document.text) + len(document.first or "")
        if self._characters >= _ENCODE_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        ids = self._tokenizer.encode_batch([d.text for d in self._waiting])
        firsts = iter(self._tokenizer.encode_batch([d.first for d in self._waiting if d.first is not None]))
        for document, second in zip(self._waiting, ids, strict=True):
            first = [] if document.first is None else next(firsts)
            self._file.write(np.array([*first, *second], np.uint32).tobytes())
            self._ends.append(self._ends[-1] + len(first) + len(second))
            self._first_lengths.append(-1 if document.first is None else len(first))
        self._waiting, self._characters = [], 0

    def close(self) -> None:
        """Write what is left; the file can be read afterwards."""
        self._encode()
        self._file.close()
        self.offsets = np.array(self._ends)
        self.first_lengths = np.array(self._first_lengths, np.int64)


@dataclasses.dataclass(frozen=True)
class _Window:
    """One shard's work, small enough to send to another process."""

    tokens: Path
    starts: np.ndarray
    ends: np.ndarray
    first_lengths: np.ndarray  # -1: a document, not a pair
    row_format: RowFormat
    specials: Specials
    on_overflow: Overflow
    seed: int
    shard: Path


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A written shard and what went into it."""

    shard: Shard
    targets: int
    cut_documents: int
    dropped_pairs: int


def _pack_shard(window: _Window) -> _Packed:
    ids = np.memmap(window.tokens, np.uint32, "r") if window.tokens.stat().st_size else np.zeros(0, np.uint32)
    pieces: list[Piece] = []
    cut = dropped = 0
    row_length = window.row_format.row_length
    for start, end, first_length in zip(window.starts, window.ends, window.first_lengths, strict=True):
        if first_length < 0:
            found = document_pieces(ids[start:end], row_length, window.specials)
            cut += len(found) > 1
            pieces += found
            continue
        middle = start + first_length
        pair = pair_piece(ids[start:middle], ids[middle:end], row_length, window.specials, window.on_overflow)
        dropped += pair is None
        pieces += [] if pair is None else [pair]
    rows = pack_window(pieces, row_length=row_length, pad_id=window.specials.pad, seed=window.seed)
    targets = sum(len(p.tokens) - p.first_target for p in pieces)
    return _Packed(write_shard(window.shard, rows, window.row_format), targets, cut, dropped)


def _build_table(
    config: DataConfig,
    source: SourceConfig,
    tokens: _TokenFile,
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    facts: Mapping[str, Any],
) -> None:
    """Pack every window into a shard of its own; windows are independent, so any number of processes may work."""
    folder.mkdir()
    row_format = RowFormat(row_length=config.row_length, vocab_size=tokenizer.vocab_size)
    order = seeded_order(tokens.num_documents, stable_seed(seed, "documents"))
    jobs = [
        _Window(
            tokens=tokens.path,
            starts=tokens.offsets[order[window]],
            ends=tokens.offsets[order[window] + 1],
            first_lengths=tokens.first_lengths[order[window]],
            row_format=row_format,
            specials=Specials(
                bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id, sep=tokenizer.sep_id
            ),
            on_overflow=source.on_overflow,
            seed=stable_seed(seed, "window", number),
            shard=folder / f"{number:05d}.array_record",
        )
        for number, window in enumerate(windows(tokens.num_documents))
    ]
    workers = min(config.num_workers or os.cpu_count() or 1, len(jobs))
    try:
        if workers <= 1:
            packed = [_pack_shard(job) for job in jobs]
        else:
            context = multiprocessing.get_context("spawn")  # jax and its threads do not survive a fork
            with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
                packed = list(pool.map(_pack_shard, jobs))
    except Overflowed as error:
        raise ConfigError(
            f"a pair must fit a row of {config.row_length + 1} tokens, data.sources.{source.name} holds one of {error.length}; "
            f"raise data.row_length, or set data.sources.{source.name}.on_overflow to drop or truncate"
        ) from error
    rows = sum(p.shard.rows for p in packed)
    targets = sum(p.targets for p in packed)
    all_facts = {
        "tokenizer_sha256": tokenizer.sha256,
        "seed": seed,
        "documents": tokens.num_documents,
        "documents_cut": sum(p.cut_documents for p in packed),
        "pairs_dropped": sum(p.dropped_pairs for p in packed),
        "text_bytes": tokens.num_bytes,
        "target_tokens": targets,
        "fill_fraction": targets / max(1, rows * config.row_length),
        **facts,
    }
    write_table_manifest(folder, [p.shard for p in packed], row_format, all_facts)
