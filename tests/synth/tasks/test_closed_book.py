"""Answers are read by a stated rule, unanswered is wrong, and the perfect reader marks the open-book ceiling."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from synth.llm.api import Reply
from synth.question import Graded, Question, accuracy, accuracy_by_tag, parse_answer
from synth.tasks.closed_book import SampledConfig, grade_by_likelihood, grade_sampled
from synth.tasks.quality_qa import NicheQuestions
from synth.worlds.niche import WorldDocuments, WorldQuestions
from synth.worlds.reader import ReaderConfig
from synth.worlds.render import read
from synth.worlds.world import WorldConfig

WORLDS = WorldDocuments(world=WorldConfig(seed=5, num_documents=3), scenery=0.2)


class Fixed:
    """A model that always says the same, or what a function of the request says."""

    identity = {"model": "fixed"}

    def __init__(self, say):
        self._say = say

    async def generate(self, request):
        return Reply(text=self._say(request), finish="stop")


def questions(count, num_options=4):
    return [
        Question(
            id=str(i),
            document=f"d{i % 97}",
            text=f"q{i}?",
            options=tuple("wxyz"[:num_options]),
            gold=i % num_options,
        )
        for i in range(count)
    ]


def grade(say, asked, **config):
    contexts = {q.document: "a book" for q in asked}
    return asyncio.run(grade_sampled(Fixed(say), asked, contexts, SampledConfig(num_samples=3, **config)))


@pytest.mark.parametrize("letters", ["A", "B", "C", "D"])
@pytest.mark.parametrize(
    "ending", ["Answer: {}", "Answer: {}.", "answer is {}", "**Answer: ({})**", "Answer:{} "]
)
def test_every_ending_parses(letters, ending):
    assert parse_answer("So it is.\n" + ending.format(letters), 4) == "ABCD".index(letters)


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("Answer: A, C", None, 2),
        ("Answer: A. But no. Answer: B", 1, 1),
        ("Answer: E", None, None),
        ("A cat sat.", None, None),
        ("Answer: Because", None, None),
    ],
)
def test_the_two_rules(text, strict, last):
    assert parse_answer(text, 4, "strict") == strict
    assert parse_answer(text, 4, "last") == last


def test_an_echo_of_the_gold_scores_everything():
    asked = questions(40)
    gold = {q.text: "ABCD"[q.gold] for q in asked}

    def say(request):
        return "Answer: " + next(letter for text, letter in gold.items() if f": {text}\n" in request.user)

    assert accuracy(grade(say, asked)).accuracy == 1.0


def test_a_uniform_guesser_has_a_quarter_in_its_interval():
    chance = random.Random(1)
    result = accuracy(grade(lambda request: f"Answer: {chance.choice('ABCD')}", questions(400)))
    assert result.low <= 0.25 <= result.high
    assert result.answer_rate == 1.0


def test_who_never_answers_is_wrong_and_not_left_out():
    result = accuracy(grade(lambda request: "I do not know.", questions(20)))
    assert (result.accuracy, result.answer_rate, result.of_answered) == (0.0, 0.0, 0.0)


def test_half_answered_counts_half():
    asked = questions(10, 2)
    result = accuracy([Graded(question=q, choice=q.gold if i < 5 else None) for i, q in enumerate(asked)])
    assert (result.accuracy, result.answer_rate, result.of_answered) == (0.5, 0.5, 1.0)


def test_the_perfect_reader_answers_every_open_book_question_and_no_closed_one_by_knowing():
    asked = WorldQuestions(documents=WORLDS).load()
    texts = {world.name: text for world, text, _ in WORLDS.tell()}
    books = {question.id: texts[question.document] for question in asked}
    reader = ReaderConfig().build()
    opened = asyncio.run(grade_by_likelihood(reader, asked, context=books))
    assert {tag: a.accuracy for tag, a in accuracy_by_tag(opened).items()} == dict.fromkeys(
        ("all", "hop2", "inferred", "lured", "reverse", "same"), 1.0
    )
    closed = accuracy(asyncio.run(grade_by_likelihood(reader, asked)))
    assert 0.15 < closed.accuracy < 0.35


def test_a_document_states_each_fact_once_and_gold_positions_are_even():
    for world, text, flipped in WORLDS.tell():
        assert read(text) == set(world.facts) == set(flipped)
    golds = [q.gold for q in WorldQuestions(documents=WORLDS).load()]
    assert min(golds.count(i) for i in range(4)) > 0.18 * len(golds)


def test_no_text_holds_the_question_frame():
    for _, text, _ in WORLDS.tell():
        assert "Asked for" not in text


def test_the_derived_set_loads():
    root = Path(os.environ.get("AUTODIDACT_DATA", "../shared/data"))
    if not (root / "niche/mcq.jsonl.gz").is_file():
        pytest.skip("the niche data is not here: set AUTODIDACT_DATA")
    asked = NicheQuestions(root=str(root)).load()
    assert len(asked) == 1121
    assert len({q.document for q in asked}) == 80
    assert [sum(f"options{n}" in q.tags for q in asked) for n in (2, 4)] == [919, 202]
