"""What a base reads: the second telling follows from the first, nothing tells of the niche, every word is known."""

from dataclasses import replace

import pytest

from synth.worlds.background import Copies, Recurring, RecurringQuestions, Retold
from synth.worlds.niche import WorldDocuments
from synth.worlds.render import read, read_sentence, sentences_of
from synth.worlds.words import WordsConfig
from synth.worlds.world import WorldConfig, closure, edges_of

NUM_NAMES = 512
WORLD = WorldConfig(seed=5, num_documents=2, num_names=NUM_NAMES)
COPIES = Copies(name="copies", seed=1, count=5, num_names=NUM_NAMES)
RETOLD = Retold(name="retold", seed=2, count=5, num_names=NUM_NAMES)
RECURRING = Recurring(name="recurring", seed=3, count=40, world=WORLD, num_worlds=4)
SOURCES = (COPIES, RETOLD, RECURRING)


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


def test_copies_say_the_same_again():
    for text in COPIES.texts():
        names = text.split()[:-1]
        assert names[:24] == names[24:48] == names[48:]


def test_what_is_retold_follows_from_the_document_before_it():
    for text in RETOLD.texts():
        sentences = sentences_of(text)
        told = [read_sentence(sentence) for sentence in sentences]
        facts = tuple(statement.canonical() for statement in told[: len(sentences) - RETOLD.retellings])
        assert all(len(fact.chain) == 1 for fact in facts)
        edges = edges_of(facts)
        for statement in told[len(facts) :]:
            here = statement.subject
            for step in statement.chain:
                here = dict(edges[here])[step]
            assert here == statement.object


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
