"""Spooled documents to a row table, in two rounds of jobs: encode chunks of documents, pack windows of them.

How the work is cut into jobs changes no byte of the result: the tokens of a document depend on nothing else, and a
shard is a window of the seeded order, packed by one job.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pretrain.config import ConfigError, stable_seed
from pretrain.data.pack import (
    GIVEN,
    WINDOW_DOCUMENTS,
    Overflow,
    Piece,
    Row,
    Specials,
    document_pieces,
    pack_window,
    pair_fits,
    pair_piece,
    windows,
)
from pretrain.data.rows import RowFormat, Shard, write_shard, write_table_manifest
from pretrain.data.spool import Spool
from pretrain.jobs.api import Job, Jobs, Outcome, values
from pretrain.jobs.call import invoke
from pretrain.tokenizer import Tokenizer

# (stage, done, total); total 0 means unknown.
Progress = Callable[[str, int, int], None]

_CHUNK_BYTES = 1 << 23
# Below this a new interpreter costs more than it saves.
_WORTH_A_PROCESS_BYTES = 1 << 20


class Here:
    """Runs jobs in this process: small corpora."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        return map(invoke, jobs)


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A runner that reports how many jobs have ended."""

    runner: Jobs
    progress: Progress
    stage: str
    total: int

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for done, outcome in enumerate(self.runner.run(jobs), 1):
            self.progress(self.stage, done, self.total)
            yield outcome


@dataclasses.dataclass(frozen=True, eq=False)
class _Tokens:
    """Where the tokens of each document lie: which file, from which token on, how many."""

    files: tuple[Path, ...]
    file: np.ndarray
    start: np.ndarray
    first_length: np.ndarray  # of a pair; -1 where there is none
    length: np.ndarray  # the first of a pair included

    def take(self, indices: np.ndarray) -> "_Tokens":
        """The same documents in another order."""
        return _Tokens(
            self.files,
            self.file[indices],
            self.start[indices],
            self.first_length[indices],
            self.length[indices],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackCounts:
    """What packing did to documents; counts add."""

    target_tokens: int = 0
    filled_positions: int = 0
    cut_documents: int = 0
    dropped_pairs: int = 0
    truncated_pairs: int = 0

    def __add__(self, other: "PackCounts") -> "PackCounts":
        return PackCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What decides the rows of a table, beside its documents."""

    name: str
    split: str
    tokenizer: Tokenizer
    row_length: int
    on_overflow: Overflow
    seed: int
    window_documents: int = WINDOW_DOCUMENTS

    @property
    def specials(self) -> Specials:
        t = self.tokenizer
        return Specials(bos=t.bos_id, eos=t.eos_id, pad=t.pad_id, sep=t.sep_id)

    @property
    def row_format(self) -> RowFormat:
        return RowFormat(row_length=self.row_length, vocab_size=self.tokenizer.vocab_size)


def build_table(
    spool: Spool, folder: Path, scratch: Path, spec: TableSpec, jobs: Jobs, progress: Progress
) -> np.ndarray:
    """Write the table of `spool` into `folder`, which must not exist; `scratch` takes token files.

    Returns the numbers of the documents that are in it: all but dropped pairs.

    Raises:
      ConfigError: a pair is longer than a row and the source does not say what to do with it.
      JobsFailed: a job failed, for instance because the disk is full.
    """
    folder.mkdir()
    scratch.mkdir()
    here = spool.starts[-1] < _WORTH_A_PROCESS_BYTES
    runner = Here() if here else jobs
    label = f"{spec.name} ({spec.split})"
    tokens = _encode(spool, scratch, spec, _Shown(runner, progress, f"encode {label}", 0), here)
    _check_pairs(tokens, spool, spec)
    first_length = np.maximum(tokens.first_length, 0)
    fits = pair_fits(first_length, tokens.length - first_length, spec.row_length, spec.on_overflow)
    kept = np.flatnonzero((tokens.first_length < 0) | fits)
    ordered = tokens.take(spool.in_random_order())
    cuts = list(windows(len(spool), spec.window_documents))
    packing = [
        Job(
            name=f"pack-{spec.name}-{spec.split}-{number:05d}",
            function=pack_shard,
            arguments=(
                ordered.take(np.arange(cut.start, cut.stop)),
                folder / f"{number:05d}.array_record",
                spec,
                number,
            ),
        )
        for number, cut in enumerate(cuts)
    ]
    packed: list[tuple[Shard, PackCounts]] = values(
        _Shown(runner, progress, f"pack {label}", len(packing)), packing
    )
    shards = [shard for shard, _ in packed]
    counts = sum((c for _, c in packed), PackCounts())
    positions = sum(shard.rows for shard in shards) * (spec.row_length + 1)
    pairs = spool.first_bytes >= 0
    facts = {
        "source": spec.name,
        "split": spec.split,
        "tokenizer_sha256": spec.tokenizer.sha256,
        "specials": dataclasses.asdict(spec.specials),
        "seed": spec.seed,
        "documents": len(spool),
        "documents_sha256": spool.sha256,
        "pairs": int(pairs.sum()),
        "text_bytes": int(spool.learned_bytes[kept].sum()),
        "fill_fraction": counts.filled_positions / positions if positions else 0.0,
        "repeated_ids": len(spool) - len(np.unique(spool.order_key)),
        **dataclasses.asdict(counts),
    }
    write_table_manifest(folder, shards, spec.row_format, facts)
    return kept


