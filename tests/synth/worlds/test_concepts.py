"""The concept world against its closed forms: exact entropies, probabilities that sum to one, draws that follow them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import ConfigError
from synth.llm.budget import Budget
from synth.stage import Shard, Tally
from synth.worlds.concepts import (
    ConceptDocuments,
    ConceptFloor,
    ConceptWorldConfig,
    WordTokenizerConfig,
    exact_information,
    make_concept_world,
)

TWO = ((0.9, 0.1), (0.1, 0.9))
FOUR = tuple(tuple(0.7 if i == j else 0.1 for j in range(4)) for i in range(4))
TINY = ConceptWorldConfig(
    seed=3, num_concepts=3, num_genres=2, num_words=4, words_per_concept=3, words_per_genre=2, min_length=1, max_length=3
)  # fmt: skip


@pytest.mark.parametrize(
    ("table", "num_words", "wanted"),
    [
        (TWO, 1, (0.693147, 0.471393, 0.221754, 0.368064)),
        (TWO, 4, (1.939371, 1.348819, 0.590552, 0.639039)),
        (FOUR, 2, (2.605975, 2.213721, 0.392254, 0.725079)),
        (FOUR, 8, (8.825932, 7.601776, 1.224156, 1.302348)),
    ],
)
def test_exact_information_of_independent_words(table, num_words, wanted):
    found = exact_information(table, num_words)
    values = (found.entropy, found.conditional_entropy, found.between_documents, found.with_concept)
    assert values == pytest.approx(wanted, abs=1e-6)


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_a_document_says_no_more_about_another_than_about_the_concept(num_words, weights):
    table = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    found = exact_information(table, num_words)
    assert -1e-9 <= found.between_documents <= found.with_concept + 1e-9
    assert found.with_concept <= math.log(len(weights)) + 1e-9
    assert found.entropy - found.conditional_entropy == pytest.approx(found.between_documents, abs=1e-9)


def every_document(config):
    for length in range(config.min_length, config.max_length + 1):
        yield from itertools.product(range(config.num_words), repeat=length)


def test_probabilities_of_all_documents_sum_to_one_alone_and_after_any_first():
    world = make_concept_world(TINY)
    assert sum(math.exp(-world.alone_nats(d)) for d in every_document(TINY)) == pytest.approx(1, abs=1e-6)
    for first in ((0,), (1, 2, 3)):
        if math.isfinite(world.alone_nats(first)):
            total = sum(math.exp(-world.after_nats(first, d)) for d in every_document(TINY))
            assert total == pytest.approx(1, abs=1e-6)


def test_draws_follow_the_probabilities():
    """Mean surprise of draws against the entropy, and of seconds after firsts of their concept: within 4 standard errors."""
    world = make_concept_world(TINY)
    nats = [world.alone_nats(d) for d in every_document(TINY)]
    entropy = sum(math.exp(-n) * n for n in nats if math.isfinite(n))
    drawn = [world.document(i) for i in range(3000)]
    alone = np.array([world.alone_nats(words) for _, _, words in drawn])
    assert abs(alone.mean() - entropy) < 4 * alone.std() / math.sqrt(len(alone))
    after = np.array(
        [world.after_nats(world.document_of(c, i)[2], words) for i, (c, _, words) in enumerate(drawn)]
    )
    gain = alone - after
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))  # H(d2 | d1) < H(d2)
    concepts = np.bincount([c for c, _, _ in drawn], minlength=3) / len(drawn)
    assert concepts == pytest.approx(world.concept_K, abs=0.04)


def test_genre_is_independent_of_concept():
    world = make_concept_world(TINY)
    table = np.zeros((3, 2))
    for i in range(3000):
        concept, genre, _ = world.document(i)
        table[concept, genre] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 13.8  # chi squared, 2 degrees of freedom, 0.1 %


def test_a_document_is_a_function_of_seed_and_index():
    config = ConceptWorldConfig(num_concepts=5)
    one, two = make_concept_world(config), make_concept_world(config)
    assert one.document(17) == two.document(17)
    assert one.document(17) != one.document(18)
    assert make_concept_world(ConceptWorldConfig(num_concepts=5, seed=1)).document(17) != one.document(17)


def test_texts_tokens_and_words_are_one_to_one():
    config = ConceptWorldConfig(num_concepts=5)
    world = make_concept_world(config)
    assert len(set(config.words())) == config.num_words
    tokenizer = WordTokenizerConfig(words=config.words()).build("", None)
    for i in range(20):
        words = world.document(i)[2]
        text = world.write(words)
        assert world.read(text) == words
        assert tokenizer.encode(text) == words
        assert tokenizer.decode(words) == text
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id}
    assert min(specials) >= config.num_words
    assert len(specials) == 4


def test_the_floor_is_the_mean_surprise_per_word_and_end_mark():
    world = make_concept_world(TINY)
    documents = [world.document(i)[2] for i in range(50)]
    nats = sum(world.alone_nats(d) for d in documents)
    floor = ConceptFloor(world=TINY).nats_per_token([world.write(d) for d in documents])
    assert floor["best possible"] == pytest.approx(nats / sum(len(d) + 1 for d in documents))


def test_a_world_refuses_what_it_cannot_be():
    with pytest.raises(ConfigError) as error:
        ConceptWorldConfig(num_words=8, max_length=3, genre_share=2.0)
    assert len(error.value.faults) == 3
    with pytest.raises(ValueError, match="1 to 3 words"):
        make_concept_world(TINY).log_probability([0] * 4)


def test_documents_are_the_same_in_any_number_of_shards(tmp_path):
    def run(index, count):
        shard = Shard(
            index=index, count=count, recipe="", scratch=tmp_path, needed={}, budget=Budget(), tally=Tally()
        )
        return list(ConceptDocuments(world=TINY, num_documents=20).run((), shard=shard))

    whole = run(0, 1)
    parts = [run(index, 3) for index in range(3)]
    assert sorted((d for part in parts for d in part), key=lambda d: d.id) == whole
