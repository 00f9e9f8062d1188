"""Our own model as the language model: scores against the dense softmax, whatever else is in the batch."""

import asyncio
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pretrain.model.transformer import ModelConfig, Params, forward, init_params, logits
from pretrain.tokenizer import ByteTokenizer, Tokenizer
from synth.llm.api import BadRequest, Request
from synth.llm.local import LocalConfig

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32"
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Weights drawn from a seed, so that no checkpoint is needed."""

    seed: int = 0

    def model_config(self) -> ModelConfig:
        return MODEL

    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    def vocab_size(self) -> int:
        return ByteTokenizer().vocab_size

    def params(self, model: ModelConfig, mesh: Mesh | None = None) -> Params:
        drawn = init_params(model, ByteTokenizer().vocab_size, self.seed)
        return jax.tree.map(lambda x: 8.0 * x, drawn)  # far from uniform, so that mistakes show


LENGTH = 32


@jax.jit
def padded_logits(params: Params, tokens_1T: jax.Array) -> jax.Array:
    hidden = forward(params, MODEL, tokens_1T, jnp.arange(LENGTH)[None, :], None)
    return logits(hidden, params, MODEL)[0]


def dense_logits(ids: list[int]) -> np.ndarray:
    """Causal, so what pads a row changes nothing before it."""
    tokens_1T = np.zeros((1, LENGTH), np.int32)
    tokens_1T[0, : len(ids)] = ids
    return np.asarray(padded_logits(Drawn().params(MODEL), tokens_1T), np.float64)[: len(ids)]


def dense_score(ids: list[int], first: int) -> float:
    logits_TV = dense_logits(ids)
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    return float(sum(logprobs_TV[t - 1, ids[t]] for t in range(first, len(ids))))


def ask(config: LocalConfig, calls) -> list:
    async def run():
        llm = config.build()
        return await asyncio.gather(*(call(llm) for call in calls))

    return asyncio.run(run())


def test_a_score_is_the_sum_of_log_probabilities_of_the_continuation():
    tokenizer = ByteTokenizer()
    plain = [tokenizer.bos_id, *b"abc"]
    pair = [*plain, tokenizer.sep_id]
    for form, start in (("plain", plain), ("pair", pair)):
        (found,) = ask(LocalConfig(weights=Drawn(), form=form), [lambda llm: llm.score("abc", " de")])
        assert found == pytest.approx(dense_score([*start, *b" de"], len(start)), rel=1e-4)


def test_a_score_does_not_depend_on_what_is_asked_with_it():
    prompts = ["x" * length for length in (1, 3, 30, 31, 32, 70)]
    calls = [lambda llm, p=p: llm.score(p, " yes") for p in prompts]
    together = ask(LocalConfig(weights=Drawn()), calls)
    alone = [ask(LocalConfig(weights=Drawn()), [call])[0] for call in calls]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_greedy_reply_takes_the_likeliest_token_and_counts_what_it_used():
    request = Request(system="", user="ab", max_tokens=4, temperature=0.0)
    (reply,) = ask(LocalConfig(weights=Drawn(), max_length=32, slots=2), [lambda llm: llm.generate(request)])
    ids = [ByteTokenizer().bos_id, *b"ab"]
    for _ in range(4):
        ids.append(int(dense_logits(ids)[-1].argmax()))
        if ids[-1] == ByteTokenizer().eos_id:
            break
    assert reply.text == ByteTokenizer().decode(ids[3:]).strip()
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, len(ids) - 3)


def test_a_request_that_does_not_fit_is_refused_before_anything_runs():
    request = Request(system="", user="ab", max_tokens=30)
    with pytest.raises(BadRequest, match="max_length=32 tokens, got 3 and 30"):
        ask(LocalConfig(weights=Drawn(), max_length=32), [lambda llm: llm.generate(request)])


def test_other_weights_are_another_identity():
    config = LocalConfig(weights=Drawn())
    assert config.identity() == LocalConfig(weights=Drawn()).identity()
    assert config.identity() != LocalConfig(weights=Drawn(seed=1)).identity()
    assert config.identity() != LocalConfig(weights=Drawn(), form="pair").identity()
