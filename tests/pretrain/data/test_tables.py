"""Tables: built once whole or not at all, reused, refused when something changed; and what is in them."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ConfigError, apply_overrides, from_json, to_json
from pretrain.data import build
from pretrain.data.mixture import BatchStage, MixtureStage
from pretrain.data.rows import RowTable
from pretrain.data.source import JsonlConfig, MemoryConfig, StdlibConfig, TextDocument
from pretrain.data.spool import SpoolWriter
from pretrain.data.tables import DataConfig, PrintedProgress, describe, prepare_tables
from pretrain.jobs.pool import PoolConfig
from pretrain.tokenizer import BpeConfig, BytesConfig, TokenizerFileConfig


def quiet(stage, done, total):
    """No progress."""


def memory(name, count, words=40, **fields):
    documents = tuple(
        TextDocument(f"{name}-{i}", " ".join(f"{name}{(i * 31 + j * j) % 97}" for j in range(words + i % 50)))
        for i in range(count)
    )
    return MemoryConfig(name=name, documents=documents, **fields)


def data_config(*sources, **fields):
    values = {
        "tokenizer": BytesConfig(),
        "row_length": 64,
        "batch_rows": 4,
        "heldout_percent": 20.0,
        **fields,
    }
    return DataConfig(sources=sources, **values)


def write_corpus(path, count=30, mark=""):
    path.write_text(
        "".join(json.dumps({"id": str(i), "text": f"text {i} {mark}" * 9}) + "\n" for i in range(count))
    )


def stamps(folder):
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.name != "files.json"
    }


def texts_of(rows, tokenizer):
    """The documents in rows of whole documents."""
    for tokens, segments in zip(rows.tokens_BT1, rows.segment_ids_BT1, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokenizer.decode(tokens[segments == segment].tolist())


# --- contents ----------------------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_of_the_splits(tmp_path):
    source = memory("a", 60, words=3)
    prepared = prepare_tables(data_config(source, row_length=600), tmp_path, 0, quiet)
    train = [t for rows in prepared.train_rows() for t in texts_of(rows, prepared.tokenizer)]
    held = [t for rows in prepared.heldout_rows() for t in texts_of(rows, prepared.tokenizer)]
    assert sorted(train + held) == sorted(d.text for d in source.documents)
    assert len(held) > 3
    assert sorted(d.text for d in prepared.heldout_documents("a")) == sorted(held)
    assert prepared.heldout_bytes == {"a": sum(len(t.encode()) for t in held)}
    assert {k: len(v) for k, v in prepared.heldout_texts().items()} == prepared.heldout_bytes


def test_long_documents_are_cut_and_every_token_is_a_target_once(tmp_path):
    prepared = prepare_tables(data_config(memory("a", 20, words=100), row_length=32), tmp_path, 0, quiet)
    report = prepared.report["a"]["train"]
    assert report["cut_documents"] == report["documents"]
    targets = sum(int(rows.weights_BT.sum()) for rows in prepared.train_rows())
    assert targets == report["text_bytes"] + report["documents"] == report["target_tokens"]
    assert "documents longer than a row cut into overlapping pieces" in describe("a", prepared.report["a"])


def test_held_out_text_is_capped_exactly_by_documents_in_hash_order(tmp_path):
    sources = [memory("a", 200), memory("b", 200)]
    big, small = (
        prepare_tables(data_config(*sources, heldout_max_bytes=n), tmp_path / str(n), 0, quiet)
        for n in (5000, 1000)
    )
    assert big.heldout_bytes == {"a": 5000, "b": 5000}
    assert small.heldout_bytes == {"a": 1000, "b": 1000}
    ids = [[d.id for d in p.heldout_documents("a")] for p in (big, small)]
    assert set(ids[1]) <= set(ids[0])
    assert small.report["a"]["unused_heldout_documents"] > big.report["a"]["unused_heldout_documents"] > 0
    for first, second in zip(big.train_rows(), small.train_rows(), strict=True):
        np.testing.assert_array_equal(first.tokens_BT1, second.tokens_BT1)


def test_a_cut_held_out_text_ends_between_characters(tmp_path):
    source = MemoryConfig(name="a", documents=tuple(TextDocument(str(i), "€" * 50) for i in range(50)))
    prepared = prepare_tables(data_config(source, heldout_max_bytes=100), tmp_path, 0, quiet)
    assert prepared.heldout_texts()["a"].decode() == "€" * 33


def test_a_source_may_have_its_own_held_out_percentage(tmp_path):
    sources = [
        memory("all", 20, heldout_percent=0.0),
        memory("none", 20, heldout_percent=100.0),
        memory("some", 40),
    ]
    prepared = prepare_tables(data_config(*sources), tmp_path, 0, quiet)
    report = prepared.report
    assert (report["all"]["train"]["documents"], report["all"]["heldout"]["documents"]) == (20, 0)
    assert (report["none"]["train"]["documents"], report["none"]["heldout"]["documents"]) == (0, 20)
    assert report["some"]["heldout"]["documents"] > 0
    assert prepared.labels == ["all", "none", "some"]


def test_a_corpus_is_all_the_unicode_there_is(tmp_path):
    texts = [
        "\x00\x01",
        "\r\n\r",
        "e\u0301é",
        "<eos><bos>",
        "\ufeff\uffff",
        "\U0010ffff" * 9,
        "\u2028\x85",
        "x" * 9,
    ]
    source = MemoryConfig(
        name="a", documents=tuple(TextDocument(f"{i}\n\x00{i}", t * 3) for i, t in enumerate(texts * 4))
    )
    prepared = prepare_tables(data_config(source, tokenizer=BpeConfig(vocab_size=280)), tmp_path, 0, quiet)
    split = [rows for kind in (prepared.train_rows(), prepared.heldout_rows()) for rows in kind]
    found = sorted(t for rows in split for t in texts_of(rows, prepared.tokenizer))
    assert found == sorted(d.text for d in source.documents)
    assert {d.id for d in prepared.heldout_documents("a")} <= {d.id for d in source.documents}


def test_pairs_are_learned_from_their_second_text(tmp_path):
    documents = tuple(TextDocument(str(i), f"answer {i}", first=f"question {i}") for i in range(40))
    prepared = prepare_tables(data_config(MemoryConfig(name="qa", documents=documents)), tmp_path, 0, quiet)
    learned = []
    for rows in (*prepared.train_rows(), *prepared.heldout_rows()):
        for tokens, weights in zip(rows.tokens_BT1, rows.weights_BT, strict=True):
            learned += prepared.tokenizer.decode(
                [t if t != prepared.tokenizer.eos_id else 10 for t in tokens[1:][weights > 0].tolist()]
            ).split("\n")[:-1]
    assert sorted(learned) == sorted(d.text for d in documents)
    held = [int(d.id) for d in prepared.heldout_documents("qa")]
    assert prepared.heldout_bytes["qa"] == sum(len(f"answer {i}") for i in held)


def test_a_pair_longer_than_a_row_is_refused_dropped_or_truncated(tmp_path):
    documents = [TextDocument(str(i), "second " * 2, first="f" * 20) for i in range(30)]
    documents.append(TextDocument("long one", "second", first="f" * 100))
    documents.append(TextDocument("hopeless", "s" * 100, first=""))

    def prepared(on_overflow):
        source = MemoryConfig(name="qa", documents=tuple(documents), on_overflow=on_overflow)
        data = data_config(source, heldout_percent=0.0, row_length=48)
        return prepare_tables(data, tmp_path, 0, quiet).report["qa"]

    with pytest.raises(
        ConfigError, match="2 do not, the longest, 'long one', has 109 tokens; raise data.row_length"
    ):
        prepared("error")
    assert not list((tmp_path / "tables").iterdir()) if (tmp_path / "tables").exists() else True
    dropped, truncated = prepared("drop"), prepared("truncate")
    assert (dropped["train"]["dropped_pairs"], dropped["train"]["truncated_pairs"]) == (2, 0)
    assert (truncated["train"]["dropped_pairs"], truncated["train"]["truncated_pairs"]) == (1, 1)
    assert "2 pairs longer than a row dropped" in describe("qa", dropped)


def test_a_dropped_pair_counts_in_no_score(tmp_path):
    """Bits per byte divide by the bytes of what is scored; the compressor reads the same bytes."""
    short = [TextDocument(f"s{i}", f"answer {i}", first="question") for i in range(30)]
    long = [TextDocument(f"l{i}", "a" * 90, first="question") for i in range(30)]
    source = MemoryConfig(name="qa", documents=tuple(short + long), on_overflow="drop")
    prepared = prepare_tables(data_config(source, heldout_percent=50.0, row_length=48), tmp_path, 0, quiet)
    report = prepared.report["qa"]["heldout"]
    assert 0 < report["dropped_pairs"] < report["documents"]
    kept = list(prepared.heldout_documents("qa"))
    assert {d.id[0] for d in kept} == {"s"}
    assert len(kept) == report["documents"] - report["dropped_pairs"]
    assert prepared.heldout_bytes["qa"] == len(prepared.heldout_texts()["qa"])
    targets = sum(int(np.count_nonzero(rows.weights_BT)) for rows in prepared.heldout_rows())
    assert targets == prepared.heldout_bytes["qa"] + len(kept)  # bytes are tokens here; each text has an end

    source = dataclasses.replace(source, documents=tuple(long + short[:1]), heldout_percent=None)
    prepared = prepare_tables(data_config(source, heldout_percent=0.0, row_length=48), tmp_path, 0, quiet)
    assert prepared.report["qa"]["train"]["text_bytes"] == len(short[0].text)


def dialogue(*parts):
    """A document whose every second part is learned."""
    learned, end = [], 0
    for number, part in enumerate(parts):
        if number % 2:
            learned.append((end, end + len(part)))
        end += len(part)
    return "".join(parts), tuple(learned)


def test_only_the_learned_spans_of_a_document_are_learned(tmp_path):
    """Also where a document is longer than a row, with a whole one beside it, and in what the score divides by."""
    made = [
        dialogue("<", f"né {i}", f"> and so on and so on until the row has long ended {i}<", f"{i * i}", ">")
        for i in range(40)
    ]
    marked = [TextDocument(f"d{i}", text, learned=spans) for i, (text, spans) in enumerate(made)]
    whole = [TextDocument(f"w{i}", f"<{i}>") for i in range(9)]
    source = MemoryConfig(name="talk", documents=(*marked, *whole))
    prepared = prepare_tables(data_config(source), tmp_path, 0, quiet)

    def wanted(document):
        if document.learned is None:
            return document.text
        return "".join(document.text[start:stop] for start, stop in document.learned)

    learned = bytearray()
    for rows in (*prepared.train_rows(), *prepared.heldout_rows()):
        ends = prepared.tokenizer.eos_id
        for tokens, weights in zip(rows.tokens_BT1, rows.weights_BT, strict=True):
            learned += bytes(10 if t == ends else t for t in tokens[1:][weights > 0].tolist())
    by_letter = sorted(learned.replace(b"\n", b""))
    assert by_letter == sorted("".join(map(wanted, source.documents)).encode())
    assert learned.count(b"\n") == len(source.documents)  # the end is learned too
    held = list(prepared.heldout_documents("talk"))
    assert held and all(
        d.learned == dict(zip([m.id for m in marked], [m.learned for m in marked], strict=True)).get(d.id)
        for d in held
    )
    assert prepared.heldout_bytes["talk"] == len("".join(map(wanted, held)).encode())
    assert prepared.heldout_texts()["talk"] == "".join(map(wanted, held)).encode()


@pytest.mark.parametrize("spans", [(), ((0, 0),), ((3, 5), (1, 2)), ((0, 2), (2, 4)), ((0, 9),), ((-1, 2),)])
def test_learned_spans_rise_inside_the_text(spans):
    with pytest.raises(ValueError, match="must rise inside its 6 characters"):
        TextDocument("d", "abcdef", learned=spans)
    with pytest.raises(ValueError, match="is a pair"):
        TextDocument("d", "abcdef", first="a", learned=((0, 2),))


def test_bad_and_empty_records_are_counted_and_reported(tmp_path):
    write_corpus(tmp_path / "a.jsonl")
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"id": "e", "text": ""}\nnot json\n{"id": "f", "text": "\xff"}\n')
    source = JsonlConfig(name="web", path="a.jsonl", on_bad_record="count")
    stages = []
    data = data_config(source, root=str(tmp_path))
    for _ in range(2):  # when it is built, and whenever it is used
        stages.clear()
        report = prepare_tables(data, tmp_path / "w", 0, lambda stage, *_: stages.append(stage)).report["web"]
        assert (report["bad_records"], report["empty_documents"]) == (2, 1)
        assert any(
            "web: 2 bad records are left out, the first: " in stage and "a.jsonl:32" in stage
            for stage in stages
        )
    assert report["first_bad_records"][1].endswith("a.jsonl:33: invalid UTF-8 at byte 21 (0xff)")
    assert "2 bad records left out; 1 empty documents left out" in describe("web", report)


def test_repeated_ids_are_reported(tmp_path):
    documents = tuple(TextDocument(str(i % 25), f"text {i}") for i in range(50))
    report = prepare_tables(
        data_config(MemoryConfig(name="a", documents=documents)), tmp_path, 0, quiet
    ).report["a"]
    assert report["train"]["repeated_ids"] + report["heldout"]["repeated_ids"] == 25


def test_without_stages_sources_are_drawn_by_tokens(tmp_path):
    data = data_config(memory("a", 60), memory("b", 20))
    prepared = prepare_tables(data, tmp_path, 0, quiet)
    weights = json.loads(prepared.identity["data.stages"])[0]["weights"]
    assert weights == {name: report["train"]["target_tokens"] for name, report in prepared.report.items()}


# --- built once, whole or not at all -----------------------------------------------------------------


def test_nothing_is_built_twice(tmp_path):
    data = data_config(memory("a", 30), memory("b", 30), tokenizer=BpeConfig(vocab_size=300))
    first = prepare_tables(data, tmp_path, 0, quiet)
    before = stamps(tmp_path)
    stages = []
    second = prepare_tables(data, tmp_path, 0, lambda stage, *_: stages.append(stage))
    assert stages == []
    assert stamps(tmp_path) == before
    assert (first.fingerprint, first.report) == (second.fingerprint, second.report)
    assert not [p.name for p in (tmp_path / "tables").iterdir() if p.name.startswith(".")]


def test_another_config_is_another_table(tmp_path):
    source = memory("a", 60)
    data = data_config(source)
    variants = [
        data,
        dataclasses.replace(data, row_length=32),
        dataclasses.replace(data, table_seed=1),
        dataclasses.replace(data, heldout_percent=30.0),
        dataclasses.replace(data, heldout_max_bytes=100),
        dataclasses.replace(data, tokenizer=BpeConfig(vocab_size=300)),
        dataclasses.replace(data, sources=(dataclasses.replace(source, on_overflow="drop"),)),
    ]
    folders = [prepare_tables(variant, tmp_path, 0, quiet).folders["a"] for variant in variants]
    assert len(set(folders)) == len(variants)


def test_what_does_not_decide_rows_shares_tables_but_not_always_the_fingerprint(tmp_path):
    source = memory("a", 30)
    data = data_config(source)
    base = prepare_tables(data, tmp_path, 0, quiet)
    same = [dataclasses.replace(data, rebuild=True), dataclasses.replace(data, jobs=PoolConfig(num_cpus=1))]
    for variant in same:
        assert prepare_tables(variant, tmp_path, 0, quiet).fingerprint == base.fingerprint
    batches = dataclasses.replace(data, batch_rows=8)
    caps = dataclasses.replace(data, sources=(dataclasses.replace(source, max_epochs=2.0),))
    stages = dataclasses.replace(data, stages=(MixtureStage(start_step=0, weights={"a": 2.0}),))
    found = [prepare_tables(variant, tmp_path, 0, quiet) for variant in (batches, caps, stages)]
    found.append(prepare_tables(data, tmp_path, 1, quiet))
    assert len({base.fingerprint, *(p.fingerprint for p in found)}) == 5
    assert {p.folders["a"] for p in found} == {base.folders["a"]}


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    data = data_config(memory("a", 80), memory("b", 50), tokenizer=BpeConfig(vocab_size=300))
    alone = prepare_tables(data, tmp_path / "here", 0, quiet)
    monkeypatch.setattr(build, "_WORTH_A_PROCESS_BYTES", 0)
    monkeypatch.setattr(build, "_CHUNK_BYTES", 5000)
    many = prepare_tables(dataclasses.replace(data, jobs=PoolConfig(num_cpus=2)), tmp_path / "jobs", 0, quiet)
    assert many.fingerprint == alone.fingerprint
    files = {
        kind: {
            str(p.relative_to(tmp_path / kind)): p.read_bytes()
            for p in (tmp_path / kind).rglob("*")
            if p.suffix in (".array_record", ".gz")
        }
        for kind in ("here", "jobs")
    }
    assert files["here"] == files["jobs"]
    assert len(files["here"]) == 6


def test_shards_are_windows_of_documents_and_prefixes_of_a_corpus_nest(tmp_path):
    spool = SpoolWriter(tmp_path / "spool", seed=0)
    for document in memory("a", 100).documents:
        spool.add(document)
    whole = spool.close()
    order = whole.in_random_order()
    prefix = SpoolWriter(tmp_path / "prefix", seed=0)
    for document in whole.documents(sorted(order[:60].tolist())):
        prefix.add(document)
    tables = []
    for number, documents in enumerate((whole, prefix.close())):
        spec = build.TableSpec(
            name="a", split="train", tokenizer=BytesConfig().build("", lambda n: iter(())), row_length=64,
            on_overflow="error", seed=5, window_documents=20,
        )  # fmt: skip
        folder = tmp_path / f"table{number}"
        build.build_table(documents, folder, tmp_path / f"scratch{number}", spec, build.Here(), quiet)
        tables.append(RowTable(folder))
    assert [len(t.manifest["shards"]) for t in tables] == [5, 3]
    rows = range(len(tables[1]))
    np.testing.assert_array_equal(tables[0].read(rows).tokens_BT1, tables[1].read(rows).tokens_BT1)


_HARNESS = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:] = {path!r}
from pretrain.config import ConfigError
from pretrain.data import tables
from pretrain.data.rows import RowTable
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.tokenizer import BpeConfig

documents = tuple(TextDocument(str(i), f"some text number {{i * 7919 % 613}} " * 12) for i in range(60))
data = tables.DataConfig(
    sources=(MemoryConfig(name="a", documents=documents), MemoryConfig(name="b", documents=documents[:40])),
    tokenizer=BpeConfig(vocab_size=280), row_length=64, batch_rows=4, heldout_percent=20.0,
)

def prepare(workdir):
    return tables.prepare_tables(data, workdir, 0, lambda *args: None)

def fork(function):
    \"\"\"Run in a child (no threads have been started here); its exit status.\"\"\"
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except ConfigError as error:
            print("refused:", error, flush=True)
            os._exit(2)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def report(workdir):
    Path(workdir).with_suffix(".fingerprint").write_text(prepare(workdir).fingerprint)

def fingerprint(workdir):
    assert ended(fork(lambda: report(workdir))) == 0
    return Path(workdir).with_suffix(".fingerprint").read_text()

"""


