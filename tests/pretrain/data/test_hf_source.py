"""Hugging Face datasets as documents: needs the `[hf]` extra; nothing is downloaded."""

import dataclasses

import pytest

datasets = pytest.importorskip("datasets", reason="the [hf] extra is not installed")

from pretrain.config import ConfigError  # noqa: E402
from pretrain.data.hf_source import HfDatasetsConfig  # noqa: E402
from pretrain.data.source import TextDocument  # noqa: E402
from pretrain.data.tables import DataConfig, prepare_tables  # noqa: E402
from pretrain.tokenizer import BytesConfig  # noqa: E402

pytestmark = pytest.mark.slow

WEB = HfDatasetsConfig(name="web", path="ds")
COLUMNS = {"id": [10, 11, 12], "other": [0.5, 0.5, 0.5], "text": ["a", "bé", "c"]}


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def save(folder, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))


def read(config, root):
    return list(config.build(str(root)).documents())


def test_rows_of_a_saved_dataset_are_documents(tmp_path):
    save(tmp_path / "ds", COLUMNS)
    assert read(WEB, tmp_path) == [
        TextDocument("10", "a", "web"), TextDocument("11", "bé", "web"), TextDocument("12", "c", "web"),
    ]  # fmt: skip
    pairs = dataclasses.replace(WEB, id_key="none", first_key="text")
    assert read(pairs, tmp_path)[1] == TextDocument("ds:2", "bé", "web", first="bé")


def test_a_split_is_chosen_by_name(tmp_path):
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [f"{name} text"]}) for name in ("train", "test")}
    )
    both.save_to_disk(str(tmp_path / "ds"))
    assert [d.text for d in read(WEB, tmp_path)] == ["train text"]
    assert [d.text for d in read(dataclasses.replace(WEB, split="test"), tmp_path)] == ["test text"]
    with pytest.raises(ConfigError, match=r"got 'ds' \(split 'dev'\)"):
        dataclasses.replace(WEB, split="dev").build(str(tmp_path))


def test_a_bad_row_is_an_error_with_its_number_or_is_counted(tmp_path):
    save(tmp_path / "ds", {"text": ["a", None, "c"]})
    with pytest.raises(ConfigError, match=r"ds:2: field 'text' must be text, got NoneType"):
        read(WEB, tmp_path)
    a, bad, c = read(dataclasses.replace(WEB, on_bad_record="count"), tmp_path)
    assert (a.text, bad.where, c.text) == ("a", "ds:2", "c")


@pytest.mark.parametrize("field", ["text_key", "first_key"])
def test_a_missing_column_is_named_beside_all_that_are_there(tmp_path, field):
    save(tmp_path / "ds", COLUMNS)
    config = dataclasses.replace(WEB, **{field: "body"}, on_bad_record="count")
    with pytest.raises(
        ConfigError,
        match=rf"data.sources.web.{field} must be a column of the dataset, got 'body'; it has: id, other, text",
    ):
        config.build(str(tmp_path))


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_dataset_is_refused(tmp_path, there):
    if there:
        (tmp_path / "ds").mkdir()
    with pytest.raises(
        ConfigError, match="path must be a dataset of the hub or a folder below data.root, got 'ds'"
    ):
        WEB.build(str(tmp_path))


def test_the_fingerprint_is_of_the_rows_that_are_read(tmp_path):
    """Neither when nor where a dataset was saved counts, nor a column that nobody reads."""
    other = {**COLUMNS, "other": [1.5, 2.5, 3.5]}
    changed = {**COLUMNS, "text": ["a", "be", "c"]}
    for name, columns in {"ds": COLUMNS, "again": COLUMNS, "other": other, "changed": changed}.items():
        save(tmp_path / name, columns)
    first, *others = (
        dataclasses.replace(WEB, path=name).build(str(tmp_path)).content_fingerprint()
        for name in ("ds", "again", "other", "changed")
    )
    assert [fingerprint == first for fingerprint in others] == [True, True, False]


def test_a_dataset_becomes_rows(tmp_path):
    save(tmp_path / "ds", {"text": [f"text number {i}" for i in range(50)]})
    data = DataConfig(
        sources=(WEB,), tokenizer=BytesConfig(), row_length=64, batch_rows=2, heldout_percent=20.0,
        root=str(tmp_path),
    )  # fmt: skip
    report = prepare_tables(data, tmp_path / "w", 0, lambda *args: None).report["web"]
    assert report["train"]["documents"] + report["heldout"]["documents"] == 50
