"""Documents to packed rows: no token is lost, and nothing crosses from one document to another.

A document is BOS + tokens + EOS, cut where it is longer than a row into pieces that overlap by one token, so that
every token but BOS is a target exactly once. A pair is BOS + first + separator + second + EOS in one segment,
never cut, with weight on the second and EOS only. A token of a document that is only read has no weight. Pieces are packed first-fit-decreasing inside windows of
documents (close to no padding, documents stay whole: arXiv 2404.10830, there best fit); the rows of a window are
then shuffled, so a prefix of a table is a random sample, and the prefixes nest.

Letters: T targets in a row, T1 = T + 1 positions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

WINDOW_DOCUMENTS = 65_536
GIVEN = 1 << 31  # set in the id of a token that is read and not learned

Overflow = Literal["error", "drop", "truncate"]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One packed row of T + 1 positions."""

    tokens: np.ndarray  # [T1] int32
    segment_ids: np.ndarray  # [T1] int32; 1, 2, .. per piece, 0 on padding
    positions: np.ndarray  # [T1] int32; restart in every piece
    weights: np.ndarray  # [T] float32; of target t + 1: 0 on padding and where a piece begins


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive tokens of one segment; the targets from index `first_target` on are learned, but those `given`."""

    tokens: np.ndarray
    first_target: int = 1
    given: np.ndarray | None = None  # bool, a token each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specials:
    """The ids that packing inserts."""

    bos: int
    eos: int
    pad: int
    sep: int


class Overflowed(ValueError):
    """A pair does not fit a row: its length in tokens with specials."""

    def __init__(self, length: int):
        self.length = length
        super().__init__(f"a pair of {length} tokens does not fit a row")


def document_pieces(ids: np.ndarray, row_length: int, specials: Specials) -> list[Piece]:
    """BOS + ids + EOS in pieces of at most T + 1 tokens; each begins with the last token of the one before."""
    marked = np.concatenate([[specials.bos], ids, [specials.eos]]).astype(np.uint32)
    tokens, given = (marked & ~np.uint32(GIVEN)).astype(np.int32), marked >= GIVEN
    cuts = [slice(start, start + row_length + 1) for start in range(0, len(tokens) - 1, row_length)]
    return [Piece(tokens[cut], given=given[cut] if given[cut].any() else None) for cut in cuts]


def pair_fits(
    first_length: "int | np.ndarray",
    second_length: "int | np.ndarray",
    row_length: int,
    on_overflow: Overflow,
) -> "bool | np.ndarray":
    """Whether a pair of these lengths is kept: it fits a row, or it does when its first text loses its start."""
    least = second_length if on_overflow == "truncate" else first_length + second_length
    return least + 3 <= row_length + 1


def pair_piece(
    first: np.ndarray, second: np.ndarray, row_length: int, specials: Specials, on_overflow: Overflow
) -> Piece | None:
    """BOS + first + separator + second + EOS, or None when it is dropped.

    With `on_overflow="truncate"` the first text loses its start; a second text that does not fit alone is dropped.

    Raises:
      Overflowed: the pair is longer than a row and `on_overflow` is "error".
    """
    length = len(first) + len(second) + 3
    excess = length - (row_length + 1)
    if excess > 0:
        if on_overflow == "error":
            raise Overflowed(length)
        if not pair_fits(len(first), len(second), row_length, on_overflow):
            return None
        first = first[excess:]
    tokens = np.concatenate([[specials.bos], first, [specials.sep], second, [specials.eos]]).astype(np.int32)
    return Piece(tokens, first_target=len(first) + 2)


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `sizes`: longest first, each into the first bin with room. Sizes are 1 to `capacity`.

    The first bin with room is found in a tree of maxima, so the time is n log n.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])  # stable: a function of the sizes alone
    bins: list[list[int]] = []
    leaves = 1
    while leaves < len(sizes):
        leaves *= 2
    room = [capacity] * (2 * leaves)  # heap order; a leaf is a bin, an inner node the larger of its children
    for i in order:
        size = sizes[i]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(i)
        room[node] -= size
        node //= 2
        while node:
            left, right = room[2 * node], room[2 * node + 1]
            best = left if left > right else right
            if room[node] == best:
                break
            room[node] = best
            node //= 2
    return bins


def pack_window(pieces: Sequence[Piece], *, row_length: int, pad_id: int, seed: int) -> Iterator[Row]:
    """The rows of one window in an order that `seed` decides."""
    bins = first_fit_decreasing([len(piece.tokens) for piece in pieces], row_length + 1)
    for i in seeded_order(len(bins), seed):
        yield _row([pieces[j] for j in bins[i]], row_length, pad_id)


def _row(pieces: Sequence[Piece], row_length: int, pad_id: int) -> Row:
    tokens = np.full(row_length + 1, pad_id, np.int32)
    segment_ids = np.zeros(row_length + 1, np.int32)
    positions = np.zeros(row_length + 1, np.int32)
    weights = np.zeros(row_length, np.float32)
    start = 0
    for segment, piece in enumerate(pieces, 1):
        end = start + len(piece.tokens)
        tokens[start:end] = piece.tokens
        segment_ids[start:end] = segment
        positions[start:end] = np.arange(end - start)
        weights[start + piece.first_target - 1 : end - 1] = 1.0
        if piece.given is not None:
            weights[start : end - 1][piece.given[1:]] = 0.0
        start = end
    return Row(tokens, segment_ids, positions, weights)


def seeded_order(count: int, seed: int) -> np.ndarray:
    """A permutation of range(count). From the raw stream of Philox, which numpy keeps the same for ever."""
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


def windows(num_documents: int, window_documents: int = WINDOW_DOCUMENTS) -> Iterator[slice]:
    """Slices of the permuted documents. A window depends on its own documents only, so tables of prefixes nest."""
    for start in range(0, num_documents, window_documents):
        yield slice(start, min(start + window_documents, num_documents))
