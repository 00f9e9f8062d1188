"""Laws of the cache: prefill and decode compute what a forward pass computes, and rows never meet."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.cache import CacheConfig, copy_row, decoding_params, empty_cache, extend, next_logits
from pretrain.model.layers import Rope, linear, linear_by_columns
from pretrain.model.moe import MoeConfig
from pretrain.model.transformer import LayerKind, ModelConfig, abstract_params, forward, logits
from pretrain.sharding import MeshConfig, make_mesh

VOCAB = 40
MAX_LENGTH = 12
CHUNK = 4

LLAMA = ModelConfig(
    num_layers=2, width=24, num_heads=4, num_kv_heads=2, head_width=8, hidden_width=32, qk_norm=False,
    dtype="float32",
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "experts": dataclasses.replace(LLAMA, moe=MoeConfig(num_experts=4, num_active=2)),
    "canon": dataclasses.replace(LLAMA, short_conv=4),
    "qwen": dataclasses.replace(LLAMA, num_kv_heads=1, qk_norm=True, qkv_bias=True, tied_head=True, base_width=8),
    "gemma": dataclasses.replace(
        LLAMA, num_layers=3, qk_norm=True, tied_head=True, embed_scale=True, norm_plus_one=True, post_norms=True,
        activation="gelu_tanh", attention_scale=0.3, attention_softcap=3.0, final_softcap=2.0,
        layer_pattern=(LayerKind(window=3), LayerKind(rope=Rope(theta=50.0))),
    ),
}  # fmt: skip


@functools.cache
def random_params(config):
    """Every leaf random, norms and biases too; small enough for logits near one."""
    shapes, tree = jax.tree.flatten(abstract_params(config, VOCAB))
    rng = np.random.default_rng(0)
    leaves = [rng.normal(scale=0.2 if s.ndim > 2 else 0.5, size=s.shape).astype(np.float32) for s in shapes]
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, config, tokens_BT, positions_BT, segments_BT):
    return logits(forward(params, config, tokens_BT, positions_BT, segments_BT), params, config)


@functools.partial(jax.jit, static_argnames="config")
def step(params, config, tokens_BT, num_new_B, cache):
    hidden_BTD, cache = extend(params, config, tokens_BT, num_new_B, cache, max_length=MAX_LENGTH)
    return next_logits(hidden_BTD, params, config), cache


def caches(config, rows, dtype="float32"):
    return empty_cache(config, CacheConfig(rows=rows, max_length=MAX_LENGTH, max_extend=CHUNK, dtype=dtype))


def give(config, texts, prefill, *, cache=None):
    """Logits [row][position, V] of texts whose first `prefill` tokens come in chunks and the others one by one."""
    params = decoding_params(random_params(config), config)
    cache = caches(config, len(texts)) if cache is None else cache
    found, done = [[] for _ in texts], np.zeros(len(texts), int)
    while any(done < [len(t) for t in texts]):
        size = CHUNK if any(done < np.minimum(prefill, [len(t) for t in texts])) else 1
        tokens, num_new = np.zeros((len(texts), size), np.int32), np.zeros(len(texts), np.int32)
        for b, text in enumerate(texts):
            end = min(done[b] + size, prefill[b] if size > 1 else len(text))
            part = text[done[b] : max(end, done[b])]
            tokens[b, : len(part)], num_new[b] = part, len(part)
        out, cache = step(params, config, tokens, num_new, cache)
        for b, n in enumerate(num_new):
            found[b].append(np.asarray(out)[b, :n])
        done += num_new
    return [np.concatenate(parts) for parts in found], cache


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_forward_pass_of_a_packed_row(family):
    """Documents of a packed row against rows of a cache: chunks end inside and at the end of the window."""
    config = FAMILIES[family]
    lengths, prefill = (12, 7, 5), (6, 4, 0)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    tokens = np.concatenate(texts)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    expected = np.asarray(all_logits(random_params(config), config, tokens, positions, segments))[0]
    found, cache = give(config, texts, np.array(prefill))
    np.testing.assert_array_equal(cache.lengths_B, lengths)
    np.testing.assert_allclose(
        np.concatenate(found), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max())
    )


def test_a_layer_with_a_window_keeps_a_ring():
    cache = caches(FAMILIES["gemma"], 2)
    assert [k.shape[2] for k in cache.k] == [3 + CHUNK - 1, MAX_LENGTH, 3 + CHUNK - 1]


@pytest.mark.parametrize("family", ["gemma", "canon"])
def test_a_row_keeps_its_bits_in_any_batch_and_place(family):
    config = FAMILIES[family]
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (12, 5, 9)]
    prefill = np.array([8, 2, 3])
    together, _ = give(config, texts, prefill)
    nothing = np.zeros(0, np.int32)
    for b, text in enumerate(texts):
        for place in range(3):
            alone = [nothing] * place + [text] + [nothing] * (2 - place)
            found, _ = give(config, alone, np.where(np.arange(3) == place, prefill[b], 0))
            np.testing.assert_array_equal(found[place], together[b])


@pytest.mark.parametrize("family", ["gemma", "canon"])
def test_padding_and_idle_rows_leave_the_cache_alone(family):
    config = FAMILIES[family]
    texts = [np.arange(6, dtype=np.int32), np.arange(3, dtype=np.int32)]
    _, cache = give(config, texts, np.array([6, 3]))
    params = decoding_params(random_params(config), config)
    _, after = step(params, config, np.full((2, CHUNK), 7, np.int32), np.array([2, 0], np.int32), cache)
    for before, now in zip((*cache.k, *cache.v), (*after.k, *after.v), strict=True):
        np.testing.assert_array_equal(now[1], before[1])
        changed = (np.asarray(now[0]) != np.asarray(before[0])).any(axis=(0, 2))
        np.testing.assert_array_equal(np.flatnonzero(changed), np.sort(np.array([6, 7]) % now.shape[2]))
    for before, now in zip(cache.recent, after.recent, strict=True):
        np.testing.assert_array_equal(now[1], before[1])


def test_a_row_that_begins_anew_reads_nothing_of_the_text_before_it():
    config = FAMILIES["canon"]
    first, second = np.arange(9, dtype=np.int32), np.arange(20, 26, dtype=np.int32)
    expected, _ = give(config, [second], np.array([3]))
    _, used = give(config, [first], np.array([4]))
    assert len(used.recent) == config.num_layers
    again = dataclasses.replace(used, lengths_B=np.zeros(1, np.int32))
    found, _ = give(config, [second], np.array([3]), cache=again)
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("family", ["gemma", "canon"])
def test_a_copied_row_goes_on_as_its_original(family):
    config = FAMILIES[family]
    text = np.arange(10, dtype=np.int32)
    expected, _ = give(config, [text[:0], text], np.array([0, 4]))
    _, half = give(config, [text[:0], text[:6]], np.array([0, 4]))
    copied = copy_row(caches(config, 2), np.int32(0), half, np.int32(1))
    params = decoding_params(random_params(config), config)
    for i in range(6, 10):
        out, copied = step(params, config, np.array([[i], [0]], np.int32), np.array([1, 0], np.int32), copied)
        np.testing.assert_array_equal(np.asarray(out)[0, 0], expected[1][i])


def test_a_narrow_cache_costs_little():
    config = FAMILIES["llama"]
    text = np.arange(12, dtype=np.int32)
    wide, _ = give(config, [text], np.array([8]))
    narrow, cache = give(config, [text], np.array([8]), cache=caches(config, 1, "bfloat16"))
    assert {x.dtype.name for x in (*cache.k, *cache.v)} == {"bfloat16"}
    assert 0 < np.abs(narrow[0] - wide[0]).max() < 0.02 * np.abs(wide[0]).max()


def test_weights_are_cast_once_and_norms_stay_wide():
    params = decoding_params(random_params(LLAMA), dataclasses.replace(LLAMA, dtype="bfloat16"))
    dtypes = {path[-1].key: leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert dtypes.pop("scale") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}
    assert len(params["layers"]) == LLAMA.num_layers
    assert "blocks" not in params


def test_heads_that_the_tensor_axis_cannot_split_are_refused():
    config = dataclasses.replace(LLAMA, num_heads=6, num_kv_heads=3)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="num_kv_heads and mesh.tensor"):
        caches(config, 1)


@pytest.mark.parametrize("rows", [3, 65])
def test_matrices_with_their_outputs_first_give_the_same_products(rows):
    """Few rows are multiplied as columns, many as rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, rows, 4, 6)).astype(np.float32)
    weight = rng.normal(size=(4, 6, 5, 3)).astype(np.float32)
    dims = ("batch", "time", None, None)
    turned = linear_by_columns(x, weight.transpose(2, 3, 0, 1), dims)
    np.testing.assert_allclose(turned, linear(x, weight, dims), atol=1e-4)
