"""Documents ==> row tables on disk: built once, reused while nothing changed, refused when something did.

    <workdir>/tables/tokenizer-<key8>/     tokenizer.json  built.json
    <workdir>/tables/<source>-<key8>/      train/  heldout/  heldout.jsonl.gz  built.json

The key is a hash of what the config says (source, tokenizer, row length, split, seed); `built.json` holds what was
found then (hashes of the corpus files). Another config has another folder; another corpus behind the same config
is an error, because runs that resume would silently change their data.
"""

import concurrent.futures
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
from pretrain.data.batch import Batch
from pretrain.data.mixture import MixtureStage
from pretrain.data.pack import Piece, Row, document_pieces, pack_window, windows
from pretrain.data.rows import RowTable, write_manifest, write_shard
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource, is_heldout
from pretrain.rundir import storage_errors, write_atomic, write_json_atomic
from pretrain.tokenizer import FileTokenizer, Tokenizer

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

    def train_rows(self) -> Iterator[Batch]:
        """All rows for training, source by source, as host batches."""
        return self._batches(self.train_tables)

    def heldout_rows(self) -> Iterator[Batch]:
        """All held-out rows, source by source, as host batches."""
        return self._batches(self.heldout_tables)

    def _batches(self, tables: Mapping[str, RowTable], rows_at_once: int = 1024) -> Iterator[Batch]:
        for source, table in enumerate(tables.values()):
            for start in range(0, len(table), rows_at_once):
                rows = [table[i][0] for i in range(start, min(start + rows_at_once, len(table)))]
                yield stack_rows(rows, [source] * len(rows))

    def heldout_texts(self) -> dict[str, bytes]:
        """The bytes behind the held-out rows, by source."""
        return {name: b"".join(d.text.encode() for d in _read_documents(path)) for name, path in self.folders.items()}


def stack_rows(rows: list[Row], sources: list[int]) -> Batch:
    """Rows as one host batch."""
    return Batch(
        tokens_BT1=np.stack([r.tokens for r in rows]),
        segment_ids_BT1=np.stack([r.segment_ids for r in rows]),
        positions_BT1=np.stack([r.positions for r in rows]),
        weights_BT=np.stack([r.weights for r in rows]),
        source_B=np.array(sources, np.int32),
    )


def prepare_tables(
    config: DataConfig, workdir: str | Path, seed: int, progress: Progress | None = None
) -> PreparedData:
    """Build what is missing, check what is there, open it.

    Raises:
      ConfigError: a corpus is missing, empty, unreadable, or changed since its table was built.
    """
    progress = progress or (lambda stage, done: None)
    sources = {source.name: source.build(config.root) for source in config.sources}
    contents = {name: source.content_fingerprint() for name, source in sources.items()}
    home = Path(workdir) / "tables"
    missing = [p for p in (home, *home.parents) if not p.exists()]
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(home):
            tokenizer = _tokenizer(config, sources, contents, home, progress)
            folders = {s.name: _source_folder(config, s, tokenizer, home, seed) for s in config.sources}
            for name, folder in folders.items():
                if _reusable(folder, {name: contents[name]}, config.rebuild):
                    continue
                with _built_in_place(folder) as building:
                    _build_source(config, name, sources[name], tokenizer, building, seed, progress)
                    write_json_atomic(building / _BUILT, {"contents": {name: contents[name]}})
    except BaseException:
        for folder in missing:  # nothing half-written stays where there was nothing
            leftovers = [p for p in folder.iterdir() if p.name != ".lock"] if folder.is_dir() else [folder]
            if not leftovers:
                shutil.rmtree(folder)
        raise
    return _open(tokenizer, folders)


def _open(tokenizer: Tokenizer, folders: dict[str, Path]) -> PreparedData:
    train, heldout, num_bytes, report = {}, {}, {}, {}
    for name, folder in folders.items():
        train[name], heldout[name] = RowTable(folder / "train"), RowTable(folder / "heldout")
        for table in (train[name], heldout[name]):
            if table.manifest["tokenizer_sha256"] != tokenizer.sha256:
                raise ConfigError(
                    f"a row table must be read with the tokenizer that made it, got {tokenizer.sha256[:12]} for "
                    f"{table.folder}, made with {table.manifest['tokenizer_sha256'][:12]}; set data.rebuild=true"
                )
        num_bytes[name] = heldout[name].manifest["text_bytes"]
        report[name] = {
            kind: {k: v for k, v in table.manifest.items() if k not in ("shards", "format")}
            for kind, table in (("train", train[name]), ("heldout", heldout[name]))
        }
    if not any(len(table) for table in heldout.values()):
        raise ConfigError("evaluation needs held-out documents, got none; raise data.heldout_percent")
    hashes = [f"{name} {train[name].manifest['logical_sha256']} {heldout[name].manifest['logical_sha256']}" for name in train]
    fingerprint = hashlib.sha256("\n".join([tokenizer.sha256, *hashes]).encode()).hexdigest()
    return PreparedData(tokenizer, train, heldout, num_bytes, folders, fingerprint, report)


