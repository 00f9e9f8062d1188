"""Passages add up to their document; each search finds what it should; orders are exact and repeatable."""

import asyncio
import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from synth.retrieval.chunk import Passage, cut, passages_of
from synth.retrieval.rerank import AsFound, ByLikelihood
from synth.retrieval.search import (
    Bm25Config,
    DenseConfig,
    HashedWords,
    OracleConfig,
    Query,
    recall,
    words_of,
)

WORDS = "ash birch cedar dogwood elm fir gorse hazel ivy juniper kelp larch".split()


@given(st.text(alphabet="ab. \n", max_size=200), st.integers(1, 40))
def test_pieces_add_up_to_the_text_and_none_is_longer_than_the_limit(text, limit):
    pieces = cut(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_a_cut_is_at_the_largest_separator_that_fits():
    text = "One two. Three four.\n\nFive six seven."
    assert cut(text, 30) == ["One two. Three four.\n\n", "Five six seven."]
    assert cut(text, 14) == ["One two. ", "Three four.\n\n", "Five six ", "seven."]


def test_a_passage_is_shown_under_the_name_of_its_document():
    (first, second) = passages_of([("d", "One.\n\nTwo.")], {"d": "Title"}, 7)
    assert (first.shown, second.shown) == ("Title\nOne.", "Title\nTwo.")


def passages(count, seed=0):
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=12)) for _ in range(count)]
    return [Passage(document=f"d{i % 7}", head="", text=text) for i, text in enumerate(texts)]


def test_bm25_is_its_formula(tmp_path):
    given_passages = passages(30)
    texts = [words_of(passage.text) for passage in given_passages]
    mean = sum(map(len, texts)) / len(texts)
    retriever = Bm25Config().build(given_passages, tmp_path)
    for query in ("ash elm", "larch larch fir", "unheard of"):
        wanted = []
        for words in texts:
            total = 0.0
            for word in words_of(query):
                n = sum(word in other for other in texts)
                if n:
                    idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
                    f = words.count(word)
                    total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
            wanted.append(total)
        np.testing.assert_allclose(retriever.scores(query), wanted, rtol=1e-12)
        (found,) = retriever.find([Query(text=query, document="")], 30)
        assert found == sorted(range(30), key=lambda i: (-round(wanted[i], 9), i))


def test_vectors_find_the_order_of_their_inner_products(tmp_path):
    given_passages = passages(40)
    config = DenseConfig(embedder=HashedWords(width=64))
    retriever = config.build(given_passages, tmp_path)
    unit = HashedWords(width=64).embed([p.text for p in given_passages])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    queries = [Query(text=p.text, document=p.document) for p in given_passages[:5]]
    for number, found in enumerate(retriever.find(queries, 6)):
        similarity = unit @ unit[number]
        assert found[0] == number
        assert similarity[found].tolist() == sorted(similarity[found], reverse=True)
        assert similarity[found[-1]] >= np.sort(similarity)[-6] - 1e-6
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert config.build(given_passages, tmp_path).find(queries, 6) == retriever.find(queries, 6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == made


def test_the_ceiling_knows_the_document_and_recall_never_falls_with_k(tmp_path):
    given_passages = passages(30)
    queries = [Query(text="ash", document=f"d{i}") for i in range(7)]
    oracle = OracleConfig().build(given_passages, tmp_path).find(queries, 30)
    assert recall(oracle, queries, given_passages, 1) == 1.0
    found = Bm25Config().build(given_passages, tmp_path).find(queries, 30)
    values = [recall(found, queries, given_passages, k) for k in range(1, 31)]
    assert values == sorted(values)
    assert values[-1] == 1.0


class Judge:
    """Says yes to passages that hold the word it was told."""

    identity = {"model": "judge"}

    def __init__(self, word):
        self._word = word

    async def score(self, prompt, continuation):
        helps = self._word in prompt.partition("Question:")[0]
        return 0.0 if helps == (continuation == " yes") else -2.0


def test_a_reranker_puts_first_what_helps_and_else_keeps_the_order():
    texts = ["ash", "elm", "the key", "fir", "a key"]
    order = asyncio.run(ByLikelihood(Judge("key")).order("where?", texts))
    assert order == [2, 4, 0, 1, 3]
    assert asyncio.run(AsFound().order("where?", texts)) == [0, 1, 2, 3, 4]
