"""Slices of a source nest, do not overlap, and together are the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.data.source import BadRecord, JsonlConfig, MemoryConfig, TextDocument
from pretrain.scaling.slices import SliceConfig

DOCUMENTS = tuple(TextDocument(id=f"d{i}", text=f"text {i}") for i in range(300))
WHOLE = MemoryConfig(name="whole", documents=DOCUMENTS)


def ids(low, high):
    sliced = SliceConfig(name="part", source=WHOLE, low=low, high=high)
    return {d.id for d in sliced.build("").documents()}


@settings(max_examples=30)
@given(cuts=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True).map(sorted))
def test_slices_that_meet_share_nothing_and_miss_nothing(cuts):
    ends = [0.0, *cuts, 1.0]
    parts = [ids(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    assert sum(len(part) for part in parts) == len(DOCUMENTS)
    assert set.union(*parts) == {d.id for d in DOCUMENTS}


def test_a_share_is_a_part_of_every_larger_share_and_about_as_large_as_said():
    training = SliceConfig(name="part", source=WHOLE, high=0.9)
    half, quarter = ({d.id for d in training.share(f).build("").documents()} for f in (0.5, 0.25))
    assert quarter < half < ids(0, 0.9)
    assert 0.35 < len(half) / len(DOCUMENTS) < 0.55
    assert not half & ids(0.9, 1.0)


def test_documents_carry_the_name_of_the_slice():
    sliced = SliceConfig(name="part", source=WHOLE)
    assert {d.source for d in sliced.build("").documents()} == {"part"}


def test_a_bad_record_is_in_every_slice(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good", "id": "a"}) + "\n{broken\n")
    inner = JsonlConfig(name="inner", path="a.jsonl", on_bad_record="count")
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        found = list(
            SliceConfig(name="part", source=inner, low=low, high=high).build(str(tmp_path)).documents()
        )
        assert sum(isinstance(d, BadRecord) for d in found) == 1


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_an_empty_or_impossible_slice_is_refused(low, high):
    with pytest.raises(ConfigError, match="0 <= low < high <= 1"):
        SliceConfig(name="part", source=WHOLE, low=low, high=high)
