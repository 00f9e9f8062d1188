"""Laws of the decoder: it computes what a plain float64 program computes, for every family we import."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.layers import LinearScaling, Llama3Scaling, Rope, rotate
from pretrain.model.transformer import (
    LayerKind,
    ModelConfig,
    abstract_params,
    forward,
    init_params,
    logits,
    param_specs,
)

VOCAB = 48

LLAMA = ModelConfig(
    num_layers=3,
    width=24,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    hidden_width=40,
    qk_norm=False,
    layer_pattern=(LayerKind(rope=Rope(theta=500.0, scaling=Llama3Scaling(original_length=8))),),
    dtype="float32",
)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True, layer_pattern=(LayerKind(),))
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, num_kv_heads=1, head_width=10, layer_pattern=(LayerKind(),))
GEMMA = dataclasses.replace(
    LLAMA,
    num_layers=5,  # one whole period and a rest
    qk_norm=True,
    tied_head=True,
    embed_scale=True,
    norm_plus_one=True,
    post_norms=True,
    activation="gelu_tanh",
    attention_scale=0.3,
    attention_softcap=3.0,
    final_softcap=2.0,
    layer_pattern=(
        LayerKind(window=3),
        LayerKind(window=5, rope=Rope(theta=50.0)),
        LayerKind(rope=Rope(theta=1000.0, scaling=LinearScaling(factor=4.0))),
    ),
)
CANON = dataclasses.replace(QWEN3, short_conv=4)
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA, "canon": CANON}


@functools.cache
def random_params(config, seed=0):
    """Every leaf drawn at random, norms and biases included, so that none of them hides."""
    shapes, tree = jax.tree.flatten(abstract_params(config, VOCAB))
    rng = np.random.default_rng(seed)
    leaves = [rng.normal(scale=0.4 if s.ndim > 2 else 1.0, size=s.shape).astype(np.float32) for s in shapes]
    return jax.tree.unflatten(tree, leaves)


def packed_rows(lengths_of_rows, row_length, seed=0):
    """tokens, positions, segment ids of documents laid one after another, the rest padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (len(lengths_of_rows), row_length)).astype(np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for b, lengths in enumerate(lengths_of_rows):
        start = 0
        for i, n in enumerate(lengths):
            positions[b, start : start + n] = np.arange(n)
            segments[b, start : start + n] = i + 1
            start += n
    return tokens, positions, segments


# --- the oracle: one token at a time, one head at a time, float64 ------------------------------------


def oracle_logits(params, config, tokens, positions, segments):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    c = config

    def norm(x, scale):
        scale = scale + 1 if c.norm_plus_one else scale
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * scale

    def rotated(x, position, rope):
        half = c.head_width // 2
        out = np.empty_like(x)
        for i in range(half):
            frequency = rope.theta ** (-2 * i / c.head_width)
            if isinstance(rope.scaling, LinearScaling):
                frequency /= rope.scaling.factor
            if isinstance(rope.scaling, Llama3Scaling):
                s, wavelength = rope.scaling, 2 * math.pi / frequency
                if wavelength > s.original_length / s.low_frequency_factor:
                    frequency /= s.factor
                elif wavelength > s.original_length / s.high_frequency_factor:
                    smooth = (s.original_length / wavelength - s.low_frequency_factor) / (
                        s.high_frequency_factor - s.low_frequency_factor
                    )
                    frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
            angle = position * frequency
            out[..., i] = x[..., i] * math.cos(angle) - x[..., i + half] * math.sin(angle)
            out[..., i + half] = x[..., i + half] * math.cos(angle) + x[..., i] * math.sin(angle)
        return out

    def activation(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def convolved(h, taps, position):
        out = h.copy()
        for t in range(len(h)):
            for n in range(min(position[t] + 1, len(taps))):
                out[t] += taps[n] * h[t - n]
        return out

    table = p["embed"]["embedding"]
    out = np.zeros((*tokens.shape, VOCAB))
    for b in range(tokens.shape[0]):
        x = table[tokens[b]] * (math.sqrt(c.width) if c.embed_scale else 1.0)
        for layer in range(c.num_layers):
            w = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
            kind = c.layer_pattern[layer % len(c.layer_pattern)]
            a = w["attention"]
            h = norm(x, w["attention_norm"]["scale"])
            if c.short_conv:
                h = convolved(h, w["attention_conv"]["taps"], positions[b])
            q = np.einsum("td,dnh->tnh", h, a["query"]) + a.get("query_bias", 0)
            k = np.einsum("td,dnh->tnh", h, a["key"]) + a.get("key_bias", 0)
            v = np.einsum("td,dnh->tnh", h, a["value"]) + a.get("value_bias", 0)
            if c.qk_norm:
                q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
            q = np.stack([rotated(q[t], positions[b, t], kind.rope) for t in range(len(x))])
            k = np.stack([rotated(k[t], positions[b, t], kind.rope) for t in range(len(x))])
            o = np.zeros_like(q)
            for t in range(len(x)):
                # Padding sees itself alone.
                seen = [
                    s
                    for s in range(t + 1)
                    if s == t or (segments[b, s] == segments[b, t] != 0)
                    if kind.window is None or t - s < kind.window
                ]
                for n in range(c.num_heads):
                    g = n // (c.num_heads // c.num_kv_heads)
                    score = k[seen, g] @ q[t, n] * (c.attention_scale or c.head_width**-0.5)
                    if c.attention_softcap:
                        score = c.attention_softcap * np.tanh(score / c.attention_softcap)
                    weight = np.exp(score - score.max())
                    o[t, n] = weight / weight.sum() @ v[seen, g]
            branch = np.einsum("tnh,nhd->td", o, a["out"])
            x = x + (norm(branch, w["post_attention_norm"]["scale"]) if c.post_norms else branch)
            h = norm(x, w["mlp_norm"]["scale"])
            if c.short_conv:
                h = convolved(h, w["mlp_conv"]["taps"], positions[b])
            gate, up = np.einsum("td,df->tf", h, w["mlp"]["gate_up"][:, 0]), h @ w["mlp"]["gate_up"][:, 1]
            branch = activation(gate) * up @ w["mlp"]["down"]
            x = x + (norm(branch, w["post_mlp_norm"]["scale"]) if c.post_norms else branch)
        x = norm(x, p["final_norm"]["scale"])
        z = x @ (table.T if c.tied_head else p["head"]["kernel"])
        out[b] = c.final_softcap * np.tanh(z / c.final_softcap) if c.final_softcap else z
    return out


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, tokens, positions, segments):
    with jax.numpy_dtype_promotion("strict"):
        return logits(forward(params, config, tokens, positions, segments), params, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_plain_program(family):
    config = FAMILIES[family]
    params = random_params(config)
    batch = packed_rows([(5, 7), (3, 1, 6)], 12)
    expected = oracle_logits(params, config, *batch)
    got = run(params, config, *batch)
    # Random norms make logits of size 10 to 100; float32 through five layers keeps five digits.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("config", [GEMMA, CANON], ids=["gemma", "canon"])
def test_packed_row_equals_its_documents_apart(config):
    params = random_params(config)
    tokens, positions, segments = packed_rows([(5, 4, 3)], 12)
    together = np.asarray(run(params, config, tokens, positions, segments))
    for start, n in ((0, 5), (5, 4), (9, 3)):
        alone = np.zeros((1, 12), np.int32), np.zeros((1, 12), np.int32), np.zeros((1, 12), np.int32)
        alone[0][0, :n], alone[1][0, :n], alone[2][0, :n] = tokens[0, start : start + n], np.arange(n), 1
        expected = np.asarray(run(params, config, *alone))[0, :n]
        np.testing.assert_allclose(together[0, start : start + n], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [QWEN3, CANON], ids=["qwen3", "canon"])
def test_a_changed_document_changes_no_other_bit(config):
    params = random_params(config)
    tokens, positions, segments = packed_rows([(5, 4, 3), (2, 10)], 12)
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    before, after = (np.asarray(run(params, config, t, positions, segments)) for t in (tokens, changed))
    same = (before == after).all(axis=-1)
    assert same[0, :6].all()
    assert not same[0, 6:9].any()
    assert same[0, 9:].all()
    assert same[1].all()


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": False},
        *({"remat": kind} for kind in ("full", "save_attention", "offload", "save_products")),
    ],
)
def test_scan_and_remat_change_nothing(change):
    params = random_params(GEMMA)
    batch = packed_rows([(5, 7)], 12)

    def value_and_gradient(config):
        def mean(params):
            return jnp.mean(jnp.square(forward(params, config, *batch)))

        return jax.jit(jax.value_and_grad(mean))(params)

    expected = _plain_value_and_gradient(batch_key=0)
    got = value_and_gradient(dataclasses.replace(GEMMA, **change))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Only the order of additions differs.
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(np.abs(b).max(), 1e-3))


