"""Judging: the judge does not see the label, grades out of range are refused, rates add up."""

import json

from synth.document import Document
from synth.generator import Item, Rejection, Write
from synth.llm.scripted import ScriptedConfig
from synth.sbp.judge import REAL_PAIRS, PairJudge, ToJudge, judged_rates

UNIQUE = [Document(id=f"u{i}", text=f"unique text {i}") for i in range(6)]
VALIDATION = [Document(id=f"v{i}", text=f"validation text {i}") for i in range(6)]
PAIRS = [
    Document(id=f"p{i}", text="", parents=(f"v{i}", f"v{i + 1}"), meta={"kind": "pair", "part": "validation"})
    for i in range(5)
]
TEXTS = [Document(id=f"t{i}", text=f"synthetic {i}", parents=(f"u{i}",)) for i in range(6)]


def to_judge(make_shard, sample=4):
    shard = make_shard(unique=UNIQUE, validation=VALIDATION, pair=PAIRS, texts_sbp=TEXTS)
    return list(ToJudge(labels=("sbp",), sample=sample).run((), shard=shard))


def test_the_judge_reads_seed_and_text_and_no_label(make_shard):
    documents = to_judge(make_shard)
    assert {d.meta["label"] for d in documents} == {"sbp", REAL_PAIRS}
    judge = PairJudge()
    for document in documents:
        request = judge.request(document, None, next(judge.plan(document, None, seed=0)))
        assert document.text in request.user
        assert document.meta["seed_text"] in request.user
        assert "sbp" not in request.user
        assert "real" not in request.user


def test_labels_are_mixed_and_sampled(make_shard):
    labels = [d.meta["label"] for d in to_judge(make_shard)]
    assert sorted(labels) == ["real pairs"] * 4 + ["sbp"] * 4
    assert labels != sorted(labels)
    assert to_judge(make_shard) == to_judge(make_shard)


def test_only_two_grades_in_range_are_taken():
    judge, item = PairJudge(), Item(key="grade", kind="grade")
    assert json.loads(judge.accept(TEXTS[0], None, item, 'Here: {"relevant": 2, "factual": 0}')) == {
        "relevant": 2,
        "factual": 0,
    }
    for reply in (
        "no grades",
        '{"relevant": 2}',
        '{"relevant": 4, "factual": 1}',
        '{"relevant": true, "factual": 1}',
        "[]",
    ):
        assert isinstance(judge.accept(TEXTS[0], None, item, reply), Rejection), reply


def test_rates_are_shares_of_low_grades():
    grades = [(0, 3), (1, 1), (2, 2), (3, 0)]
    documents = [
        Document(id=str(i), text=json.dumps({"relevant": r, "factual": f}), meta={"parts": ["sbp"]})
        for i, (r, f) in enumerate(grades)
    ]
    assert judged_rates(documents) == {"sbp": {"graded": 4, "irrelevant": 0.5, "not_factual": 0.5}}


def test_grades_go_through_the_stage_that_caches_and_counts(make_shard):
    documents = to_judge(make_shard)
    shard = make_shard(stage="judge")
    made = list(Write(generator=PairJudge(), llm=ScriptedConfig()).run(documents, shard=shard))
    assert len(made) == len(documents)
    rates = judged_rates(d for d in made if isinstance(d, Document))
    assert set(rates) == {"sbp", REAL_PAIRS}
    assert shard.tally.counts["calls"] == len(documents)
