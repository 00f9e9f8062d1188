"""Documents ==> row tables on disk: built once, reused while nothing changed, refused when something did.

    <workdir>/tables/tokenizer-<identity8>/   tokenizer.json  manifest.json  files.json
    <workdir>/tables/<source>-<identity8>/    train/  heldout/  heldout.jsonl.gz  manifest.json  files.json

The name is a hash of what the config says (source, tokenizer, row length, split, seed); the manifest holds what was
found when it was built (hashes of the corpus files, of the tokenizer, of the rows). Another config is another
folder; another corpus or tokenizer behind the same config is an error, since runs that resume would otherwise
change their data without a word. A folder is made under another name and renamed when it is whole.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import heapq
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, local, stable_seed, to_json
from pretrain.data.build import PackCounts, Progress, TableSpec, build_table
from pretrain.data.mixture import BatchStage, MixturePlan, MixtureStage, check_starts
from pretrain.data.order import order_fingerprint
from pretrain.data.rows import REBUILD, Rows, RowTable, read_sealed, write_sealed
from pretrain.data.source import (
    BadRecord,
    SourceConfig,
    TextDocument,
    TextSource,
    file_hash,
    heldout,
)
from pretrain.data.spool import Spool, SpoolWriter
from pretrain.jobs.api import Jobs, JobsConfig
from pretrain.jobs.pool import PoolConfig
from pretrain.rundir import file_sha256, storage_errors, write_json_atomic
from pretrain.tokenizer import Tokenizer, TokenizerConfig

_FORMAT = 2
_MANIFEST, _FILES, _HELDOUT, _TOKENIZER = "manifest.json", "files.json", "heldout.jsonl.gz", "tokenizer.json"
_SHOWN_BAD_RECORDS = 5
# A file written this shortly before it was looked at may have changed again within one tick of its clock.
_RACY_NS = 2_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, how they become rows, and in which mixture rows are read.

    Without `stages` sources are drawn in proportion to their train tokens; without `batch_stages` every batch has
    `batch_rows` rows. Of each source at most `heldout_max_bytes` are kept for evaluation; held-out documents beyond
    are neither trained on nor scored. `root` is the folder that source and tokenizer paths start from.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    row_length: int
    batch_rows: int
    stages: tuple[MixtureStage, ...] = ()
    batch_stages: tuple[BatchStage, ...] = ()
    heldout_percent: float = 1.0
    heldout_max_bytes: int = 1_000_000
    table_seed: int = (
        0  # of the split and of the order of documents in a table; runs with other seeds share tables
    )
    root: str = local("")
    jobs: JobsConfig = local(PoolConfig())  # where documents are encoded and packed
    rebuild: bool = local(False)

    def __post_init__(self):
        faults = []
        names = [source.name for source in self.sources]
        if not names:
            faults.append("sources must name at least one source, got none")
        for name in sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"sources must have different names, got {name!r} more than once")
        for field, least in (("row_length", 2), ("batch_rows", 1), ("heldout_max_bytes", 1)):
            if getattr(self, field) < least:
                faults.append(f"{field} must be at least {least}, got {getattr(self, field)}")
        if not 0 <= self.heldout_percent <= 100:
            faults.append(f"heldout_percent must lie in [0, 100], got {self.heldout_percent}")
        faults += check_starts("stages", [stage.start_step for stage in self.stages])
        faults += check_starts("batch_stages", [stage.start_step for stage in self.batch_stages])
        for i, stage in enumerate(self.stages):
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                faults.append(
                    f"stages.{i}.weights must name sources ({', '.join(names)}), got {', '.join(unknown)}"
                )
        if faults:
            raise ValueError("\n".join(faults))

    def heldout_percent_of(self, source: SourceConfig) -> float:
        """The source's own percentage, or the common one."""
        return self.heldout_percent if source.heldout_percent is None else source.heldout_percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything that training and evaluation read.

    Attributes:
      labels: the names that the source index of a row stands for.
      identity: what decides the batches, by name; `fingerprint` is its hash.
      heldout_bytes: UTF-8 bytes of the text behind the held-out rows, by source (of pairs, the second text).
      report: counts by source, as JSON values.
    """

    tokenizer: Tokenizer
    train_tables: dict[str, RowTable]
    heldout_tables: dict[str, RowTable]
    heldout_bytes: dict[str, int]
    folders: dict[str, Path]
    identity: dict[str, str]
    report: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        return list(self.train_tables)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def train_rows(self, max_rows_per_source: int | None = None) -> Iterator[Rows]:
        """Train rows, source by source, a few hundred at a time. The first rows of a table are a random sample of it."""
        return _all_rows(self.train_tables, max_rows_per_source)

    def heldout_rows(self) -> Iterator[Rows]:
        """All held-out rows, source by source, a few hundred at a time."""
        return _all_rows(self.heldout_tables, None)

    def heldout_documents(self, source: str) -> Iterator[TextDocument]:
        """The documents behind the held-out rows of a source."""
        path = self.folders[source] / _HELDOUT
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                for line in file:
                    values = json.loads(line)
                    learned = values.get("learned")
                    yield TextDocument(
                        values["id"],
                        values["text"],
                        source,
                        values.get("first"),
                        None if learned is None else tuple((start, stop) for start, stop in learned),
                    )
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ConfigError(f"held-out documents {path} are damaged: {error}; {REBUILD}") from error

    def heldout_texts(self) -> dict[str, bytes]:
        """The bytes behind the held-out rows, by source: `heldout_bytes` of them."""
        return {
            name: b"".join(
                part.encode() for d in self.heldout_documents(name) for part, learned in d.parts() if learned
            )
            for name in self.labels
        }

    def verify(self) -> None:
        """Compare every byte of the tables with its hash.

        Raises:
          ConfigError: something is not as it was written.
        """
        for name, folder in self.folders.items():
            _verify_source(folder)
            assert self.train_tables[name].folder.parent == folder


def _all_rows(
    tables: Mapping[str, RowTable], max_rows: int | None, rows_at_once: int = 512
) -> Iterator[Rows]:
    for source, table in enumerate(tables.values()):
        stop = len(table) if max_rows is None else min(max_rows, len(table))
        for start in range(0, stop, rows_at_once):
            yield table.read(range(start, min(start + rows_at_once, stop)), source)


def prepare_tables(
    data: DataConfig, workdir: str | Path, seed: int, progress: Progress | None = None
) -> PreparedData:
    """Open the tables of a config below `workdir`; build what is missing.

    Checking takes a look at the dates of the corpus files; they are read only where one has changed. Several processes
    may do this at once: one builds, the others wait. `seed` decides the order of rows, not the tables.

    Raises:
      ConfigError: a corpus is missing, empty, malformed, or changed since its table was built; the tokenizer is
        another; a table is damaged; the storage refuses.
    """
    progress = progress or PrintedProgress()
    opened = [_Opened(data, config, config.build(data.root)) for config in data.sources]
    home = Path(workdir) / "tables"
    keeper = _Keeper(data, home, opened, progress)
    found = keeper.find()
    if found is None:
        with storage_errors(home, (OSError, RuntimeError)), _new_folders(home), _locked(home, progress):
            found = keeper.find() or keeper.build()
    prepared = _prepared(data, seed, *found)
    for name, report in prepared.report.items():
        if report["bad_records"]:
            first = report["first_bad_records"][0]
            progress(f"{name}: {report['bad_records']} bad records are left out, the first: {first}", 0, 0)
    return prepared


def _prepared(data: DataConfig, seed: int, tokenizer: Tokenizer, folders: dict[str, Path]) -> PreparedData:
    train = {name: RowTable(folder / "train") for name, folder in folders.items()}
    held = {name: RowTable(folder / "heldout") for name, folder in folders.items()}
    report = {name: read_sealed(folder / _MANIFEST, _FORMAT)["report"] for name, folder in folders.items()}
    if not any(len(table) for table in train.values()):
        raise ConfigError(
            "data.sources must hold documents to train on, got none; lower data.heldout_percent"
        )
    if data.heldout_percent > 0 and not any(len(table) for table in held.values()):
        documents = sum(table.manifest["documents"] for table in train.values())
        raise ConfigError(
            f"data.heldout_percent={data.heldout_percent:g} must leave documents to evaluate on, got none of {documents}; "
            "raise it, give the corpus as more documents, or set it to 0 for no evaluation"
        )
    stages = [to_json(stage) for stage in mixture_stages(data, train)]
    identity = {
        "data.row_length": str(data.row_length),
        "data.stages": json.dumps(stages, sort_keys=True),
        "data.batch_stages": json.dumps([to_json(stage) for stage in batch_stages(data)], sort_keys=True),
        "data.tokenizer": tokenizer.sha256,
        "run.seed": str(seed),
        "order of rows": order_fingerprint(),
    }
    for source in data.sources:
        identity[f"data.sources.{source.name}.max_epochs"] = str(source.max_epochs)
        identity[f"train rows of {source.name}"] = train[source.name].rows_sha256
        identity[f"held-out rows of {source.name}"] = held[source.name].rows_sha256
    return PreparedData(
        tokenizer=tokenizer,
        train_tables=train,
        heldout_tables=held,
        heldout_bytes={name: table.manifest["text_bytes"] for name, table in held.items()},
        folders=folders,
        identity=identity,
        report=report,
    )


def mixture_stages(data: DataConfig, train_tables: Mapping[str, RowTable]) -> tuple[MixtureStage, ...]:
    """The stages of the config, or one in proportion to train tokens."""
    if data.stages:
        return data.stages
    weights = {name: float(table.num_tokens) for name, table in train_tables.items()}
    return (MixtureStage(start_step=0, weights=weights),)


def batch_stages(data: DataConfig) -> tuple[BatchStage, ...]:
    """The batch stages of the config, or one with `batch_rows`."""
    return data.batch_stages or (BatchStage(start_step=0, batch_rows=data.batch_rows),)


def mixture_plan(data: DataConfig, train_tables: Mapping[str, RowTable], seed: int) -> MixturePlan:
    """The plan of a run over these tables.

    Raises:
      ConfigError: a stage gives weight to a source without rows.
    """
    return MixturePlan(
        {name: len(table) for name, table in train_tables.items()},
        mixture_stages(data, train_tables),
        batch_stages=batch_stages(data),
        max_epochs={source.name: source.max_epochs for source in data.sources},
        seed=seed,
    )


# --- what the config asks for ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source of the config, open, with the content that its files have now."""

    data: DataConfig
    config: SourceConfig
    source: TextSource

    @property
    def name(self) -> str:
        return self.config.name

    def identity(self) -> dict[str, Any]:
        """What the config says about the documents of this source and their split."""
        fields = to_json(self.config, identity_only=True)
        for field in self.config.NOT_IN_TABLE:
            del fields[field]
        fields["heldout_percent"] = self.data.heldout_percent_of(self.config)
        return {**fields, "identity": self.source.identity, "table_seed": self.data.table_seed}

    def files(self) -> list[tuple[str, Path]]:
        return self.source.content_files()


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


