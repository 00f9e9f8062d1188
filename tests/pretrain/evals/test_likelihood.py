"""A text's score is the chain rule's, whatever it was packed with; long texts are scored token by token, each once."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.evals.choice import score_choices
from pretrain.evals.last_word import score_last_words
from pretrain.evals.likelihood import PackedScorer, continuation_row, passage_scores, window_rows
from pretrain.evals.tasks import Choice, LastWord
from pretrain.generate import Score
from pretrain.model.transformer import ModelConfig, abstract_params, forward, logits
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import BpeConfig, ByteTokenizer

V, T = 260, 32
MODEL = ModelConfig(
    num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32"
)
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32), abstract_params(MODEL, V)
    )


@pytest.fixture(scope="module")
def scorer(params):
    return PackedScorer(params, MODEL, row_length=T, batch_rows=2)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(1)
    lengths = [2, 5, 9, 31, T + 1, 3, 14, 7, 2, 20]  # the longest reads a whole row
    rows = [random.integers(0, V, length).tolist() for length in lengths]
    return rows, [1, 4, 1, 30, 16, 3, 7, 1, 2, 10]


@pytest.fixture(scope="module")
def alone(params, rows):
    """The oracle: every row in a batch of its own, log-softmax of all logits."""
    compute = jax.jit(lambda p, tokens, positions: jax.nn.log_softmax(logits(forward(p, MODEL, tokens, positions, None), p, MODEL)))  # fmt: skip
    positions = np.arange(T, dtype=np.int32)[None]
    found = []
    for row, start in zip(*rows, strict=True):
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(row)] = row[:T]
        table = np.asarray(compute(params, padded, positions))[0]
        at = range(start, len(row))
        found.append(
            Score(
                logprobs=tuple(float(table[t - 1, row[t]]) for t in at),
                greedy=tuple(bool(table[t - 1].argmax() == row[t]) for t in at),
            )
        )
    return found


def assert_same_scores(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert a.greedy == b.greedy


def test_packed_requests_score_as_they_do_alone(scorer, rows, alone):
    assert_same_scores(scorer.score(*rows), alone)
    order = np.random.default_rng(2).permutation(len(rows[0]))
    again = scorer.score([rows[0][i] for i in order], [rows[1][i] for i in order])
    assert_same_scores(again, [alone[i] for i in order])


def test_a_mesh_gives_the_scores_of_one_device(params, rows, alone):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    scorer = PackedScorer(params, MODEL, row_length=T, batch_rows=4, mesh=mesh)
    assert_same_scores(scorer.score(*rows), alone)


def test_the_likeliest_token_is_greedy(scorer, rows, alone):
    """A row continued by its own argmax is all greedy; by any other token it is not."""
    row = rows[0][2]
    tries = [[*row, token] for token in range(V)]
    scores = scorer.score(tries, [len(row)] * V)
    best = int(np.argmax([score.logprobs[0] for score in scores]))
    assert [i for i, score in enumerate(scores) if score.greedy[0]] == [best]
    assert np.exp([score.logprobs[0] for score in scores]).sum() == pytest.approx(1.0, abs=1e-5)


def test_what_cannot_be_scored_is_refused_all_at_once(scorer):
    with pytest.raises(ConfigError) as caught:
        scorer.score([[1, 2], [1] * (T + 2), [V, 1]], [2, 1, 3])
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["row 1", "row 2", "row 2"]
    with pytest.raises(ConfigError, match="must be a multiple of the 4"):
        PackedScorer({"embed": {"embedding": np.zeros((V, 16))}}, MODEL, batch_rows=6, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))  # fmt: skip


@hypothesis.given(
    ids=st.lists(st.integers(0, 99), max_size=40), length=st.integers(1, 12), prefix=st.integers(100, 101)
)
def test_windows_score_every_token_once_after_as_many_as_fit(ids, length, prefix):
    rows = window_rows(ids, prefix, length)
    assert [token for row, start in rows for token in row[start:]] == ids
    whole, scored = [prefix, *ids], 0
    for row, start in rows:
        scored += len(row) - start
        # All that is read before the last token: as much as fits, or as there is.
        assert row == whole[max(0, scored - length) : scored + 1]
    assert all(len(row) - start == length for row, start in rows[:-1])


def test_windows_are_those_of_the_harness_own_example():
    rows = window_rows(list(range(10)), -1, 4)
    assert rows == [([-1, 0, 1, 2, 3], 1), ([3, 4, 5, 6, 7], 1), ([5, 6, 7, 8, 9], 3)]


def test_a_passage_in_windows_sums_to_the_chain_rule(scorer):
    texts = ["ab", "a longer text that takes more than one row of this length", ""]
    found = passage_scores(scorer, TOKENIZER, texts, T)
    for text, total in zip(texts, found, strict=True):
        wanted = 0.0
        for row, start in window_rows(TOKENIZER.encode(text), TOKENIZER.bos_id, T):
            wanted += sum(scorer.score([row], [start])[0].logprobs)
        assert total == pytest.approx(wanted, abs=1e-4)
    assert found[2] == 0.0
    assert scorer.score([[7]], [1]) == [Score(logprobs=(), greedy=())]


def test_the_continuation_takes_the_blanks_and_merges_are_those_of_the_whole():
    bpe = BpeConfig(vocab_size=300).build("", lambda n: iter(["the cat sat on the mat " * 50]))
    for add_bos in (False, True):
        row, start = continuation_row(bpe, "the cat ", "sat on", add_bos)
        assert bpe.decode(row) == "the cat sat on"
        assert bpe.decode(row[start:]) == " sat on"
        assert (row[0] == bpe.bos_id) == add_bos
    row, start = continuation_row(bpe, "", "the", False)
    assert (row[0], start) == (bpe.bos_id, 1)
    with pytest.raises(ConfigError, match="must add a token"):
        continuation_row(bpe, "the cat", "", False)


class Unigram:
    """A scorer whose scores are known: a token costs as many nats as its id says."""

    def score(self, rows, starts):
        return [
            Score(
                logprobs=tuple(-float(t) for t in row[start:]),
                greedy=tuple(t < 100 for t in row[start:]),
            )
            for row, start in zip(rows, starts, strict=True)
        ]


def test_a_choice_is_the_likeliest_raw_and_per_character():
    items = [
        Choice(id="x", contexts=("q", "q"), continuations=(" zzz", " a"), gold=1),
        Choice(id="y", contexts=("q", "r"), continuations=(" aaaa", " z"), gold=0),
    ]
    first, second = score_choices(Unigram(), TOKENIZER, items, prefix="shots\n\n")
    assert first.logprobs == (-(32 + 3 * 122), -(32 + 97))
    assert (first.chosen, first.chosen_per_character) == (1, 1 if 129 < 398 / 3 else 0)
    assert (second.chosen, second.chosen_per_character) == (1, 0)
    assert first.metrics["accuracy"] == 1.0
    assert second.metrics == {"accuracy": 0.0, "accuracy_per_character": 1.0}


def test_the_length_of_an_option_is_in_characters_as_in_the_harness():
    """Per byte the first would be the likelier: 8 bytes and 4 characters against 3 of each."""

    class Two:
        def score(self, rows, starts):
            return [Score(logprobs=(x,), greedy=(True,)) for x in (-200.0, -100.0)]

    item = Choice(id="x", contexts=("q", "q"), continuations=(" \u00e9\u00e9\u00e9\u00e9", " abc"), gold=1)
    (found,) = score_choices(Two(), TOKENIZER, [item])
    assert -200 / 8 > -100 / 3 > -200 / 4
    assert found.chosen_per_character == 1


def test_a_last_word_counts_when_every_token_of_it_is_the_likeliest():
    items = [LastWord(id="x", context="see", word=" abc"), LastWord(id="y", context="see", word=" abcd")]
    right, wrong = score_last_words(Unigram(), TOKENIZER, items)
    assert right.metrics == {"accuracy": 1.0, "nats_per_word": 32.0 + 97 + 98 + 99}
    assert wrong.metrics["accuracy"] == 0.0
