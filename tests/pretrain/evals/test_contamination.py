"""An item is found where its words stand in a row, however they are printed, and only there."""

import string

import hypothesis
import hypothesis.strategies as st

from pretrain.evals.contamination import Contamination, find_contamination
from pretrain.evals.tasks import Choice, LastWord, Passage, Question

LETTERS = list(string.ascii_lowercase)


def found(item, *documents):
    report = find_contamination({"t": [item]}, [(f"d{i}", text) for i, text in enumerate(documents)])["t"]
    return dict(report.found)


def test_every_kind_of_item_is_found_by_its_words_with_its_answer():
    question = "Which of the two rivers of the old town flows north to the sea"
    right = (
        Choice(id="c", contexts=(f"Question: {question}?\nAnswer:",) * 2, continuations=(" the Arve", " no"), gold=0),
        LastWord(id="l", context=question + " the", word=" Arve"),
        Question(id="q", prompt=f"Q: {question}?\nA:", answers=("the Arve",)),
        Passage(id="p", text=f"{question}: the Arve"),
    )  # fmt: skip
    printed = f"(1) {question.upper()} --\n THE  Arve!"
    for item in right:
        assert found(item, "nothing of it", printed, printed) == {item.id: "d1"}
        # The last 13 words, the answer among them, are enough; 12 are not.
        words = f"{question} the Arve".split()
        assert found(item, "x " + " ".join(words[-13:])) == {item.id: "d0"}
        assert found(item, " ".join(words[-12:]), " ".join(words[:12])) == {}
    # Another answer is another item.
    wrong = LastWord(id="l", context=" ".join(question.split()[:9]), word=" Rhone")
    assert found(wrong, printed) == {}


def test_short_items_are_looked_for_whole_and_the_shortest_not_at_all():
    eight = " ".join(LETTERS[:8])
    assert found(Passage(id="p", text=eight), f"x {eight} y") == {"p": "d0"}
    assert found(Passage(id="p", text=eight), " ".join(LETTERS[:7])) == {}
    items = {"t": [Passage(id="p", text="a b c d e f g")], "other": []}
    report = find_contamination(items, [("d", "a b c d e f g")])
    assert report["t"] == Contamination(items=1, too_short=1, found={})
    assert report["other"] == Contamination(items=0, too_short=0, found={})


@hypothesis.given(
    texts=st.lists(st.lists(st.sampled_from("ab"), max_size=30), min_size=1, max_size=4),
    corpus=st.lists(st.lists(st.sampled_from("ab"), max_size=60), max_size=3),
)
def test_what_is_found_is_what_a_plain_search_finds(texts, corpus):
    items = [Passage(id=str(i), text=" ".join(words)) for i, words in enumerate(texts)]
    documents = [(str(i), " ".join(words)) for i, words in enumerate(corpus)]
    wanted = {}
    for item in items:
        words = item.text.split()
        runs = [words[i : i + 13] for i in range(max(1, len(words) - 12))]
        for name, text in documents:
            if len(words) >= 8 and any(f" {' '.join(run)} " in f" {text} " for run in runs):
                wanted.setdefault(item.id, name)
    assert dict(find_contamination({"t": items}, documents)["t"].found) == wanted
