"""Sources: documents of every kind of file, and bad input named by file and line."""

import dataclasses
import gzip
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import zstandard
from array_record.python import array_record_module

from pretrain.config import ConfigError
from pretrain.data.source import (
    ArrayRecordConfig,
    BadRecord,
    FolderConfig,
    JsonlConfig,
    MemoryConfig,
    StdlibConfig,
    TextDocument,
    TextFileConfig,
    heldout,
)

LINES = [{"id": f"d{i}", "text": f"text {i} é\n"} for i in range(5)]


def write_lines(path, lines):
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data[:40]) + zstandard.compress(data[40:])  # two frames, as appending makes
    path.write_bytes(data)


def read(config, root):
    return list(config.build(str(root)).documents())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_are_documents(tmp_path, name):
    write_lines(tmp_path / name, LINES)
    found = read(JsonlConfig(name="web", path=name), tmp_path)
    assert found == [TextDocument(line["id"], line["text"], "web") for line in LINES]


def test_a_glob_reads_files_in_the_order_of_their_names(tmp_path):
    for i in (2, 0, 1):
        write_lines(tmp_path / f"part{i}.jsonl", [LINES[i]])
    config = JsonlConfig(name="web", path="part*.jsonl")
    assert [d.id for d in read(config, tmp_path)] == ["d0", "d1", "d2"]
    absolute = dataclasses.replace(config, path=str(tmp_path / "part*.jsonl"))
    assert read(absolute, "") == read(config, tmp_path)


def test_keys_are_chosen_and_a_record_without_id_is_named_by_its_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"body": "x"}, {"body": "y", "key": 7}])
    found = read(JsonlConfig(name="web", path="a.jsonl", text_key="body", id_key="key"), tmp_path)
    assert [(d.id, d.text) for d in found] == [("a.jsonl:1", "x"), ("7", "y")]


def test_pairs_have_a_first_text(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"id": "p", "before": "one", "text": "two"}])
    (found,) = read(JsonlConfig(name="web", path="a.jsonl", first_key="before"), tmp_path)
    assert found == TextDocument("p", "two", "web", first="one")


def test_blank_lines_and_a_missing_last_line_end_are_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n  \n{"text": "y"}')
    assert [d.text for d in read(JsonlConfig(name="web", path="a.jsonl"), tmp_path)] == ["x", "y"]


