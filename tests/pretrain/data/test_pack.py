"""Packing: every token a target once, nothing shared between segments, prefixes nest, pairs stay whole."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pretrain.data.pack import (
    Overflowed,
    Specials,
    document_pieces,
    first_fit_decreasing,
    pack_window,
    pair_piece,
    windows,
)

SPECIALS = Specials(bos=1000, eos=1001, pad=1002, sep=1003)

documents = st.lists(st.lists(st.integers(0, 50), max_size=40), max_size=30)
row_lengths = st.integers(2, 24)


def pack(pieces, row_length, seed=0):
    return list(pack_window(pieces, row_length=row_length, pad_id=SPECIALS.pad, seed=seed))


def pieces_of(docs, row_length):
    return [p for d in docs for p in document_pieces(np.array(d, np.int64), row_length, SPECIALS)]


def segments(row):
    """(tokens, positions, weights of the targets inside) of each segment of a row."""
    for segment in range(1, row.segment_ids.max(initial=0) + 1):
        (at,) = np.nonzero(row.segment_ids == segment)
        assert (np.diff(at) == 1).all(), "a segment must be contiguous"
        yield row.tokens[at], row.positions[at], row.weights[at[:-1]]


@hypothesis.given(docs=documents, row_length=row_lengths, seed=st.integers(0, 9))
def test_every_token_but_bos_is_a_target_exactly_once(docs, row_length, seed):
    targets = collections.Counter()
    for row in pack(pieces_of(docs, row_length), row_length, seed):
        targets.update(row.tokens[1:][row.weights > 0].tolist())
        assert set(row.weights.tolist()) <= {0.0, 1.0}
    expected = collections.Counter(t for d in docs for t in d)
    expected[SPECIALS.eos] += len(docs)
    assert targets == +expected


@hypothesis.given(docs=documents, row_length=row_lengths)
def test_a_row_is_its_pieces_apart(docs, row_length):
    packed = collections.Counter()
    for row in pack(pieces_of(docs, row_length), row_length):
        for tokens, positions, weights in segments(row):
            packed[tuple(tokens.tolist())] += 1
            assert positions.tolist() == list(range(len(tokens)))
            assert (weights == 1).all()
        boundary = row.segment_ids[1:] != row.segment_ids[:-1]
        assert (row.weights[boundary] == 0).all(), "no target opens a segment"
        padding = row.segment_ids == 0
        assert (row.tokens[padding] == SPECIALS.pad).all()
        assert (row.positions[padding] == 0).all()
        assert (row.weights[padding[1:]] == 0).all()
    assert packed == collections.Counter(tuple(p.tokens.tolist()) for p in pieces_of(docs, row_length))


@hypothesis.given(doc=st.lists(st.integers(0, 50), max_size=90), row_length=row_lengths)
def test_pieces_of_a_long_document_overlap_by_one_token(doc, row_length):
    pieces = [p.tokens.tolist() for p in document_pieces(np.array(doc, np.int64), row_length, SPECIALS)]
    whole = pieces[0] + [t for p in pieces[1:] for t in p[1:]]
    assert whole == [SPECIALS.bos, *doc, SPECIALS.eos]
    assert all(a[-1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(2 <= len(p) <= row_length + 1 for p in pieces)


@hypothesis.given(sizes=st.lists(st.integers(1, 20), max_size=80))
def test_first_fit_decreasing_equals_its_definition(sizes):
    bins = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for members in bins:
            if sum(sizes[j] for j in members) + sizes[i] <= 20:
                members.append(i)
                break
        else:
            bins.append([i])
    assert first_fit_decreasing(sizes, 20) == bins


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 50, size) for size in rng.geometric(1 / 60, 2000)]
    rows = pack(pieces_of(docs, 128), 128)
    assert np.mean([np.count_nonzero(r.segment_ids) / 129 for r in rows]) > 0.99


@hypothesis.given(docs=documents, seed=st.integers(0, 99))
def test_rows_are_shuffled_by_seed_and_nothing_else(docs, seed):
    first, again, other = (pack(pieces_of(docs, 8), 8, s) for s in (seed, seed, seed + 1))
    as_bytes = [
        [r.tokens.tobytes() + r.segment_ids.tobytes() for r in rows] for rows in (first, again, other)
    ]
    assert as_bytes[0] == as_bytes[1]
    assert sorted(as_bytes[0]) == sorted(as_bytes[2])


@hypothesis.given(count=st.integers(0, 200), window=st.integers(1, 60))
def test_windows_partition_the_documents_and_prefixes_nest(count, window):
    cuts = list(windows(count, window))
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(count))
    for prefix in range(0, count, window):
        assert list(windows(prefix, window)) == cuts[: prefix // window]


# --- pairs -------------------------------------------------------------------------------------------

texts = st.lists(st.integers(0, 50), max_size=12)


@hypothesis.given(first=texts, second=texts.filter(bool))
def test_a_pair_is_learned_from_its_second_text_on(first, second):
    piece = pair_piece(np.array(first, int), np.array(second, int), 30, SPECIALS, "error")
    assert piece.tokens.tolist() == [SPECIALS.bos, *first, SPECIALS.sep, *second, SPECIALS.eos]
    (row,) = pack([piece], 30)
    assert row.tokens[1:][row.weights > 0].tolist() == [*second, SPECIALS.eos]
    assert row.segment_ids[: len(piece.tokens)].tolist() == [1] * len(piece.tokens)


@hypothesis.given(pairs=st.lists(st.tuples(texts, texts.filter(bool)), max_size=12))
def test_pairs_are_packed_with_each_other_and_never_cut(pairs):
    pieces = [pair_piece(np.array(a, int), np.array(b, int), 30, SPECIALS, "error") for a, b in pairs]
    rows = pack(pieces, 30)
    packed = collections.Counter(tuple(tokens.tolist()) for row in rows for tokens, _, _ in segments(row))
    assert packed == collections.Counter(tuple(p.tokens.tolist()) for p in pieces)


@pytest.mark.parametrize(("num_first", "num_second"), [(20, 5), (1, 30), (0, 40), (9, 8)])
def test_a_pair_longer_than_a_row(num_first, num_second):
    first, second, row_length = np.arange(num_first), np.arange(100, 100 + num_second), 15
    with pytest.raises(Overflowed, match=f"{num_first + num_second + 3} tokens"):
        pair_piece(first, second, row_length, SPECIALS, "error")
    assert pair_piece(first, second, row_length, SPECIALS, "drop") is None
    truncated = pair_piece(first, second, row_length, SPECIALS, "truncate")
    if num_second + 3 > row_length + 1:
        assert truncated is None, "a second text that does not fit alone is dropped"
    else:
        kept = row_length + 1 - 3 - num_second
        assert truncated.tokens.tolist() == [1000, *first[num_first - kept :], 1003, *second, 1001]
        assert truncated.first_target == kept + 2