def run_harness(tmp_path, code):
    """Run `code` in a small process that may fork: this one has jax and its threads."""
    script = tmp_path / "harness.py"
    script.write_text(_HARNESS.format(path=[str(Path(build.__file__).parents[2]), *sys.path]) + code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kill_at_any_change_of_the_disk_leaves_whole_tables_or_none(tmp_path):
    out = run_harness(
        tmp_path,
        """
expected = fingerprint("whole")

def killed_at(count):
    seen = [0]
    def counting(function):
        def wrapped(*args, **kwargs):
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped
    for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
        setattr(os, name, counting(getattr(os, name)))
    prepare("killed")

count, kinds = 0, set()
while True:
    count += 1
    status = ended(fork(lambda: killed_at(count)))
    found = [p for p in Path("killed/tables").glob("*") if not p.name.startswith(".")]
    for folder in found:
        assert (folder / "manifest.json").exists(), folder
        if not folder.name.startswith("tokenizer"):
            for split in ("train", "heldout"):
                RowTable(folder / split).verify()
    kinds.add(len(found))
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    if count % 4 == 0:
        assert fingerprint("killed") == expected
        os.system("rm -r killed")
assert kinds == {0, 1, 2, 3}, kinds
assert fingerprint("killed") == expected
assert not list(Path("killed/tables").glob(".*"))
print("kills", count - 1)
""",
    )
    assert int(out.split()[-1]) > 30


def test_builders_at_the_same_time_share_one_table(tmp_path):
    run_harness(
        tmp_path,
        """
children = [fork(lambda: report("shared")) for _ in range(4)]
assert [ended(child) for child in children] == [0] * 4
assert len(list(Path("shared/tables").iterdir())) == 3, list(Path("shared/tables").iterdir())
assert fingerprint("shared") == fingerprint("alone")
""",
    )


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_refused_and_leave_nothing(tmp_path):
    out = run_harness(
        tmp_path,
        """
def limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    prepare("full")
for size in (100, 3000, 8000, 12000):
    assert ended(fork(lambda: limited(size))) == 2, size
    assert not Path("full").exists(), list(Path("full").rglob("*"))
Path("file").write_text("")
assert ended(fork(lambda: prepare("file/below"))) == 2
""",
    )
    lines = out.strip().splitlines()
    assert [line for line in lines if "File too large" in line] == lines[:4]
    assert "a part of the path is a file" in lines[4]


# --- refused -----------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """A config over a file, its tables built."""
    write_corpus(tmp_path / "a.jsonl")
    data = data_config(JsonlConfig(name="web", path="*.jsonl"), root=str(tmp_path))
    prepare_tables(data, tmp_path / "w", 0, quiet)
    return data


@pytest.mark.parametrize("tokenizer", [BytesConfig(), BpeConfig(vocab_size=280)])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda root: write_corpus(root / "a.jsonl", 29), "a.jsonl has other content"),
        (lambda root: write_corpus(root / "b.jsonl"), "b.jsonl is new"),
        (lambda root: (root / "a.jsonl").rename(root / "c.jsonl"), "a.jsonl is gone"),
    ],
)
def test_a_changed_corpus_is_refused_until_a_rebuild_is_asked_for(tmp_path, corpus, tokenizer, change, what):
    data = dataclasses.replace(corpus, tokenizer=tokenizer)
    before = prepare_tables(data, tmp_path / "w", 0, quiet)
    change(tmp_path)
    with pytest.raises(ConfigError, match=f"data.sources.web must not change .* {what}.*data.rebuild=true"):
        prepare_tables(data, tmp_path / "w", 0, quiet)
    rebuilt = prepare_tables(dataclasses.replace(data, rebuild=True), tmp_path / "w", 0, quiet)
    assert prepare_tables(data, tmp_path / "w", 0, quiet).fingerprint == rebuilt.fingerprint
    fresh = prepare_tables(data, tmp_path / "fresh", 0, quiet)
    assert rebuilt.fingerprint == fresh.fingerprint
    assert before.folders == rebuilt.folders


