"""The TPU kernels, interpreted: values and gradients against float64 over a table, by random packings, under races.

Compiling is nearly all the cost, so a group of cases shares shapes and options and goes through one compiled
function, each case in a row of the batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import compat
from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.configs import TpuBlocks
from pretrain.kernels.attention.plan import AttentionSpec, make_plan


def tiles(block_q=16, block_k=16, slice_k=8, dq=None, dkv=None):
    dq, dkv = dq or (block_q, block_k), dkv or (block_q, block_k)
    return TpuBlocks(
        block_q=block_q, block_k=block_k, block_q_dq=dq[0], block_k_dq=dq[1], block_q_dkv=dkv[0], block_k_dkv=dkv[1],
        slice_k=slice_k,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that share everything static; `rows` are the lengths of documents, one case each."""

    rows: tuple[tuple[int, ...], ...]
    num_keys: int = 64
    num_queries: int | None = None  # less than num_keys: a part of the rows, as in context parallelism
    offsets: tuple[int, ...] = ()  # of the first query; traced when there are several
    heads: tuple[int, int] = (2, 1)
    width: int = 16
    spec: AttentionSpec = AttentionSpec()
    sinks: bool = False
    dtype: str = "float32"
    blocks: TpuBlocks = tiles()


ONE, TWO, EIGHT, ALL = (64,), (23, 41), (5, 9, 3, 16, 1, 14, 7, 9), (1,) * 64
PADDED = (30, 12)
GROUPS = {
    "mha": Group(heads=(2, 2), rows=(ONE, TWO, (16, 16, 16, 16), EIGHT, ALL, PADDED)),
    "gqa4": Group(heads=(4, 1), rows=(ONE, TWO, (63, 1), EIGHT, ALL, PADDED)),
    "gqa8": Group(heads=(8, 1), rows=(ONE, TWO, (1, 63), EIGHT, ALL, PADDED)),
    "window": Group(spec=AttentionSpec(window=17), rows=(ONE, TWO, (32, 32), EIGHT, ALL, PADDED)),
    "window_of_one": Group(spec=AttentionSpec(window=1), rows=(ONE, EIGHT, PADDED)),
    "window_over_all": Group(spec=AttentionSpec(window=1000), rows=(ONE, TWO, EIGHT)),
    "softcap": Group(spec=AttentionSpec(softcap=1.5), rows=(ONE, TWO, EIGHT, PADDED)),
    "sinks": Group(heads=(4, 2), sinks=True, rows=(ONE, TWO, EIGHT, ALL, PADDED)),
    "everything": Group(
        heads=(4, 1), sinks=True, spec=AttentionSpec(window=20, softcap=2.0, scale=0.6), blocks=tiles(16, 32, 16),
        rows=(ONE, TWO, EIGHT, ALL, PADDED),
    ),
    "ragged": Group(num_keys=50, rows=((50,), (49, 1), (7, 20, 13), (1,) * 50, (33,))),
    "ragged_tiles": Group(
        num_keys=61, spec=AttentionSpec(window=30), blocks=tiles(32, 16, 16, dq=(16, 32), dkv=(8, 64)),
        rows=((61,), (31, 30), (1, 59, 1), (3,) * 20),
    ),
    "shorter_than_a_block": Group(num_keys=11, blocks=tiles(64, 64, 64), rows=((11,), (4, 7), (5,))),
    "offset": Group(num_queries=32, offsets=(32,), rows=(ONE, TWO, EIGHT, PADDED)),
    "offsets": Group(
        num_queries=16, offsets=(0, 16, 48), sinks=True, spec=AttentionSpec(window=25), rows=(ONE, TWO, EIGHT, PADDED)
    ),
    "bfloat16": Group(heads=(4, 1), dtype="bfloat16", rows=(ONE, TWO, EIGHT, ALL, PADDED)),
    "bfloat16_everything": Group(
        heads=(4, 2), dtype="bfloat16", sinks=True, spec=AttentionSpec(window=40, softcap=3.0), rows=(ONE, TWO, EIGHT)
    ),
    "width_256": Group(num_keys=32, width=256, rows=((32,), (9, 23))),
}  # fmt: skip
CASES = [
    (name, row, offset)
    for name, group in GROUPS.items()
    for offset in group.offsets or (0,)
    for row in range(len(group.rows))
]
# Relative norms, except lse: absolute.
TOLERANCE = {
    "float32": {"o": 1e-5, "lse": 1e-5, "dq": 2e-5, "dk": 2e-5, "dv": 2e-5, "dsinks": 2e-5},
    "bfloat16": {"o": 5e-3, "lse": 2e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2, "dsinks": 1e-2},
}


