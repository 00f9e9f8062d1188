"""Row tables: what is written comes back, and damage of any kind is named."""

import dataclasses
import json

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data.pack import Row
from pretrain.data.rows import (
    RowFormat,
    RowTable,
    empty_rows,
    read_sealed,
    write_sealed,
    write_shard,
    write_table_manifest,
)


def make_rows(count, row_length, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Row(
            tokens=rng.integers(0, vocab_size, row_length + 1, np.int32),
            segment_ids=np.sort(rng.integers(0, 5, row_length + 1)).astype(np.int32),
            positions=rng.integers(0, row_length + 1, row_length + 1, np.int32),
            weights=rng.integers(0, 2, row_length).astype(np.float32),
        )
        for _ in range(count)
    ]


def write_table(folder, shards, row_format):
    written = [
        write_shard(folder / f"{i:05d}.array_record", rows, row_format) for i, rows in enumerate(shards)
    ]
    write_table_manifest(folder, written, row_format, {"target_tokens": 7})
    return written


@pytest.mark.parametrize("vocab_size", [260, 1 << 16, 150_000])
@pytest.mark.parametrize("row_length", [2, 63, 70_000])
def test_rows_come_back(tmp_path, vocab_size, row_length):
    shards = [make_rows(3, row_length, vocab_size, 1), make_rows(2, row_length, vocab_size, 2)]
    write_table(tmp_path, shards, RowFormat(row_length=row_length, vocab_size=vocab_size))
    table = RowTable(tmp_path)
    assert len(table) == 5
    order = [4, 0, 2, 3, 1]
    rows = table.read(order, source=3)
    expected = [row for shard in shards for row in shard]
    for index, number in enumerate(order):
        np.testing.assert_array_equal(rows.tokens_BT1[index], expected[number].tokens)
        np.testing.assert_array_equal(rows.segment_ids_BT1[index], expected[number].segment_ids)
        np.testing.assert_array_equal(rows.positions_BT1[index], expected[number].positions)
        np.testing.assert_array_equal(rows.weights_BT[index], expected[number].weights)
    assert rows.source_B.tolist() == [3] * 5
    assert {f.name: getattr(rows, f.name).dtype.name for f in dataclasses.fields(rows)} == {
        "tokens_BT1": "int32",
        "segment_ids_BT1": "int32",
        "positions_BT1": "int32",
        "weights_BT": "float32",
        "source_B": "int32",
    }


def test_the_same_rows_are_the_same_bytes(tmp_path):
    row_format = RowFormat(row_length=16, vocab_size=300)
    shards = [write_shard(tmp_path / f"{i}", make_rows(9, 16, 300), row_format) for i in range(2)]
    assert shards[0].sha256 == shards[1].sha256
    assert shards[0].rows_sha256 == shards[1].rows_sha256


def test_an_empty_table_has_no_rows(tmp_path):
    write_table(tmp_path, [], RowFormat(row_length=4, vocab_size=10))
    assert len(RowTable(tmp_path)) == 0
    assert RowTable(tmp_path).read([]).tokens_BT1.shape == (0, 5)


@pytest.fixture
def table_folder(tmp_path):
    write_table(tmp_path, [make_rows(40, 32, 300)], RowFormat(row_length=32, vocab_size=300))
    return tmp_path


def test_a_flipped_bit_is_noticed_by_the_read_or_by_verify(table_folder):
    path = table_folder / "00000.array_record"
    whole = path.read_bytes()
    expected = RowTable(table_folder).read(range(40))
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="must have sha256"):
            RowTable(table_folder).verify()
        refusal = ""
        try:
            rows = RowTable(table_folder).read(range(40))
        except ConfigError as error:
            refusal = str(error)
        if refusal:
            assert "damaged" in refusal
            assert "data.rebuild=true" in refusal
        else:
            np.testing.assert_array_equal(rows.tokens_BT1, expected.tokens_BT1)  # a byte that no row needs
            np.testing.assert_array_equal(rows.weights_BT, expected.weights_BT)


def test_a_missing_or_truncated_shard_is_named(table_folder):
    path = table_folder / "00000.array_record"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(
        ConfigError, match=rf"00000.array_record must have {len(data)} bytes, it has {len(data) - 10}"
    ):
        RowTable(table_folder)
    path.unlink()
    with pytest.raises(ConfigError, match="it is missing"):
        RowTable(table_folder)


def test_a_changed_manifest_is_noticed(table_folder):
    path = table_folder / "manifest.json"
    body = json.loads(path.read_text())
    body["vocab_size"] = 70_000
    path.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="must be as it was written"):
        RowTable(table_folder)
    path.write_text("{")
    with pytest.raises(ConfigError, match="must be the manifest of a finished table"):
        RowTable(table_folder)
    path.unlink()
    with pytest.raises(ConfigError, match="has none"):
        RowTable(table_folder)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    write_sealed(tmp_path / "m.json", {"format": 99})
    with pytest.raises(ConfigError, match="must be of format 1, got 99"):
        read_sealed(tmp_path / "m.json")


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    rows = make_rows(3, 8, 300)
    rows[1].tokens[4] = 300
    write_table(tmp_path, [rows], RowFormat(row_length=8, vocab_size=300))
    table = RowTable(tmp_path)
    table.read([0, 2])
    with pytest.raises(ConfigError, match="row 1 of table .* holds token 300, the vocabulary ends at 300"):
        table.read([1])


def test_a_record_of_another_length_is_named(tmp_path):
    shard = write_shard(
        tmp_path / "00000.array_record", make_rows(2, 8, 300), RowFormat(row_length=8, vocab_size=300)
    )
    write_table_manifest(tmp_path, [shard], RowFormat(row_length=9, vocab_size=300), {})
    with pytest.raises(ConfigError, match="row 0 of table .* is damaged: it has 70 bytes, a row has 78"):
        RowTable(tmp_path).read([0])


def test_empty_rows_teach_nothing():
    rows = empty_rows(2, 4, pad_id=9)
    assert (rows.tokens_BT1 == 9).all()
    assert not rows.segment_ids_BT1.any()
    assert not rows.weights_BT.any()