def test_a_change_that_keeps_size_and_date_is_noticed(tmp_path, corpus):
    path = tmp_path / "a.jsonl"
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"text 7", b"text 8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(ConfigError, match="a.jsonl has other content"):
        prepare_tables(corpus, tmp_path / "w", 0, quiet)


def test_a_new_date_or_place_of_the_same_corpus_is_no_change(tmp_path, corpus):
    expected = prepare_tables(corpus, tmp_path / "w", 0, quiet).fingerprint
    os.utime(tmp_path / "a.jsonl")
    assert prepare_tables(corpus, tmp_path / "w", 0, quiet).fingerprint == expected
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "a.jsonl")
    moved = dataclasses.replace(corpus, root=str(tmp_path / "moved"))
    assert prepare_tables(moved, tmp_path / "w", 0, quiet).fingerprint == expected


def test_an_unchanged_corpus_is_not_read_again(tmp_path, corpus, monkeypatch):
    past = time.time_ns() - 10**10
    files = next((tmp_path / "w" / "tables").glob("web-*")) / "files.json"
    known = json.loads(files.read_text())
    # As if the corpus had been there for a while when the table was made.
    for name, (size, _, _changed) in known["web"]["files"].items():
        os.utime(tmp_path / name, ns=(past, past))
        known["web"]["files"][name] = [size, past, (tmp_path / name).stat().st_ctime_ns]
        known["web"]["looked_ns"] = time.time_ns() + 10**10
    files.write_text(json.dumps(known))
    monkeypatch.setattr("pretrain.data.tables.file_hash", lambda path: pytest.fail(f"read {path}"))
    prepare_tables(corpus, tmp_path / "w", 0, quiet)