def test_the_table_is_as_long_as_promised():
    assert len(CASES) >= 60
    assert {g.heads[0] // g.heads[1] for g in GROUPS.values()} >= {1, 4, 8}
    assert {len(row) for g in GROUPS.values() for row in g.rows} >= {1, 64}


@functools.cache
def inputs(name):
    group = GROUPS[name]
    rng = np.random.default_rng(len(name))
    batch, keys, (heads, kv_heads) = len(group.rows), group.num_keys, group.heads
    queries = group.num_queries or keys

    def draw(*shape):
        return np.asarray(jnp.asarray(rng.normal(size=shape), group.dtype))

    return {
        "q": draw(batch, queries, heads, group.width),
        "k": draw(batch, keys, kv_heads, group.width),
        "v": draw(batch, keys, kv_heads, group.width),
        "do": draw(batch, queries, heads, group.width),
        "dlse": rng.normal(size=(batch, heads, queries)).astype(np.float32),
        "sinks": rng.normal(size=heads).astype(np.float32) if group.sinks else None,
    }


def kernels(group, interpret=None):
    """(q, k, v, sinks, segment ids, do, dlse, offset) -> outputs and gradients of every row, by name."""

    def run(q, k, v, sinks, segments, do, dlse, offset):
        plan = make_plan(segments, group.spec, seq_len=group.num_keys)

        def f(q, k, v, sinks):
            return attention(
                q, k, v, plan=plan, spec=group.spec, sinks_N=sinks, q_offset=offset, impl="tpu_interpret",
                config=group.blocks, interpret=interpret, return_lse=True,
            )  # fmt: skip

        (o, lse), transpose = jax.vjp(f, q, k, v, sinks)
        dq, dk, dv, dsinks = transpose((do, dlse))
        return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}

    return run


@pytest.fixture(scope="module")
def results(quick, segments_of):
    """name, offset -> what the kernels give for all rows of the group."""
    compiled = {}

    @functools.cache
    def of(name, offset):
        group, x = GROUPS[name], inputs(name)
        static = {} if len(group.offsets) > 1 else {"static_argnums": 7}
        if name not in compiled:
            compiled[name] = quick(kernels(group), **static)
        given = (offset if group.offsets else None) if static else jnp.int32(offset)
        segments = segments_of(group.rows, group.num_keys)
        out = compiled[name](x["q"], x["k"], x["v"], x["sinks"], segments, x["do"], x["dlse"], given)
        return jax.tree.map(np.asarray, out)

    return of


def check(got, wanted, dtype, keys):
    for key in keys:
        x, r = np.asarray(got[key], np.float64), wanted[key]
        assert x.shape == r.shape
        error = abs(x - r).max() if key == "lse" else np.linalg.norm(x - r) / max(np.linalg.norm(r), 1e-30)
        assert error <= TOLERANCE[dtype][key], (key, error)


def row_of(x, row):
    return {key: None if value is None else value if key == "sinks" else value[row : row + 1] for key, value in x.items()}


def wanted_of(group, x, segments, offset, oracle, allowed):
    mask = allowed(segments, window=group.spec.window, q_offset=offset, num_queries=x["q"].shape[1])
    scale = group.spec.scale or group.width**-0.5
    return oracle(
        x["q"], x["k"], x["v"], mask, scale=scale, softcap=group.spec.softcap, sinks=x["sinks"], do=x["do"],
        dlse=x["dlse"],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "row", "offset"), CASES)
def test_values_and_gradients_of_a_row(name, row, offset, results, oracle, allowed, segments_of):
    group = GROUPS[name]
    segments = segments_of(group.rows[row : row + 1], group.num_keys)
    wanted = wanted_of(group, row_of(inputs(name), row), segments, offset, oracle, allowed)
    got = {key: value for key, value in results(name, offset).items() if key != "dsinks"}
    check(row_of(got, row), wanted, group.dtype, ("o", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("name", [name for name, group in GROUPS.items() if group.sinks])
def test_gradient_of_sinks_is_the_sum_over_rows(name, results, oracle, allowed, segments_of):
    group = GROUPS[name]
    segments = segments_of(group.rows, group.num_keys)
    for offset in group.offsets or (0,):
        wanted = wanted_of(group, inputs(name), segments, offset, oracle, allowed)
        check(results(name, offset), wanted, group.dtype, ("dsinks",))