@functools.cache
def _plain_value_and_gradient(batch_key):
    batch = packed_rows([(5, 7)], 12, seed=batch_key)
    params = random_params(GEMMA)
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(forward(p, GEMMA, *batch)))))(params)


def test_bfloat16_computes_narrow_and_keeps_float32_parameters():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = init_params(config, VOCAB, seed=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = packed_rows([(5, 7)], 12)
    hidden = jax.eval_shape(lambda p: forward(p, config, *batch), params)
    assert hidden.dtype == jnp.bfloat16
    narrow, wide = run(params, config, *batch), run(params, LLAMA, *batch)
    assert np.abs(narrow - wide).max() < 0.05 * np.abs(wide).max()


# --- rotary embedding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope", [Rope(), Rope(scaling=Llama3Scaling()), Rope(scaling=LinearScaling(factor=2.0))]
)
def test_rotary_tables_looked_up_or_computed_are_the_same(rope):
    positions = np.array([[0, 1, 2, 40, 41, 7]], np.int32)
    looked_up = rope.tables(positions, 16, 64)
    computed = rope.tables(positions, 16, 2**20)
    for a, b in zip(looked_up, computed, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6)  # 40 radians in float32


def test_positions_beyond_the_table_show_as_nan():
    positions = np.array([[3, 64]], np.int32)
    for num_positions in (64, 64 * 2**14):
        cos, _ = Rope().tables(positions * (num_positions // 64), 16, num_positions)
        assert np.isfinite(cos[0, 0]).all()
        assert np.isnan(cos[0, 1]).all()


def test_rotation_keeps_lengths_and_its_gradient_rotates_back():
    rng = np.random.default_rng(0)
    x, d = (rng.normal(size=(1, 6, 2, 16)).astype(np.float32) for _ in range(2))
    tables = Rope().tables(np.arange(6, dtype=np.int32)[None] * 7, 16, 64)
    y, pull = jax.vjp(lambda x: rotate(x, tables), x)
    np.testing.assert_allclose(np.sum(y * y, -1), np.sum(x * x, -1), rtol=1e-5)
    # A rotation's transpose is its inverse: <R x, d> = <x, R' d> and R' R x = x.
    np.testing.assert_allclose(np.sum(y * d), np.sum(x * pull(d)[0]), rtol=1e-4)
    np.testing.assert_allclose(pull(y)[0], x, atol=1e-5)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 1, 16)).astype(np.float32) for _ in range(2))
    rope = Rope(theta=100.0)

    def score(i, j):
        turned = (rotate(x, rope.tables(np.array([[at]], np.int32), 16, 64)) for x, at in ((q, i), (k, j)))
        return float(jnp.sum(next(turned) * next(turned)))

    assert score(5, 2) == pytest.approx(score(43, 40), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


# --- parameters --------------------------------------------------------------------------------------


def test_initial_scales():
    config = dataclasses.replace(QWEN2, num_layers=8, width=64, hidden_width=96, tied_head=False)
    params = init_params(config, 2000, seed=0)
    residual = (2 * config.num_layers) ** -0.5
    blocks = params["blocks"]
    expected = {
        "query": (blocks["attention"]["query"], 64**-0.5),
        "out": (blocks["attention"]["out"], residual * 32**-0.5),
        "gate_up": (blocks["mlp"]["gate_up"], 64**-0.5),
        "down": (blocks["mlp"]["down"], residual * 96**-0.5),
        "embedding": (params["embed"]["embedding"], 0.02),
        "kernel": (params["head"]["kernel"], 0.02),
    }
    for name, (leaf, std) in expected.items():
        assert np.std(leaf) == pytest.approx(std, rel=0.05), name
    assert (blocks["attention_norm"]["scale"] == 1).all()
    assert (blocks["attention"]["query_bias"] == 0).all()
    # Layers are drawn independently.
    assert abs(np.corrcoef(blocks["mlp"]["down"][0].ravel(), blocks["mlp"]["down"][1].ravel())[0, 1]) < 0.05


def test_parameters_are_a_function_of_the_seed():
    one, same, other = (init_params(LLAMA, VOCAB, seed=s) for s in (7, 7, 8))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, same))
    assert not (one["blocks"]["mlp"]["down"] == other["blocks"]["mlp"]["down"]).any()