def test_a_table_of_another_tokenizer_is_refused(tmp_path):
    tokenizers = [BpeConfig(vocab_size=270).build("", lambda _: iter([t] * 9)) for t in ("some", "text")]  # noqa: B023
    tokenizers[0].save(tmp_path / "t.json")
    data = data_config(memory("a", 30), tokenizer=TokenizerFileConfig(path="t.json"), root=str(tmp_path))
    prepare_tables(data, tmp_path / "w", 0, quiet)
    tokenizers[1].save(tmp_path / "t.json")
    with pytest.raises(
        ConfigError,
        match=f"read with the tokenizer that made it, got tokenizer {tokenizers[1].sha256[:12]} for .*a-.*, "
        f"made with {tokenizers[0].sha256[:12]}; set data.rebuild=true",
    ):
        prepare_tables(data, tmp_path / "w", 0, quiet)
    rebuilt = prepare_tables(dataclasses.replace(data, rebuild=True), tmp_path / "w", 0, quiet)
    assert rebuilt.tokenizer.sha256 == tokenizers[1].sha256


@pytest.mark.parametrize(
    "damage",
    ["*/train/manifest.json", "*/manifest.json", "*/heldout/manifest.json", "tokenizer-*/tokenizer.json"],
)
def test_damage_is_named_and_a_rebuild_repairs_it(tmp_path, damage):
    data = data_config(memory("a", 40), tokenizer=BpeConfig(vocab_size=280))
    expected = prepare_tables(data, tmp_path, 0, quiet).fingerprint
    (path,) = {*(tmp_path / "tables").glob(damage)} - {
        *(tmp_path / "tables").glob("tokenizer-*/manifest.json")
    }
    path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(ConfigError, match="data.rebuild=true"):
        prepare_tables(data, tmp_path, 0, quiet)
    repaired = prepare_tables(dataclasses.replace(data, rebuild=True), tmp_path, 0, quiet)
    assert repaired.fingerprint == expected
    repaired.verify()