# --- folders -----------------------------------------------------------------------------------------


class _locked:  # noqa: N801
    """One builder at a time; the kernel frees the lock however the holder ends."""

    def __init__(self, home: Path):
        self._path = home / ".lock"

    def __enter__(self) -> None:
        with storage_errors(self._path):
            self._file = open(self._path, "a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        for leftover in self._path.parent.glob("*.building"):  # of a killed builder: we hold the lock
            shutil.rmtree(leftover)

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _built_in_place:  # noqa: N801
    """A folder that appears under its name when the block ends well, and not at all when it does not."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._building = folder.with_name(f"{folder.name}.building")

    def __enter__(self) -> Path:
        with storage_errors(self._building):
            self._building.mkdir(parents=True)
        return self._building

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self._building, ignore_errors=True)
            return
        with storage_errors(self._folder):
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._building.rename(self._folder)


def _reusable(folder: Path, contents: Mapping[str, str], rebuild: bool) -> bool:
    """Whether a finished folder was built from the same contents.

    Raises:
      ConfigError: it was built from others, and no rebuild is wanted.
    """
    path = folder / _BUILT
    if not path.exists():
        return False
    built = json.loads(path.read_text())["contents"]
    changed = sorted(name for name, value in contents.items() if built.get(name) != value)
    if changed and not rebuild:
        raise ConfigError(
            f"a corpus must not change after its rows were built, {', '.join(changed)} did (rows in {folder}); "
            "set data.rebuild=true to build them again, or use another run.workdir"
        )
    return not changed


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _tokenizer(
    config: DataConfig, sources: Mapping[str, TextSource], contents: Mapping[str, str], home: Path, progress: Progress
) -> Tokenizer:
    """The config's tokenizer, trained on the training texts where it has to be, kept beside the tables."""
    identity = [to_json(config.tokenizer, identity_only=True), config.heldout_percent]
    identity += [to_json(source, identity_only=True) for source in config.sources]
    folder = home / f"tokenizer-{_key(identity)}"
    path = folder / "tokenizer.json"
    trained = getattr(config.tokenizer, "trained", False)
    if trained and _reusable(folder, contents, config.rebuild):
        return FileTokenizer(path.read_text(encoding="utf-8"))
    if trained:
        progress("tokenizer", 0)
    tokenizer = config.tokenizer.build(_train_texts(config, sources), config.root)
    if trained:
        with _built_in_place(folder) as building:
            tokenizer.save(building / "tokenizer.json")
            write_json_atomic(building / _BUILT, {"contents": dict(contents)})
    return tokenizer


def _train_texts(config: DataConfig, sources: Mapping[str, TextSource]) -> Iterator[str]:
    for name, source in sources.items():
        for document in _documents(config, name, source):
            if isinstance(document, TextDocument) and not is_heldout(document.id, config.heldout_percent):
                yield document.text


def _documents(config: DataConfig, name: str, source: TextSource) -> Iterator[TextDocument | BadRecord]:
    """Documents, and bad records where the source counts them.

    Raises:
      ConfigError: a bad record, with its file and line, in a source that does not allow them.
    """
    strict = next(getattr(s, "on_bad_record", "count") for s in config.sources if s.name == name) == "error"
    for document in source.documents():
        if strict and isinstance(document, BadRecord):
            raise ConfigError(
                f"{document.where}: {document.reason}; mend the record, or set data.sources.{name}.on_bad_record=count"
            )
        yield document


def _source_folder(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, home: Path, seed: int) -> Path:
    identity = [to_json(source, identity_only=True), tokenizer.sha256, config.row_length, seed]
    identity += [config.heldout_percent, config.heldout_max_bytes]
    return home / f"{source.name}-{_key(identity)}"


# --- building ----------------------------------------------------------------------------------------


def _build_source(
    config: DataConfig, name: str, source: TextSource, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, storage_errors(folder):
        train = _TokenFile(Path(scratch) / "train", tokenizer)
        heldout: list[TextDocument] = []
        bad: list[BadRecord] = []
        for document in _documents(config, name, source):
            if isinstance(document, BadRecord):
                bad.append(document)
            elif is_heldout(document.id, config.heldout_percent):
                heldout.append(document)
            else:
                train.add(document.text)
                progress(name, train.num_documents)
        train.close()
        if not train.num_documents:
            raise ConfigError(f"data.sources.{name} must hold documents to train on, got none; check its path and keys")
        scored = _within(heldout, config.heldout_max_bytes)
        scored_tokens = _TokenFile(Path(scratch) / "heldout", tokenizer)
        for document in scored:
            scored_tokens.add(document.text)
        scored_tokens.close()
        facts = {"bad_records": len(bad), "first_bad_records": [dataclasses.asdict(b) for b in bad[:_SHOWN_BAD_RECORDS]]}
        _build_table(config, train, folder / "train", tokenizer, stable_seed(seed, name, "train"), facts)
        facts = {"unused_documents": len(heldout) - len(scored)}
        _build_table(config, scored_tokens, folder / "heldout", tokenizer, stable_seed(seed, name, "heldout"), facts)
    _write_documents(folder, scored)


def _within(documents: list[TextDocument], max_bytes: int) -> list[TextDocument]:
    """Documents in the order of their ids' hashes, as many as fit."""
    kept, total = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).digest()):
        size = len(document.text.encode())
        if total + size <= max_bytes:
            kept.append(document)
            total += size
    return kept