def test_every_parameter_has_a_spec_and_matrices_name_their_sides():
    for config in FAMILIES.values():
        params = abstract_params(config, VOCAB)
        specs = param_specs(params)
        for spec, leaf in zip(
            jax.tree.leaves(specs, is_leaf=lambda x: hasattr(x, "role")), jax.tree.leaves(params), strict=True
        ):
            assert len(spec.dims) == leaf.ndim
            assert (spec.role == "vector") == (not spec.inputs)
            assert not set(spec.inputs) & set(spec.outputs)


def test_tied_head_is_one_leaf_whose_gradients_add():
    params = random_params(QWEN2)
    batch = packed_rows([(5, 7)], 12)
    untied = {**params, "head": {"kernel": params["embed"]["embedding"].T}}

    def total(params, config):
        return jnp.sum(jnp.sin(logits(forward(params, config, *batch), params, config)))

    tied = jax.grad(total)(params, QWEN2)["embed"]["embedding"]
    apart = jax.grad(total)(untied, dataclasses.replace(QWEN2, tied_head=False))
    expected = apart["embed"]["embedding"] + apart["head"]["kernel"].T
    np.testing.assert_allclose(tied, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple"),
        ({"head_width": 7}, "head_width must be even"),
        ({"width": 0}, "width must be positive"),
        ({"layer_pattern": ()}, "layer_pattern"),
        ({"remat": "some"}, "remat must be one of"),
        (
            {"context_attention": "ring", "attention_impl": "xla"},
            "has an attention of its own, got attention_impl='xla'",
        ),
        ({"activation": "relu"}, "activation must be one of"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LLAMA, **change)
