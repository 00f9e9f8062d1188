"""Embedding: a document's vector depends on the document alone, not on its batch, bucket or shard."""

import functools

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.transformer import ModelConfig, forward, init_params
from pretrain.tokenizer import ByteTokenizer
from synth.sbp.embed import HashedWordsConfig, OwnStates, OwnStatesConfig, buckets

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32", scan_layers=False
)  # fmt: skip
TEXTS = ["short", "a text of some length", "x" * 70, "another one", "y" * 31, "z" * 200, ""]


PARAMS = functools.cache(lambda: init_params(MODEL, ByteTokenizer().vocab_size, 0))


@pytest.fixture(scope="module")
def own_states():
    return OwnStates(OwnStatesConfig(max_tokens=64, tokens_at_once=256), PARAMS(), MODEL, ByteTokenizer())


def test_the_vector_is_the_mean_of_the_models_hidden_states(own_states):
    vectors = own_states.vectors(TEXTS)
    ids = np.array([[257, *TEXTS[1].encode()]], np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    hidden = np.asarray(forward(PARAMS(), MODEL, ids, positions, None))
    assert vectors[1] == pytest.approx(hidden[0].mean(axis=0), abs=1e-5)


def test_company_and_order_change_nothing(own_states):
    vectors = own_states.vectors(TEXTS)
    for i, text in enumerate(TEXTS):
        assert own_states.vectors([text])[0] == pytest.approx(vectors[i], abs=1e-6)
    assert own_states.vectors(TEXTS[::-1])[::-1] == pytest.approx(vectors, abs=1e-6)


def test_a_long_text_is_cut(own_states):
    assert (own_states.vectors(["z" * 200]) == own_states.vectors(["z" * 63])).all()


def test_every_text_lies_in_the_shortest_bucket_that_holds_it():
    lengths = [1, 32, 33, 64, 65, 100]
    found = dict(buckets(lengths, 100))
    assert found == {32: [0, 1], 64: [2, 3], 100: [4, 5]}


def test_hashed_words_know_words_only():
    embedder = HashedWordsConfig(width=32).build(None)
    a, b, c = embedder.vectors(["the cat sat", "sat the cat", "dogs run far"])
    assert (a == b).all()
    assert abs(a @ c) < abs(a @ b)


def test_configs_refuse_what_they_cannot_be():
    with pytest.raises(ConfigError, match="max_tokens"):
        OwnStatesConfig(max_tokens=100, tokens_at_once=10)
    with pytest.raises(ConfigError, match="width"):
        HashedWordsConfig(width=0)