@pytest.mark.parametrize(
    "file", ["train/00000.array_record", "heldout/00000.array_record", "heldout.jsonl.gz"]
)
def test_a_flipped_byte_is_found_by_verify_and_repaired_by_a_rebuild(tmp_path, file):
    data = data_config(memory("a", 40))
    prepared = prepare_tables(data, tmp_path, 0, quiet)
    path = prepared.folders["a"] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="must have sha256"):
        prepare_tables(data, tmp_path, 0, quiet).verify()
    prepare_tables(dataclasses.replace(data, rebuild=True), tmp_path, 0, quiet).verify()


def test_damaged_held_out_documents_are_named(tmp_path):
    prepared = prepare_tables(data_config(memory("a", 40)), tmp_path, 0, quiet)
    path = prepared.folders["a"] / "heldout.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="held-out documents .* are damaged"):
        prepared.heldout_texts()


@pytest.mark.parametrize("content", ["", "\n\n", '{"id": "a", "text": ""}\n'])
def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    data = data_config(JsonlConfig(name="web", path="a.jsonl"), root=str(tmp_path))
    with pytest.raises(
        ConfigError, match="the corpus data.sources.web must hold documents with text, got none"
    ):
        prepare_tables(data, tmp_path / "w", 0, quiet)
    assert not (tmp_path / "w").exists()


