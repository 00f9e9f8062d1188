"""What a base reads: the second telling follows from the first, nothing tells of the niche, every word is known."""

from dataclasses import replace

import pytest

from synth.worlds.background import OpenBook, Recurring, RecurringQuestions
from synth.worlds.niche import WorldDocuments
from synth.worlds.render import read, read_sentence, sentences_of
from synth.worlds.words import WordsConfig
from synth.worlds.world import WorldConfig, closure, edges_of, make_worlds

NUM_NAMES = 512
WORLD = WorldConfig(seed=5, num_documents=2, num_names=NUM_NAMES)
BOOK = OpenBook(
    name="book", seed=2, count=20, num_names=NUM_NAMES, num_facts=(3, 12), num_questions=9, hop_share=0.5
)
RECURRING = Recurring(name="recurring", seed=3, count=40, world=WORLD, num_worlds=4)
SOURCES = (BOOK, RECURRING)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_a_larger_count_continues_a_smaller_one(source):
    assert list(replace(source, count=8).texts())[:5] == list(replace(source, count=5).texts())


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_every_word_is_in_the_vocabulary_and_comes_back(source):
    tokenizer = WordsConfig(num_names=NUM_NAMES).build("", lambda max_bytes: iter(()))
    unknown = tokenizer.encode("Zzzyx")[0]
    for text in source.texts():
        ids = tokenizer.encode(text)
        assert unknown not in ids
        assert tokenizer.decode(ids).replace(" .", ".").replace(" ,", ",") == text.replace(" .", ".")


def test_the_answers_follow_from_the_document_before_them_and_alone_are_learned():
    hops, facts = set(), set()
    for document in BOOK.build("").documents():
        sentences = sentences_of(document.text)
        told = [read_sentence(sentence) for sentence in sentences]
        asked = [s for s, text in zip(told, sentences, strict=True) if text.startswith("Asked")]
        assert 1 <= len(asked) <= BOOK.num_questions
        assert [document.text[start:stop] for start, stop in document.learned] == [s.object for s in asked]
        edges = edges_of(tuple(s.canonical() for s in told[: len(told) - len(asked)]))
        for statement in asked:
            here = statement.subject
            for step in statement.chain:
                here = dict(edges[here])[step]
            assert here == statement.object
        assert len(set(asked)) == len(asked)
        hops.update(len(statement.chain) for statement in asked)
        facts.add(len(told) - len(asked))
    assert hops == {1, 2}
    assert min(facts) >= 3 and max(facts) <= 12 and len(facts) > 4


def test_recurring_texts_are_learned_whole():
    assert {document.learned for document in RECURRING.build("").documents()} == {None}


@pytest.mark.parametrize("count", [1, 9, 12, 24])
def test_a_world_of_few_facts_names_all_it_can(count):
    for world in make_worlds(replace(WORLD, num_facts=count, num_documents=9)):
        named = {name for fact in world.facts for name in (fact.subject, fact.object)}
        assert len(world.facts) == count
        assert count < 12 or len(named) == 17  # every entity, so that no option can be ruled out
        full = replace(WORLD, num_documents=9)
        (whole,) = [w for w in make_worlds(full) if w.name == world.name and w.entities == world.entities]
        assert set(world.facts) <= set(whole.facts)


def test_recurring_worlds_share_no_name_with_the_niche():
    niche = {name for world, _, _ in WorldDocuments(world=WORLD).tell() for name in world.entities}
    beside = {name for world in RECURRING.worlds() for name in world.entities}
    assert len(beside) == 4 * 17
    assert not niche & beside


def test_recurring_texts_tell_their_worlds_alone_and_tell_all_of_them():
    known = {s.canonical() for world in RECURRING.worlds() for s in closure(world.facts, WORLD.max_hops)}
    told = set().union(*(read(text) for text in RECURRING.texts()))
    assert told <= known
    facts = {fact for world in RECURRING.worlds() for fact in world.facts}
    assert facts <= told


def test_the_held_out_questions_are_in_no_text():
    texts = " ".join(replace(RECURRING, count=400).texts())
    kept = RecurringQuestions(recurring=RECURRING).load()
    asked = sum(len(shown) for shown, _ in map(RECURRING.split, RECURRING.worlds()))
    assert 0.15 < len(kept) / (len(kept) + asked) < 0.35
    assert not [q.id for q in kept if f"{q.text} " in texts]
