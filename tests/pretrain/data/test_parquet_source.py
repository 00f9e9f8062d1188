"""Parquet files as documents: needs the `[parquet]` extra."""

import dataclasses

import pytest

pyarrow = pytest.importorskip("pyarrow", reason="the [parquet] extra is not installed")

from pyarrow import parquet  # noqa: E402

from pretrain.config import ConfigError  # noqa: E402
from pretrain.data.parquet_source import ParquetConfig  # noqa: E402
from pretrain.data.source import BadRecord, TextDocument  # noqa: E402
from pretrain.data.tables import DataConfig, describe, prepare_tables  # noqa: E402
from pretrain.tokenizer import BytesConfig  # noqa: E402

pytestmark = pytest.mark.slow


def write(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)


def read(config, root):
    return list(config.build(str(root)).documents())


WEB = ParquetConfig(name="web", path="a.parquet")
COUNTED = dataclasses.replace(WEB, on_bad_record="count")


def test_rows_are_documents_and_one_without_an_id_is_named_by_file_and_row(tmp_path):
    """Over several row groups and batches; columns that nobody asked for are not looked at."""
    count = 2500
    texts = [f"text {i} é" for i in range(count)]
    ids = [None if i % 7 == 0 else i for i in range(count)]
    write(
        tmp_path / "a.parquet", {"other": list(range(count)), "id": ids, "text": texts}, row_group_size=1100
    )
    wanted = [
        TextDocument(f"a.parquet:{i + 1}" if i % 7 == 0 else str(i), text, "web")
        for i, text in enumerate(texts)
    ]
    assert read(WEB, tmp_path) == wanted


def test_a_glob_keys_and_pairs(tmp_path):
    for name in ("b", "a"):
        write(
            tmp_path / f"{name}.parquet", {"key": [name], "before": [f"{name} one"], "after": [f"{name} two"]}
        )
    config = ParquetConfig(name="qa", path="*.parquet", text_key="after", id_key="key", first_key="before")
    assert read(config, tmp_path) == [
        TextDocument("a", "a two", "qa", first="a one"),
        TextDocument("b", "b two", "qa", first="b one"),
    ]


def test_a_bad_row_is_an_error_with_file_and_row_or_is_counted(tmp_path):
    """A null, and bytes that Arrow calls text and are not."""
    lengths = pyarrow.py_buffer(memoryview(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])))
    data = pyarrow.py_buffer(b"x\xffz")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, lengths, data])
    for column, reason in (
        (["x", None, "z"], "field 'text' must be text, got NoneType"),
        (broken, "byte 0xff"),
    ):
        write(tmp_path / "a.parquet", {"text": column})
        with pytest.raises(ConfigError, match=rf"a.parquet:2: .*{reason}.*on_bad_record=count"):
            read(WEB, tmp_path)
        x, bad, z = read(COUNTED, tmp_path)
        assert (x.text, z.text) == ("x", "z")
        assert bad.where == f"{tmp_path / 'a.parquet'}:2"


def test_a_missing_column_is_named_beside_all_that_are_there(tmp_path):
    write(tmp_path / "a.parquet", {"id": ["1", "2"], "txt": ["a", "b"], "url": ["u", "v"]})
    with pytest.raises(
        ConfigError, match=r"a.parquet:1: the file has no column 'text'; it has: id, txt, url"
    ):
        read(WEB, tmp_path)
    found = read(COUNTED, tmp_path)
    assert [bad.where for bad in found] == [f"{tmp_path / 'a.parquet'}:{row}" for row in (1, 2)]
    pairs = dataclasses.replace(WEB, text_key="txt", first_key="before")
    with pytest.raises(ConfigError, match="has no column 'before'; it has: id, txt, url"):
        read(pairs, tmp_path)


@pytest.mark.parametrize("checksum", [False, True])
def test_a_damaged_row_group_costs_its_rows_and_no_other(tmp_path, checksum):
    """Compressed pages show damage by themselves; plain numbers and texts only by their checksum."""
    count, group = 5000, 500
    texts = [f"text {i} " * 20 for i in range(count)]
    path = tmp_path / "a.parquet"
    options = (
        {"compression": "none", "use_dictionary": False, "write_page_checksum": True} if checksum else {}
    )
    write(path, {"text": texts}, row_group_size=group, **options)
    column = parquet.ParquetFile(path).metadata.row_group(4).column(0)
    middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    damaged = bytearray(path.read_bytes())
    damaged[middle : middle + 40] = b"\xa5" * 40
    path.write_bytes(damaged)

    found = read(COUNTED, tmp_path)
    assert len(found) == count  # a result for every row
    bad = [i for i, result in enumerate(found) if isinstance(result, BadRecord)]
    assert bad
    assert set(bad) <= set(range(4 * group, 5 * group))
    assert bad == list(range(bad[0], 5 * group))
    assert all(found[i].text == texts[i] for i in range(count) if i not in bad)
    assert found[bad[0]].where == f"{path}:{bad[0] + 1}"
    with pytest.raises(
        ConfigError, match=rf"a.parquet:{bad[0] + 1}: row group 5 of 10 cannot be read from here on"
    ):
        read(WEB, tmp_path)

    data = DataConfig(
        sources=(COUNTED,), tokenizer=BytesConfig(), row_length=64, batch_rows=2, heldout_percent=10.0,
        root=str(tmp_path),
    )  # fmt: skip
    report = prepare_tables(data, tmp_path / "w", 0, lambda *args: None).report["web"]
    assert report["bad_records"] == len(bad)
    assert report["train"]["documents"] + report["heldout"]["documents"] == count - len(bad)
    assert f"{len(bad)} bad records left out" in describe("web", report)


@pytest.mark.parametrize("damage", ["empty", "cut", "something else"])
def test_a_file_that_is_no_parquet_is_refused_or_counted(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write(path, {"text": ["a"]})
    path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-20], "something else": b"x" * 99}[damage])
    with pytest.raises(ConfigError, match=r"a.parquet: not a readable Parquet file"):
        read(WEB, tmp_path)
    (bad,) = read(COUNTED, tmp_path)
    assert bad.where == str(path)
    with pytest.raises(ConfigError, match=r"data.sources.web.path must name a corpus file, got 'b.parquet'"):
        dataclasses.replace(WEB, path="b.parquet").build(str(tmp_path))