class _Keeper:
    """Finds, checks and builds the folders that a config asks for."""

    def __init__(self, data: DataConfig, home: Path, opened: Sequence[_Opened], progress: Progress):
        self._data, self._home, self._opened, self._progress = data, home, opened, progress
        config = {"config": to_json(data.tokenizer, identity_only=True)}
        if data.tokenizer.trained:
            config["sources"] = [o.identity() for o in opened]
        self._tokenizer_folder = home / f"tokenizer-{_key([_FORMAT, config])}"
        self._folders = {}
        for o in opened:
            identity = [_FORMAT, o.identity(), config, data.row_length, data.heldout_max_bytes]
            self._folders[o.name] = home / f"{o.name}-{_key(identity)}"
        self._tokenizer: Tokenizer | None = None

    def find(self) -> tuple[Tokenizer, dict[str, Path]] | None:
        """What is there, when all of it is; None when something is missing or to be rebuilt.

        Raises:
          ConfigError: something is there and may not be used.
        """
        tokenizer = self._find_tokenizer()
        if tokenizer is None or not all(self._usable(o, tokenizer) for o in self._opened):
            return None
        return tokenizer, self._folders

    def _refused(self, check: Callable[[], Any]) -> Any:
        """What `check` returns; with data.rebuild, None in place of its ConfigError: a reason to build."""
        try:
            return check()
        except ConfigError:
            if not self._data.rebuild:
                raise
            return None

    def _find_tokenizer(self) -> Tokenizer | None:
        if not self._data.tokenizer.trained:
            if self._tokenizer is None:
                self._tokenizer = self._data.tokenizer.build(self._data.root, lambda max_bytes: iter(()))
            return self._tokenizer
        folder = self._tokenizer_folder
        return self._refused(lambda: self._open_tokenizer(folder)) if folder.exists() else None

    def _open_tokenizer(self, folder: Path) -> Tokenizer:
        manifest = _read_manifest(folder)
        for o in self._opened:
            _check_content(o, manifest["contents"][o.name], folder)
        path = folder / _TOKENIZER
        found = file_sha256(path) if path.is_file() else "no file"
        if found != manifest["tokenizer_file_sha256"]:
            raise ConfigError(
                f"tokenizer {path} must have sha256 {manifest['tokenizer_file_sha256'][:12]}, got {found[:12]}; {REBUILD}"
            )
        return self._data.tokenizer.load(path.read_text(encoding="utf-8"))

    def _usable(self, o: _Opened, tokenizer: Tokenizer) -> bool:
        folder = self._folders[o.name]
        return folder.exists() and self._refused(lambda: self._check_source(o, folder, tokenizer)) is not None

    def _check_source(self, o: _Opened, folder: Path, tokenizer: Tokenizer) -> bool:
        manifest = _read_manifest(folder)
        _check_content(o, manifest["content"], folder)
        if manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise ConfigError(
                f"a row table must be read with the tokenizer that made it, got tokenizer {tokenizer.sha256[:12]} for "
                f"{folder}, made with {manifest['tokenizer_sha256'][:12]}; {REBUILD}, or set run.workdir to another folder"
            )
        if self._data.rebuild:
            _verify_source(folder)  # damage inside a shard is a reason to ask for a rebuild
        for split in ("train", "heldout"):
            RowTable(folder / split)
        return True

    def build(self) -> tuple[Tokenizer, dict[str, Path]]:
        """Build what `find` does not find. The caller holds the lock."""
        tokenizer = self._find_tokenizer()
        with tempfile.TemporaryDirectory(
            prefix=_BUILDING, dir=self._home, ignore_cleanup_errors=True
        ) as scratch_name:
            scratch = Path(scratch_name)
            wanted = [o for o in self._opened if tokenizer is None or not self._usable(o, tokenizer)]
            read = {o.name: _read_source(o, scratch / f"read-{o.name}", self._progress) for o in wanted}
            if tokenizer is None:
                tokenizer = self._train_tokenizer(read, scratch)
                # A new tokenizer may be another: tables that were made with the old one are told apart by its hash.
                wanted = [o for o in wanted if not self._usable(o, tokenizer)]
            jobs = self._data.jobs.build(scratch / "jobs")
            for o in wanted:
                self._build_source(o, read[o.name], tokenizer, scratch, jobs)
        return tokenizer, self._folders

    def _train_tokenizer(self, read: Mapping[str, "_Read"], scratch: Path) -> Tokenizer:
        def texts(max_bytes: int) -> Iterator[str]:
            given, total = 0, min(max_bytes, sum(int(r.train.starts[-1]) for r in read.values()))
            for document in _in_common_order([r.train for r in read.values()]):
                for text in filter(None, (document.first, document.text)):
                    part = text.encode()[: max_bytes - given].decode(errors="ignore")
                    given += len(part.encode())
                    self._progress("read for the tokenizer", given, total)
                    yield part
                if given >= max_bytes - 3:  # a character has at most 4 bytes
                    return

        if not any(len(r.train) for r in read.values()):
            raise ConfigError(
                "data.tokenizer is trained on train documents, got none; lower data.heldout_percent"
            )
        tokenizer = self._data.tokenizer.build(self._data.root, texts)
        building = scratch / "tokenizer"
        building.mkdir()
        tokenizer.save(building / _TOKENIZER)
        contents = {name: r.content for name, r in read.items()}
        body = {
            "format": _FORMAT,
            "contents": contents,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_file_sha256": file_sha256(building / _TOKENIZER),
        }
        write_sealed(building / _MANIFEST, body)
        write_json_atomic(building / _FILES, {name: r.dates for name, r in read.items()})
        _move_into_place(building, self._tokenizer_folder)
        return tokenizer

    def _build_source(
        self, o: _Opened, read: "_Read", tokenizer: Tokenizer, scratch: Path, jobs: Jobs
    ) -> None:
        data, building = self._data, scratch / o.name
        building.mkdir()
        chosen, unused = _choose_heldout(
            read.heldout, data.heldout_max_bytes, scratch / f"heldout-{o.name}", data.table_seed
        )
        seconds = -time.monotonic()
        kept = {}
        for split, spool in (("train", read.train), ("heldout", chosen)):
            spec = TableSpec(
                name=o.name,
                split=split,
                tokenizer=tokenizer,
                row_length=data.row_length,
                on_overflow=o.config.on_overflow,
                seed=stable_seed("table", data.table_seed, o.name, split),
            )
            kept[split] = build_table(
                spool, building / split, scratch / f"tokens-{o.name}-{split}", spec, jobs, self._progress
            )
        seconds += time.monotonic()
        _write_documents(building / _HELDOUT, chosen.documents(kept["heldout"]))
        train, held = RowTable(building / "train"), RowTable(building / "heldout")
        body = {
            "format": _FORMAT,
            "content": read.content,
            "tokenizer_sha256": tokenizer.sha256,
            "heldout_sha256": file_sha256(building / _HELDOUT),
            "report": {
                **read.report,
                "unused_heldout_documents": unused,
                "train": _summary(train),
                "heldout": _summary(held),
                "build_seconds": round(seconds, 2),
            },
        }
        write_sealed(building / _MANIFEST, body)
        write_json_atomic(building / _FILES, {o.name: read.dates})
        _move_into_place(building, self._folders[o.name])
        self._progress(f"built {describe(o.name, body['report'])}", 0, 0)


