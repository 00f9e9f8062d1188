"""Laws of generation: a text is a function of its request, none is lost, and the numbers are the model's."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import pretrain.generate as generate_module
from pretrain.config import ConfigError
from pretrain.generate import Completion, GenerateConfig, Generator, Request, SampleConfig, sample_texts
from pretrain.model.transformer import LayerKind, ModelConfig, forward, init_params, logits
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.vocab_size
# A ring, a whole cache and short convolutions: all that a row can remember.
MODEL = ModelConfig(
    num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_width=8, hidden_width=48, dtype="float32",
    layer_pattern=(LayerKind(window=20), LayerKind()), short_conv=4,
)  # fmt: skip
CONFIG = GenerateConfig(max_length=64, slots=4, chunk_tokens=16, look_every_tokens=4)


@functools.cache
def params(seed=0):
    return with_taps(init_params(MODEL, VOCAB, seed))


def with_taps(params):
    """Short convolutions begin as the identity, which would hide them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: value + 0.3 if path[-1].key == "taps" else value, params
    )


@functools.cache
def generator():
    """One for all tests: nothing of a call may reach the next."""
    return Generator(params(), MODEL, CONFIG, tokenizer=TOKENIZER)


def random_ids(rng, n):
    return tuple(rng.integers(0, 256, n).tolist())


