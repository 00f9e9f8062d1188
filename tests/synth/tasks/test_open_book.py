"""The passages in the prompt are those that were found, in the order that was asked for."""

import asyncio

import pytest

from pretrain.config import ConfigError
from synth.llm.api import Reply
from synth.question import Question, accuracy
from synth.retrieval.rerank import AsFound
from synth.retrieval.search import Bm25Config, OracleConfig
from synth.tasks.closed_book import SampledConfig
from synth.tasks.open_book import OpenBookConfig, grade_open_book, open_books, passages_text

CITIES = {f"d{i}": city for i, city in enumerate(("Arden", "Borva", "Celt", "Dunmore", "Elvan"))}
DOCUMENTS = [
    (
        identity,
        f"The traveler left early. {city} was the name of the town of story {identity}. "
        + "Rain fell. " * 30,
    )
    for identity, city in CITIES.items()
]
HEADS = {identity: f"Story {identity}" for identity in CITIES}
QUESTIONS = [
    Question(
        id=f"q{identity}",
        document=identity,
        text=f"What was the name of the town of story {identity}?",
        options=tuple(sorted(CITIES.values())),
        gold=sorted(CITIES.values()).index(city),
    )
    for identity, city in CITIES.items()
]


class Reader:
    """Answers with the option that the passages of the last question name."""

    identity = {"model": "reader"}

    async def generate(self, request):
        passages, _, asked = request.user.rpartition("### Passages\n")[2].partition("### Question")
        named = [line for line in asked.splitlines() if line[1:3] == ". " and line[3:] in passages]
        return Reply(text=f"Answer: {named[0][0]}" if len(named) == 1 else "?", finish="stop")


def opened(tmp_path, **config):
    settings = OpenBookConfig(characters=120, found=20, sampled=SampledConfig(num_samples=1), **config)
    found = asyncio.run(open_books(DOCUMENTS, HEADS, QUESTIONS, settings, AsFound(), tmp_path))
    return found, settings


@pytest.mark.parametrize("retriever", [Bm25Config(), OracleConfig()])
def test_a_reader_with_the_right_passage_answers_everything(tmp_path, retriever):
    found, settings = opened(tmp_path, shown=1, retriever=retriever)
    assert found.recall_at[1] == 1.0
    graded = asyncio.run(grade_open_book(Reader(), QUESTIONS, HEADS, found, settings))
    assert accuracy(graded).accuracy == 1.0


def test_best_last_is_best_first_turned_around(tmp_path):
    found, _ = opened(tmp_path, shown=4)
    for passages in found.passages.values():
        first = passages_text(passages, best_last=False).split("\n\n")
        assert passages_text(passages, best_last=True).split("\n\n") == first[::-1]
        assert len(first) == 4


def test_recall_does_not_fall_with_k(tmp_path):
    found, _ = opened(tmp_path, shown=3)
    values = [found.recall_at[k] for k in sorted(found.recall_at)]
    assert values == sorted(values)


def test_no_more_can_be_shown_than_is_found():
    with pytest.raises(ConfigError, match="shown must lie"):
        OpenBookConfig(found=2, shown=3)