def describe(name: str, report: Mapping[str, Any]) -> str:
    """The report of one source in a line; what was left out or changed is always in it."""
    train, held = report["train"], report["heldout"]
    parts = [
        f"{name}: {train['documents']:,} train documents, {train['target_tokens']:,} tokens "
        f"({train['bytes_per_token']:.2f} bytes a token), {train['rows']:,} rows ({train['fill_fraction']:.1%} full)",
        f"{held['documents']:,} held-out documents ({held['text_bytes']:,} bytes)",
    ]
    for count, what in (
        (report["unused_heldout_documents"], "held-out documents beyond data.heldout_max_bytes unused"),
        (report["bad_records"], "bad records left out"),
        (report["empty_documents"], "empty documents left out"),
        (train["repeated_ids"] + held["repeated_ids"], "documents with the id of another"),
        (
            train["cut_documents"] + held["cut_documents"],
            "documents longer than a row cut into overlapping pieces",
        ),
        (train["dropped_pairs"] + held["dropped_pairs"], "pairs longer than a row dropped"),
        (train["truncated_pairs"] + held["truncated_pairs"], "pairs longer than a row truncated"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return "; ".join(parts)


def _summary(table: RowTable) -> dict[str, Any]:
    manifest = table.manifest
    fields = ("documents", "pairs", "text_bytes", "repeated_ids", "rows", "fill_fraction")
    fields += tuple(
        field.name for field in dataclasses.fields(PackCounts) if field.name != "filled_positions"
    )
    summary = {field: manifest[field] for field in fields}
    return {**summary, "bytes_per_token": manifest["text_bytes"] / max(1, manifest["target_tokens"])}


# --- reading a source --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Read:
    """A source, read once: its spools, the content of its files, and what was wrong with it."""

    train: Spool
    heldout: Spool
    content: dict[str, Any]
    dates: dict[str, Any]
    report: dict[str, Any]


def _read_source(o: _Opened, folder: Path, progress: Progress) -> _Read:
    """Read all documents of a source into spools.

    Raises:
      ConfigError: malformed input, no documents, or the files changed while they were read.
    """
    folder.mkdir()
    percent, seed = o.data.heldout_percent_of(o.config), o.data.table_seed
    dates = _dates(o)
    content = {"identity": o.source.identity, "files": [[n, _size(p), file_hash(p)] for n, p in o.files()]}
    compressed = any(Path(name).suffix in (".gz", ".zst") for name, _ in o.files())
    total = 0 if compressed else sum(size for _, size, _ in content["files"])
    bad: list[BadRecord] = []
    num_bad = num_empty = done = 0
    with SpoolWriter(folder / "train", seed) as train, SpoolWriter(folder / "heldout", seed) as held:
        for document in o.source.documents():
            if isinstance(document, BadRecord):
                num_bad += 1
                bad += [document] if len(bad) < _SHOWN_BAD_RECORDS else []
            elif not document.text:
                num_empty += 1
            else:
                spool = held if heldout(document.id, percent, seed) else train
                done += spool.add(document)
                progress(f"read {o.name}", done, max(done, total) if total else 0)
    if _dates(o)["files"] != dates["files"]:
        raise ConfigError(
            f"the corpus data.sources.{o.name} must not change while it is read, it did; run again"
        )
    read = _Read(
        train=train.close(),
        heldout=held.close(),
        content=content,
        dates=dates,
        report={
            "bad_records": num_bad,
            "first_bad_records": [f"{b.where}: {b.reason}" for b in bad],
            "empty_documents": num_empty,
        },
    )
    if not len(read.train) + len(read.heldout):
        counted = f" ({num_bad} bad records, {num_empty} empty documents)" if num_bad + num_empty else ""
        raise ConfigError(
            f"the corpus data.sources.{o.name} must hold documents with text, got none{counted}; check its path and keys"
        )
    return read


def _in_common_order(spools: Sequence[Spool]) -> Iterator[TextDocument]:
    """The documents of all spools, in the order of their keys."""

    def keyed(number: int, spool: Spool) -> Iterator[tuple[int, int, TextDocument]]:
        order = spool.in_random_order()
        for key, document in zip(spool.order_key[order].tolist(), spool.documents(order), strict=True):
            yield key, number, document

    merged = heapq.merge(*(keyed(n, s) for n, s in enumerate(spools)), key=lambda item: item[:2])
    return (document for _, _, document in merged)


def _choose_heldout(spool: Spool, max_bytes: int, path: Path, seed: int) -> tuple[Spool, int]:
    """Documents in random order until `max_bytes`, the last one cut there; and how many are left out.

    A pair, and a document with parts that are only read, is taken whole or not at all.
    """
    left, taken = max_bytes, 0
    order = spool.in_random_order()
    with SpoolWriter(path, seed) as writer:
        for document in spool.documents(order):
            text = document.text.encode()
            if len(text) > left and (document.first, document.learned) != (None, None):
                break
            part = text[:left].decode(errors="ignore")  # drops the character that the cut halves
            if part:
                writer.add(dataclasses.replace(document, text=part))
                taken += 1
            left -= len(text)
            if left <= 0:
                break
        return writer.close(), len(order) - taken


def _write_documents(path: Path, documents: Iterable[TextDocument]) -> None:
    with open(path, "wb") as raw:
        # No name and no date inside: the same documents are the same bytes.
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
            for document in documents:
                values = {"id": document.id, "text": document.text}
                if document.first is not None:
                    values["first"] = document.first
                if document.learned is not None:
                    values["learned"] = document.learned
                file.write(json.dumps(values).encode() + b"\n")
        raw.flush()
        os.fsync(raw.fileno())


# --- has the corpus changed? -------------------------------------------------------------------------


def _size(path: Path) -> int:
    return _stat(path).st_size


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(f"a corpus file must be readable, got {path}: {error.strerror or error}") from error


def _dates(o: _Opened) -> dict[str, Any]:
    """What the file system says about the files, without reading them: equal means not changed (bar the racy)."""
    looked_ns = time.time_ns()
    files = {}
    for name, path in o.files():
        stat = _stat(path)
        files[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return {"looked_ns": looked_ns, "files": files}


def _check_content(o: _Opened, content: Mapping[str, Any], folder: Path) -> None:
    """Refuse what was built in `folder` when the files of the source are no longer what they were.

    Raises:
      ConfigError: names the first file that is new, gone or different.
    """
    now = _dates(o)
    known = _known_dates(folder).get(o.name, {"looked_ns": 0, "files": {}})
    built = {name: (size, sha256) for name, size, sha256 in content["files"]}
    paths = dict(o.files())
    what = None
    for name in sorted(built.keys() - paths.keys()):
        what = what or f"{name} is gone"
    for name in sorted(paths.keys() - built.keys()):
        what = what or f"{name} is new"
    hashed = False
    for name, path in paths.items():
        if what:
            break
        size, _, changed_ns = now["files"][name]
        same = known["files"].get(name) == now["files"][name] and changed_ns + _RACY_NS < known["looked_ns"]
        if not same:
            hashed = True
            if size != built[name][0] or file_hash(path) != built[name][1]:
                what = f"{name} has other content"
    if what:
        raise ConfigError(
            f"the corpus data.sources.{o.name} must not change after its rows were built, {what} ({folder}); {REBUILD}, "
            "or set run.workdir to another folder to keep both"
        )
    if hashed:
        # Only saves time at the next start, so a read-only folder is fine.
        with contextlib.suppress(ConfigError):
            write_json_atomic(folder / _FILES, {**_known_dates(folder), o.name: now})


def _known_dates(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _FILES).read_text())
    except (OSError, ValueError):
        return {}  # the contents decide then


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_sealed(folder / _MANIFEST, _FORMAT)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} must hold a {_MANIFEST}, it has none; {REBUILD}") from error


def _verify_source(folder: Path) -> None:
    manifest = _read_manifest(folder)
    path = folder / _HELDOUT
    found = file_sha256(path) if path.is_file() else "no file"
    if found != manifest["heldout_sha256"]:
        raise ConfigError(
            f"{path} must have sha256 {manifest['heldout_sha256'][:12]}, got {found[:12]}; {REBUILD}"
        )
    for split in ("train", "heldout"):
        RowTable(folder / split).verify()


# --- folders and locks -------------------------------------------------------------------------------

_BUILDING = ".building-"


def _move_into_place(building: Path, folder: Path) -> None:
    """Give a finished folder its name. What had it (a rebuild) steps aside first."""
    for path in (*building.rglob("*"), building):
        if path.is_dir():
            _sync(path)
    if folder.exists():
        folder.rename(building.with_name(f"old-{folder.name}"))  # goes with the scratch folder
    building.rename(folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _new_folders(home: Path) -> Iterator[None]:
    """Make `home`; when the block fails, remove again what was made and is empty."""
    missing = [p for p in (home, *home.parents) if not p.exists()]
    home.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty, or removed by another process
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked(home: Path, progress: Progress) -> Iterator[None]:
    """One builder at a time; the kernel frees the lock however the holder ends."""
    path = home / ".lock"
    while True:
        home.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # closed below
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"wait for the process that builds {home}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The holder before us removes the file: then ours is a lock on nothing.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        for leftover in home.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover)  # of a killed builder: we hold the lock
        yield
    finally:
        path.unlink()
        file.close()


# --- progress ----------------------------------------------------------------------------------------


class PrintedProgress:
    """Lines on standard output: each stage when it begins, then every few seconds."""

    def __init__(self, interval_s: float = 5.0, now: Callable[[], float] = time.monotonic):
        self._interval_s, self._now = interval_s, now
        self._stage, self._printed_s = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self._stage and self._now() - self._printed_s < self._interval_s:
            return
        amount = f" {100 * done // total}%" if total and stage == self._stage else ""
        print(f"data: {stage}{amount}", flush=True)
        self._stage, self._printed_s = stage, self._now()