def test_a_malformed_line_is_refused_before_anything_is_written(tmp_path):
    write_corpus(tmp_path / "a.jsonl")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{\n")
    data = data_config(JsonlConfig(name="web", path="a.jsonl"), root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"a.jsonl:31: malformed JSON"):
        prepare_tables(data, tmp_path / "w", 0, quiet)
    assert not (tmp_path / "w").exists()


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="data.heldout_percent=0.01 must leave documents to evaluate on, got none of 5"
    ):
        prepare_tables(data_config(memory("a", 5), heldout_percent=0.01), tmp_path, 0, quiet)
    with pytest.raises(
        ConfigError, match="must hold documents to train on, got none; lower data.heldout_percent"
    ):
        prepare_tables(data_config(memory("a", 5), heldout_percent=100.0), tmp_path, 0, quiet)
    data = data_config(memory("a", 5), heldout_percent=100.0, tokenizer=BpeConfig(vocab_size=280))
    with pytest.raises(ConfigError, match="trained on train documents, got none; lower data.heldout_percent"):
        prepare_tables(data, tmp_path, 0, quiet)


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    write_corpus(tmp_path / "a.jsonl")
    data = data_config(JsonlConfig(name="web", path="a.jsonl"), root=str(tmp_path))

    def meddle(stage, done, total):
        if stage == "read web":
            os.utime(tmp_path / "a.jsonl", ns=(0, 0))

    with pytest.raises(ConfigError, match="must not change while it is read"):
        prepare_tables(data, tmp_path / "w", 0, meddle)