# --- encode ------------------------------------------------------------------------------------------


def _encode(spool: Spool, scratch: Path, spec: TableSpec, runner: _Shown, here: bool) -> _Tokens:
    cuts = [0, len(spool)] if here else _even_cuts(spool.starts)
    jobs = [
        Job(
            name=f"encode-{spec.name}-{spec.split}-{number:05d}",
            function=encode_chunk,
            arguments=(spool.part(start, stop), spec.tokenizer, scratch / f"{number:05d}.tokens"),
        )
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    results = values(dataclasses.replace(runner, total=len(jobs)), jobs)
    lengths = [length for _, length in results]
    return _Tokens(
        files=tuple(scratch / f"{number:05d}.tokens" for number in range(len(jobs))),
        file=np.concatenate([np.full(len(length), number) for number, length in enumerate(lengths)]),
        start=np.concatenate([np.cumsum(length) - length for length in lengths]),
        first_length=np.concatenate([first for first, _ in results]),
        length=np.concatenate(lengths),
    )


def _even_cuts(starts: np.ndarray) -> list[int]:
    """Document numbers that cut the spool into chunks of like size, a multiple of the CPUs in number."""
    cpus = os.cpu_count() or 1
    count = -(-int(starts[-1]) // _CHUNK_BYTES)
    count = -(-count // cpus) * cpus
    inner = np.searchsorted(starts, [starts[-1] * i // count for i in range(1, count)])
    return sorted({0, *inner.tolist(), len(starts) - 1})


def encode_chunk(spool: Spool, tokenizer: Tokenizer, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents into a file of uint32 tokens, those that are only read with `GIVEN`; returns the lengths
    (first text, whole) of each."""
    first_lengths = np.full(len(spool), -1, np.int64)
    lengths = np.zeros(len(spool), np.int64)
    with open(path, "wb") as file:
        for i, document in enumerate(spool.documents()):
            ids = [
                token if learned else token | GIVEN
                for part, learned in document.parts()
                for token in tokenizer.encode(part)
            ]
            if document.first is not None:
                first = tokenizer.encode(document.first)
                first_lengths[i] = len(first)
                ids = first + ids
            lengths[i] = len(ids)
            file.write(np.array(ids, np.uint32).tobytes())
    return first_lengths, lengths


# --- pack --------------------------------------------------------------------------------------------


def _check_pairs(tokens: _Tokens, spool: Spool, spec: TableSpec) -> None:
    """Refuse pairs that do not fit, unless the source says what to do with them."""
    too_long = np.flatnonzero((tokens.first_length >= 0) & (tokens.length + 3 > spec.row_length + 1))
    if spec.on_overflow == "error" and len(too_long):
        longest = int(too_long[np.argmax(tokens.length[too_long])])
        document = next(spool.documents([longest]))
        raise ConfigError(
            f"a pair of data.sources.{spec.name} must fit a row, data.row_length={spec.row_length}: {len(too_long)} do not, "
            f"the longest, {document.id!r}, has {tokens.length[longest] + 3} tokens; raise data.row_length, or set "
            f"data.sources.{spec.name}.on_overflow to truncate (the first text loses its start) or drop"
        )


def pack_shard(tokens: _Tokens, path: Path, spec: TableSpec, number: int) -> tuple[Shard, PackCounts]:
    """Pack the documents of one window into one shard."""
    files = [
        np.memmap(f, np.uint32, "r") if f.stat().st_size else np.zeros(0, np.uint32) for f in tokens.files
    ]
    pieces: list[Piece] = []
    cut = dropped = truncated = 0
    for file, start, first_length, length in zip(
        tokens.file, tokens.start, tokens.first_length, tokens.length, strict=True
    ):
        ids = files[file][start : start + length]
        if first_length < 0:
            found: Sequence[Piece] = document_pieces(ids, spec.row_length, spec.specials)
            cut += len(found) > 1
        else:
            pair = pair_piece(
                ids[:first_length], ids[first_length:], spec.row_length, spec.specials, spec.on_overflow
            )
            dropped += pair is None
            truncated += pair is not None and len(pair.tokens) < length + 3
            found = [] if pair is None else [pair]
        pieces += found
    seed = stable_seed("window", spec.seed, number)
    counter = _Counter(
        pack_window(pieces, row_length=spec.row_length, pad_id=spec.tokenizer.pad_id, seed=seed)
    )
    shard = write_shard(path, counter, spec.row_format)
    return shard, PackCounts(
        target_tokens=counter.target_tokens,
        filled_positions=counter.filled_positions,
        cut_documents=cut,
        dropped_pairs=dropped,
        truncated_pairs=int(truncated),
    )


class _Counter:
    """Passes rows on and counts what is in them."""

    def __init__(self, rows: Iterable[Row]):
        self._rows = rows
        self.target_tokens = self.filled_positions = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.target_tokens += int(np.count_nonzero(row.weights))
            self.filled_positions += int(np.count_nonzero(row.segment_ids))
            yield row