def mixed_requests(count, seed=0):
    """Prompts of 1 to 45 tokens, 1 to 15 new ones, every setting on somewhere."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            ids=random_ids(rng, int(rng.integers(1, 46))),
            max_new_tokens=int(rng.integers(1, 16)),
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.integers(1, 40)) if rng.uniform() < 0.3 else None,
            top_p=0.9 if rng.uniform() < 0.3 else 1.0,
            min_p=0.05 if rng.uniform() < 0.2 else 0.0,
            repetition_penalty=1.3 if rng.uniform() < 0.2 else 1.0,
            seed=i,
        )
        for i in range(count)
    ]


@functools.cache
def _all_logprobs():
    @jax.jit
    def run(params, tokens_BT, positions_BT):
        z = logits(forward(params, MODEL, tokens_BT, positions_BT, None), params, MODEL)
        return jax.nn.log_softmax(z)

    return run


def model_logprobs(ids):
    """Log-probabilities after each prefix of `ids`, by one forward pass of a padded row: [T, V]."""
    tokens = np.zeros((1, CONFIG.max_length), np.int32)
    tokens[0, : len(ids)] = ids
    positions = np.arange(CONFIG.max_length, dtype=np.int32)[None]
    return np.asarray(_all_logprobs()(params(), tokens, positions))[0, : len(ids)]


# --- the numbers are the model's ---------------------------------------------------------------------


def test_greedy_text_and_log_probabilities_are_those_of_the_forward_pass():
    rng = np.random.default_rng(0)
    requests = [Request(ids=random_ids(rng, n), max_new_tokens=14, temperature=0.0) for n in (1, 16, 17, 40)]
    for request, completion in zip(requests, generator().generate(requests), strict=True):
        z = model_logprobs(request.ids + completion.ids)
        for j, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
            before = z[len(request.ids) + j - 1]
            assert token == before.argmax()
            assert logprob == pytest.approx(before[token], abs=1e-5)


def test_a_score_is_the_log_probability_of_each_token_from_its_start():
    rng = np.random.default_rng(1)
    rows = [random_ids(rng, n) for n in (2, 17, 33, 50)]
    starts = [1, 16, 20, 50]
    for row, start, score in zip(rows, starts, generator().score(rows, starts), strict=True):
        z = model_logprobs(row)
        assert len(score.logprobs) == len(score.greedy) == len(row) - start
        for j, (logprob, greedy) in enumerate(zip(score.logprobs, score.greedy, strict=True), start=start):
            assert logprob == pytest.approx(z[j - 1, row[j]], abs=1e-5)
            assert greedy == (z[j - 1].argmax() == row[j])


def test_a_score_of_a_generated_text_is_what_its_generation_reported():
    request = Request(ids=(5, 6, 7), max_new_tokens=20, temperature=1.0, seed=3)
    completion = generator().generate([request])[0]
    score = generator().score([request.ids + completion.ids], [3])[0]
    np.testing.assert_allclose(score.logprobs, completion.logprobs, rtol=0, atol=1e-5)


# --- a text is a function of its request -------------------------------------------------------------


def test_64_requests_of_unequal_length_are_all_served_by_the_programs_of_the_first():
    generator().generate(mixed_requests(2))
    compiled = [f._cache_size() for f in (generate_module._decode, generate_module._admit)]
    requests = mixed_requests(64)
    completions = generator().generate(requests)
    assert [len(c.ids) for c in completions] == [r.max_new_tokens for r in requests]
    assert all(len(c.logprobs) == len(c.ids) for c in completions)
    assert {c.finish for c in completions} == {"length"}
    assert [f._cache_size() for f in (generate_module._decode, generate_module._admit)] == compiled


def test_a_text_is_the_same_alone_in_any_batch_and_in_any_order():
    """Bit for bit: the ids and the log-probabilities."""
    requests = mixed_requests(10, seed=5)
    together = generator().generate(requests)
    assert generator().generate(requests[::-1])[::-1] == together
    for request, completion in zip(requests, together, strict=True):
        assert generator().generate([request]) == [completion]


def test_texts_come_as_they_end_and_each_once():
    requests = [Request(ids=(i,), max_new_tokens=n, seed=i) for i, n in enumerate((30, 2, 9, 1, 5))]
    order = [index for index, _ in generator().stream(requests)]
    assert sorted(order) == list(range(5))
    assert order[-1] == 0


def test_another_seed_another_text():
    requests = [Request(ids=(1, 2), max_new_tokens=20, seed=s) for s in (1, 2, 1)]
    a, b, again = (c.ids for c in generator().generate(requests))
    assert a == again
    assert a != b


# --- shared beginnings -------------------------------------------------------------------------------


def fresh():
    return Generator(params(), MODEL, CONFIG, tokenizer=TOKENIZER)


def test_many_texts_of_one_prompt_prefill_it_once():
    prompt = random_ids(np.random.default_rng(3), 37)
    requests = [Request(ids=prompt, max_new_tokens=6, seed=s) for s in range(9)]
    g = fresh()
    completions = g.generate(requests)
    assert g.stats.prompt_tokens == 9 * 37
    assert g.stats.prefilled_tokens == 37
    assert len({c.ids for c in completions}) > 1
    assert [generator().generate([r])[0] for r in requests] == completions


def test_a_common_beginning_is_prefilled_once_and_changes_no_bit():
    rng = np.random.default_rng(4)
    shots = random_ids(rng, 35)  # two chunks of it can be shared
    requests = [Request(ids=shots + random_ids(rng, 3 + i), max_new_tokens=5, seed=i) for i in range(6)]
    g = fresh()
    completions = g.generate(requests)
    assert g.stats.prefilled_tokens == sum(len(r.ids) for r in requests) - 5 * 32
    assert [fresh().generate([r])[0] for r in requests[:2]] == completions[:2]
    rows = [r.ids for r in requests]
    together = g.score(rows, [34] * 6)
    assert [fresh().score([row], [34])[0] for row in rows[:2]] == together[:2]


def test_what_is_kept_is_bounded():
    rng = np.random.default_rng(5)
    g = fresh()
    heads = [random_ids(rng, 16) for _ in range(8)]
    g.generate([Request(ids=h + random_ids(rng, 4), max_new_tokens=1) for h in heads for _ in range(2)])
    assert 0 < len(g._prefixes) <= CONFIG.prefix_entries


# --- ends --------------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_text_and_is_its_last_id():
    request = Request(ids=(3, 4, 5), max_new_tokens=30, temperature=0.9, seed=1)
    free = generator().generate([request])[0]
    token = free.ids[9]
    first = free.ids.index(token)
    ended = generator().generate([dataclasses.replace(request, stop_ids=(token,))])[0]
    assert ended.finish == "stop"
    assert ended.ids == free.ids[: first + 1]
    assert ended.logprobs == free.logprobs[: first + 1]
    assert ended.text == TOKENIZER.decode(free.ids[:first])


def test_the_tokens_counted_are_those_delivered():
    """Texts that end at ids and at strings inside a look of four tokens: what was drawn behind is not counted."""
    prompts = [random_ids(np.random.default_rng(i), 6) for i in range(6)]
    whole = [Request(ids=ids, max_new_tokens=15, temperature=0.0, seed=i) for i, ids in enumerate(prompts)]
    free = generator().generate(whole)
    requests = []
    for i, (request, text) in enumerate(zip(whole, free, strict=True)):
        plain = [c for c in text.text if c != "\ufffd"]
        ends = {"stop": (plain[0],)} if i % 2 and plain else {"stop_ids": (text.ids[i],)}
        requests.append(dataclasses.replace(request, **ends))
    before, reports = generator().stats.new_tokens, []
    ended = generator().generate(requests, report=reports.append)
    delivered = sum(len(completion.ids) for completion in ended)
    assert delivered < sum(len(completion.ids) for completion in free)
    assert reports[-1].new_tokens == delivered == generator().stats.new_tokens - before


def test_a_stop_string_ends_the_text_before_it():
    request = Request(ids=(70, 71), max_new_tokens=40, temperature=0.9, seed=2)
    free = generator().generate([request])[0]
    text = TOKENIZER.decode(free.ids)
    stop = next(text[i : i + 2] for i in range(5, len(text)) if "\ufffd" not in text[i : i + 2])
    ended = generator().generate([dataclasses.replace(request, stop=("never", stop))])[0]
    assert ended.finish == "stop"
    assert ended.text == text[: text.index(stop)]
    assert stop in TOKENIZER.decode(ended.ids)
    assert stop not in TOKENIZER.decode(ended.ids[:-1])


def test_progress_counts_texts_and_tokens():
    seen = []
    requests = mixed_requests(6)
    generator().generate(requests, report=seen.append)
    assert seen[-1].done == seen[-1].total == 6
    assert seen[-1].new_tokens >= sum(r.max_new_tokens for r in requests)
    assert seen[-1].tokens_per_second > 0
    assert [p.done for p in seen] == sorted(p.done for p in seen)


# --- parameters and meshes ---------------------------------------------------------------------------


def test_other_parameters_can_be_loaded():
    request = Request(ids=(1, 2, 3) * 8, max_new_tokens=8, temperature=0.0)
    g = fresh()
    before = g.generate([request] * 2)
    g.load(params(1))
    after = g.generate([request])
    assert after[0] != before[0]
    assert after == Generator(params(1), MODEL, CONFIG, tokenizer=TOKENIZER).generate([request])


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(fsdp=2, tensor=4), MeshConfig(replica=2, fsdp=2, expert=1, tensor=2)]
)
def test_any_mesh_gives_the_texts_of_one_device(mesh_config):
    """Slots over the data axes; tensor=4 splits two key-value heads, which are repeated."""
    mesh = make_mesh(mesh_config)
    requests = [dataclasses.replace(r, temperature=0.0) for r in mixed_requests(6, seed=8)]
    sharded = with_taps(init_params(MODEL, VOCAB, 0, mesh))
    completions = Generator(sharded, MODEL, CONFIG, tokenizer=TOKENIZER, mesh=mesh).generate(requests)
    for got, want in zip(completions, generator().generate(requests), strict=True):
        assert got.ids == want.ids
        np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


def test_prompts_prefilled_together_keep_their_bits():
    config = dataclasses.replace(CONFIG, prefill_rows=3)
    requests = mixed_requests(7, seed=9)
    g = Generator(params(), MODEL, config, tokenizer=TOKENIZER)
    together = g.generate(requests)
    for request, completion in zip(requests, together, strict=True):
        assert g.generate([request]) == [completion]


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ()}, "at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"stop": ("",)}, "must not be empty"),
    ],
)
def test_a_bad_request_is_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        Request(**{"ids": (1,), "max_new_tokens": 1, **change})
    assert len(error.value.faults) == 1


def test_requests_that_cannot_be_served_are_all_named_before_anything_runs():
    bad = [
        Request(ids=(1,) * 60, max_new_tokens=5),
        Request(ids=(1, VOCAB), max_new_tokens=1),
        Request(ids=(1,), max_new_tokens=1),
    ]
    with pytest.raises(ConfigError) as error:
        generator().stream(bad)
    assert len(error.value.faults) == 2
    assert "request 0: prompt and new tokens must fit max_length=64, got 60" in error.value.faults[0]
    assert f"request 1: token ids must lie in [0, {VOCAB}), got {VOCAB}" in error.value.faults[1]
    with pytest.raises(ConfigError, match="a tokenizer"):
        Generator(params(), MODEL, CONFIG).stream([Request(ids=(1,), max_new_tokens=1, stop=("x",))])
    with pytest.raises(ConfigError, match=r"row 0: a start must lie in \[1, 2\]"):
        generator().score([(1, 2)], [0])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError) as error:
        GenerateConfig(max_length=0, chunk_tokens=24, cache_dtype="int8")
    assert len(error.value.faults) == 3
    with pytest.raises(ConfigError, match="slots must be a multiple of the 8 parts"):
        Generator(params(), MODEL, dataclasses.replace(CONFIG, slots=4), mesh=make_mesh(MeshConfig()))


# --- samples during training -------------------------------------------------------------------------


def test_samples_begin_with_their_prompts_and_repeat():
    config = SampleConfig(prompts=("", "ab"), max_new_tokens=8, temperature=0.8, seed=3)
    texts = sample_texts(params(), MODEL, TOKENIZER, config)
    assert texts[1].startswith("ab")
    assert texts == sample_texts(params(), MODEL, TOKENIZER, config)
    assert sample_texts(params(), MODEL, TOKENIZER, dataclasses.replace(config, prompts=())) == []


def test_a_completion_says_what_came():
    completion = generator().generate([Request(ids=(72, 105), max_new_tokens=3, temperature=0.0)])[0]
    assert isinstance(completion, Completion)
    assert completion.text == TOKENIZER.decode(completion.ids)