def _write_documents(folder: Path, documents: list[TextDocument]) -> None:
    lines = "".join(json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents)
    write_atomic(folder / "heldout.jsonl.gz", gzip.compress(lines.encode(), mtime=0))


def _read_documents(folder: Path) -> list[TextDocument]:
    lines = gzip.decompress((folder / "heldout.jsonl.gz").read_bytes()).decode().split("\n")
    return [TextDocument(**json.loads(line)) for line in lines if line]


class _TokenFile:
    """Token ids of many documents in one file, so that packing reads them by index from any process."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path = path
        self._tokenizer = tokenizer
        self._file = open(path, "wb")
        self._texts: list[str] = []
        self._characters = 0
        self._ends = [0]
        self.num_bytes = 0
        self.num_documents = 0

    def add(self, text: str) -> None:
        self._texts.append(text)
        self.num_documents += 1
        self._characters += len(text)
        self.num_bytes += len(text.encode())
        if self._characters >= _ENCODE_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        for ids in self._tokenizer.encode_batch(self._texts):
            self._file.write(np.array(ids, np.uint32).tobytes())
            self._ends.append(self._ends[-1] + len(ids))
        self._texts, self._characters = [], 0

    def close(self) -> None:
        """Write what is left; the file can be read afterwards."""
        self._encode()
        self._file.close()
        self.offsets = np.array(self._ends)


def _build_table(
    config: DataConfig, tokens: _TokenFile, folder: Path, tokenizer: Tokenizer, seed: int, facts: Mapping[str, Any]
) -> None:
    """Pack every window into a shard of its own; windows are independent, so any number of processes may work."""
    folder.mkdir()
    plan = list(windows(tokens.num_documents, seed))
    jobs = [
        _Window(
            tokens.path, tokens.offsets[members], tokens.offsets[members + 1], config.row_length, window_seed,
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, folder / f"{number:05d}-of-{len(plan):05d}.arrayrecord",
        )
        for number, (window_seed, members) in enumerate(plan)
    ]  # fmt: skip
    workers = min(config.num_workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        shards = [_pack_shard(job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")  # jax and its threads do not survive a fork
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            shards = list(pool.map(_pack_shard, jobs))
    rows = sum(s.rows for s in shards)
    num_tokens = int(tokens.offsets[-1]) + 2 * tokens.num_documents
    num_targets = int(tokens.offsets[-1]) + tokens.num_documents
    longer = int(np.sum(np.diff(tokens.offsets) + 2 > config.row_length + 1))
    write_manifest(
        folder,
        shards,
        {
            "row_length": config.row_length,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "seed": seed,
            "documents": tokens.num_documents,
            "documents_cut": longer,
            "text_bytes": tokens.num_bytes,
            "tokens": num_tokens,
            "targets": num_targets,
            "fill_fraction": num_targets / max(1, rows * config.row_length),
            **facts,
        },
    )


@dataclasses.dataclass(frozen=True)
class _Window:
    """One shard's work, small enough to send to another process."""

    tokens: Path
    starts: np.ndarray
    ends: np.ndarray
    row_length: int
    seed: int
    bos_id: int
    eos_id: int
    pad_id: int
    shard: Path


def _pack_shard(job: _Window) -> Any:
    ids = np.memmap(job.tokens, np.uint32, "r") if job.tokens.stat().st_size else np.zeros(0, np.uint32)
    pieces: list[Piece] = []
    for start, end in zip(job.starts, job.ends, strict=True):
        pieces += document_pieces(ids[start:end], bos_id=job.bos_id, eos_id=job.eos_id, row_length=job.row_length)
    return write_shard(job.shard, pack_window(pieces, row_length=job.row_length, pad_id=job.pad_id, seed=job.seed), 0)
