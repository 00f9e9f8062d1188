"""Questions about worlds: one right answer among four of its kind, and tags that say what must be done to find it."""

from collections import Counter

import pytest

from synth.worlds.niche import WorldDocuments, WorldQuestions
from synth.worlds.render import read_sentence, sentences_of
from synth.worlds.world import WorldConfig, edges_of

DOCUMENTS = WorldDocuments(world=WorldConfig(seed=3, num_documents=6, num_facts=12, max_hops=3))
TOLD = {
    world.name: (world, [read_sentence(s) for s in sentences_of(text)]) for world, text, _ in DOCUMENTS.tell()
}
QUESTIONS = WorldQuestions(documents=DOCUMENTS).load()


def statement_of(question, option):
    return read_sentence(f"{question.text} {option}.")


def test_the_document_proves_one_option_and_no_other():
    for question in QUESTIONS:
        world, told = TOLD[question.document]
        edges = edges_of(tuple(statement.canonical() for statement in told))
        right = []
        for option in question.options:
            asked = statement_of(question, option)
            here = asked.subject
            for step in asked.chain:
                here = dict(edges.get(here, [])).get(step, "")
            right.append(here == option)
        assert [i for i, is_right in enumerate(right) if is_right] == [question.gold]
        assert len(set(question.options)) == 4
        assert len({world.entities[option] for option in question.options}) == 1


def test_the_tags_say_how_far_the_answer_is_from_the_text():
    for question in QUESTIONS:
        asked = statement_of(question, question.options[question.gold])
        _, told = TOLD[question.document]
        if len(asked.chain) > 1:
            wanted = {f"hop{len(asked.chain)}", "inferred"}
        else:
            wanted = {"same"} if asked in told else {"reverse", "inferred"}
        assert set(question.tags) - {"lured"} == wanted
    counts = Counter(tag for question in QUESTIONS for tag in question.tags)
    assert counts["same"] == counts["reverse"] == 12 * 6
    assert (
        min(counts["hop2"], counts["hop3"]) > 10 and counts["lured"] > 0
    )  # few: a lure needs many facts about one entity


@pytest.mark.parametrize("hops", [1, 2])
def test_no_question_reaches_further_than_asked(hops):
    documents = WorldDocuments(world=WorldConfig(seed=3, num_documents=2, max_hops=hops))
    questions = WorldQuestions(documents=documents).load()
    assert max(len(statement_of(q, q.options[0]).chain) for q in questions) == hops