BAD_LINES = [
    (b'{"text": "x"', "malformed JSON at column 13"),
    (b"[1]", "a record must be an object, got list"),
    (b'{"txt": "x"}', "the record has no field 'text'; it has: txt"),
    (b'{"text": null}', "field 'text' must be text, got NoneType"),
    (b'{"text": "\xff"}', r"invalid UTF-8 at byte 10 \(0xff\)"),
    (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
    (b"[" * 100_000, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_an_error_with_file_and_line_or_is_counted(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    strict = JsonlConfig(name="web", path="a.jsonl")
    with pytest.raises(ConfigError, match=rf"a.jsonl:2: {reason}.*on_bad_record=count"):
        read(strict, tmp_path)
    x, bad, y = read(dataclasses.replace(strict, on_bad_record="count"), tmp_path)
    assert (x.text, y.text) == ("x", "y")
    assert isinstance(bad, BadRecord)
    assert bad.where.endswith("a.jsonl:2")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_compression_is_an_error_with_the_line_or_is_counted(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl{suffix}"
    write_lines(path, [{"id": str(i), "text": f"{i * 7919 % 1000} " * 50} for i in range(3000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xa5" * 40
    path.write_bytes(data)
    strict = JsonlConfig(name="web", path=path.name)
    with pytest.raises(ConfigError, match=rf"a.jsonl{suffix}:\d+: "):
        read(strict, tmp_path)
    found = read(dataclasses.replace(strict, on_bad_record="count"), tmp_path)
    assert any(isinstance(d, BadRecord) for d in found)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_must_come_to_its_end_wherever_it_is_cut(tmp_path, suffix):
    """Cut at every byte of two frames but where the first one ends; lines that came before the cut are kept."""
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    first, second = (
        compress(b"".join(b'{"text": "%d"}\n' % i for i in part)) for part in (range(9), range(9, 12))
    )
    path = tmp_path / f"a.jsonl{suffix}"
    config = JsonlConfig(name="web", path=path.name, on_bad_record="count")
    for size in range(len(first + second)):
        path.write_bytes((first + second)[:size])
        *documents, last = read(config, tmp_path)
        assert [d.text for d in documents] == [str(i) for i in range(len(documents))]
        if size == len(first):
            assert last.text == "8"
        else:
            assert last.where.endswith(f"a.jsonl{suffix}:{len(documents) + 1}")
            # One byte of the two that every gzip member begins with is no gzip to the library.
            wanted = "is damaged" if suffix == ".gz" and size in (1, len(first) + 1) else "ends early"
            assert last.reason.startswith(f"the compressed data {wanted}")


@pytest.mark.parametrize("cut", [1, 300])
def test_a_long_frame_that_was_cut_is_noticed_by_every_reader(tmp_path, cut):
    """Such a frame holds many blocks; a cut at the end of one of them takes whole lines with it."""
    lines = "".join(f"{i * 7919 % 100_003} {i}\n" for i in range(60_000))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(lines.encode())[:-cut])
    for config in (
        TextFileConfig(name="web", path="a.txt.zst"),
        FolderConfig(name="web", path=".", glob="*.txt.zst"),
    ):
        with pytest.raises(ConfigError, match=r"a.txt.zst.*: the compressed data ends early"):
            read(config, tmp_path)


def test_a_file_in_the_current_folder_does_not_stand_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "corpora").mkdir()
    write_lines(tmp_path / "here" / "a.jsonl", LINES)
    monkeypatch.chdir(tmp_path / "here")
    config = JsonlConfig(name="web", path="a.jsonl")
    with pytest.raises(ConfigError, match=r"got 'a.jsonl', which is not there \(data.root is '.*corpora'\)"):
        config.build(str(tmp_path / "corpora"))
    assert len(read(config, "")) == len(LINES)  # without a root, paths are relative


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "\ufeffx"}\n\ufeff{"text": "y"}\n'.encode())
    x, bad = read(JsonlConfig(name="web", path="a.jsonl", on_bad_record="count"), tmp_path)
    assert x.text == "\ufeffx"
    assert "malformed JSON at column 1" in bad.reason


@pytest.mark.parametrize(
    "config",
    [
        JsonlConfig(name="web", path="corpus.jsonl"),
        JsonlConfig(name="web", path="corp*.jsonl"),
        TextFileConfig(name="web", path="corpus.txt"),
        ArrayRecordConfig(name="web", path="corpus.array_record"),
        FolderConfig(name="web", path="corpus"),
    ],
)
def test_a_missing_corpus_is_an_error_that_names_it(tmp_path, config):
    with pytest.raises(ConfigError, match=r"data.sources.web.path must name a (corpus file|folder), got"):
        config.build(str(tmp_path))


def test_a_missing_corpus_names_a_near_one_and_the_root(tmp_path):
    (tmp_path / "corpora.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"data.root is '.*did you mean 'corpora.jsonl'\?"):
        JsonlConfig(name="web", path="corpus.jsonl").build(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        JsonlConfig(name="web", path="nowhere/corpus.jsonl").build(str(tmp_path))


def test_a_folder_of_files_is_documents(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.txt").write_text("ay\r\n", newline="")
    (tmp_path / "c.md").write_text("no")
    found = read(FolderConfig(name="web", path="."), tmp_path)
    assert [(d.id, d.text) for d in found] == [("b.txt", "bee"), ("sub/a.txt", "ay\r\n")]
    (tmp_path / "b.txt").write_bytes(b"ok\xc3")
    with pytest.raises(ConfigError, match=r"b.txt: invalid UTF-8 at byte 2 \(0xc3\)"):
        read(FolderConfig(name="web", path="."), tmp_path)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=50)
@hypothesis.given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=9)),
    document_bytes=st.integers(1, 40),
)
def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, lines, document_bytes):
    text = "".join(line + "\n" for line in lines)
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = read(TextFileConfig(name="web", path="a.txt", document_bytes=document_bytes), tmp_path)
    assert "".join(d.text for d in found) == text
    assert [d.id for d in found] == [f"a.txt#{i}" for i in range(len(found))]
    assert all(len(d.text.encode()) >= document_bytes for d in found[:-1])


def test_array_records_are_documents(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b'{"id": "x", "text": "one"}', b"\xff", b'{"text": "two"}'):
        writer.write(record)
    writer.close()
    config = ArrayRecordConfig(name="web", path="a.array_record", on_bad_record="count")
    one, bad, two = read(config, tmp_path)
    assert (one.id, one.text, two.id, two.text) == ("x", "one", "a.array_record:2", "two")
    assert bad == BadRecord(f"{tmp_path / 'a.array_record'}:1", "invalid UTF-8 at byte 0 (0xff)")
    with pytest.raises(ConfigError, match="a.array_record:1: invalid UTF-8"):
        read(dataclasses.replace(config, on_bad_record="error"), tmp_path)
    plain = dataclasses.replace(config, text_key=None)
    assert [d.text for d in read(plain, tmp_path) if isinstance(d, TextDocument)][1] == '{"text": "two"}'
    (tmp_path / "b.array_record").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="not a readable ArrayRecord file"):
        read(ArrayRecordConfig(name="web", path="b.array_record"), tmp_path)


def test_the_standard_library_has_modules_and_the_language_reference():
    source = StdlibConfig(name="py").build("")
    documents = {d.id: d for d in source.documents() if isinstance(d, TextDocument)}
    assert "def loads(" in documents["json/__init__.py"].text
    assert "for_stmt" in documents["topics/for"].text
    assert len(documents) > 400
    assert not [
        name for name in documents if "site-packages" in name or "/tests/" in name or name.startswith("test/")
    ]
    assert [d.id for d in source.documents() if isinstance(d, TextDocument)] == list(documents)


def test_memory_documents_carry_their_source_and_must_be_unicode():
    good = MemoryConfig(name="m", documents=(TextDocument("a", "x"), TextDocument("b", "y", first="z")))
    assert read(good, "") == [TextDocument("a", "x", "m"), TextDocument("b", "y", "m", "z")]
    bad = MemoryConfig(name="m", documents=(TextDocument("a", "\udc80"),))
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        read(bad, "")


def test_the_fingerprint_is_of_contents_and_names(tmp_path):
    for i in range(2):
        write_lines(tmp_path / f"{i}.jsonl", [LINES[i]])
    config = JsonlConfig(name="web", path="*.jsonl")
    before = config.build(str(tmp_path)).content_fingerprint()
    (tmp_path / "0.jsonl").touch()
    assert config.build(str(tmp_path)).content_fingerprint() == before
    write_lines(tmp_path / "0.jsonl", [LINES[2]])
    assert config.build(str(tmp_path)).content_fingerprint() != before


def test_the_split_is_by_id_alone_and_has_its_share():
    ids = [f"document {i}" for i in range(20_000)]
    chosen = {i for i in ids if heldout(i, 2.0, 0)}
    assert 300 < len(chosen) < 500  # 400 expected, standard deviation 20
    assert chosen == {i for i in reversed(ids) if heldout(i, 2.0, 0)}
    assert chosen < {i for i in ids if heldout(i, 5.0, 0)}
    assert chosen != {i for i in ids if heldout(i, 2.0, 1)}
    assert not any(heldout(i, 0.0, 0) for i in ids)
    assert all(heldout(i, 100.0, 0) for i in ids)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": "a/b"}, "name must be letters"),
        ({"name": ""}, "name must be letters"),
        ({"name": ".x"}, "name must be letters"),
        ({"max_epochs": 0.0}, "max_epochs must be positive or none, got 0.0"),
        ({"heldout_percent": 101.0}, r"heldout_percent must lie in \[0, 100\], got 101.0"),
    ],
)
def test_faults_of_a_source_are_named(fields, fault):
    with pytest.raises(ValueError, match=fault):
        StdlibConfig(**{"name": "x", **fields})
    with pytest.raises(ValueError, match="document_bytes must be positive"):
        TextFileConfig(name="x", path="y", document_bytes=0)