# --- the config --------------------------------------------------------------------------------------


def test_faults_of_the_config_are_named_all_at_once():
    with pytest.raises(ValueError, match="sources must name at least one") as error:
        data_config(row_length=1, batch_rows=0, heldout_max_bytes=0, heldout_percent=-1.0)
    assert len(str(error.value).splitlines()) == 5
    with pytest.raises(ValueError, match="different names, got 'a' more than once"):
        data_config(memory("a", 1), memory("a", 2))
    with pytest.raises(ValueError, match=r"stages.0.weights must name sources \(a\), got b"):
        data_config(memory("a", 1), stages=(MixtureStage(start_step=0, weights={"b": 1.0}),))
    with pytest.raises(
        ValueError, match="batch_stages must begin at start_step 0 and rise, got start steps 3"
    ):
        data_config(memory("a", 1), batch_stages=(BatchStage(start_step=3, batch_rows=1),))


def test_a_config_survives_json_and_overrides():
    data = data_config(
        memory("a", 2),
        StdlibConfig(name="py", max_epochs=2.0),
        tokenizer=BpeConfig(vocab_size=300),
        stages=(MixtureStage(start_step=0, weights={"a": 1.0, "py": 2.0}),),
        batch_stages=(BatchStage(start_step=0, batch_rows=2), BatchStage(start_step=9, batch_rows=4)),
    )
    assert from_json(json.loads(json.dumps(to_json(data)))) == data
    changed = apply_overrides(data, ["sources.py.max_epochs=3", "rebuild=true", "root=/x", "jobs.num_cpus=1"])
    assert changed.sources[1].max_epochs == 3.0
    assert (changed.rebuild, changed.root, changed.jobs) == (True, "/x", PoolConfig(num_cpus=1))


def test_progress_is_printed_by_stage_and_time(capsys):
    now = [0.0]
    progress = PrintedProgress(interval_s=5.0, now=lambda: now[0])
    for second in range(11):
        now[0] = float(second)
        progress("read web", second, 10)
    progress("pack web", 1, 0)
    assert capsys.readouterr().out.splitlines() == [
        "data: read web",
        "data: read web 50%",
        "data: read web 100%",
        "data: pack web",
    ]
