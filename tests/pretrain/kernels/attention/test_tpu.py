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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pretrain.kernels.attention import tpu, worklist
from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.configs import TpuBlocks
from pretrain.kernels.attention.plan import AttentionSpec, make_plan, visited_blocks


def tiles(block_q=16, block_k=16, slice_k=16, dq=None, dkv=None):
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
    "gqa8": Group(heads=(8, 1), rows=(ONE, TWO, (1, 63), EIGHT, ALL, PADDED), blocks=tiles(16, 16, 8)),
    "window": Group(spec=AttentionSpec(window=17), rows=(ONE, TWO, (32, 32), EIGHT, ALL, PADDED)),
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
def compiled(quick):
    """name -> the jitted kernels of the group; one offset is static, several are traced."""

    @functools.cache
    def of(name):
        group = GROUPS[name]
        return quick(kernels(group)) if len(group.offsets) > 1 else quick(kernels(group), static_argnums=7)

    return of


@pytest.fixture(scope="module")
def results(compiled, segments_of):
    """name, offset -> what the kernels give for all rows of the group."""

    @functools.cache
    def of(name, offset):
        group, x = GROUPS[name], inputs(name)
        given = None if not group.offsets else offset if len(group.offsets) == 1 else jnp.int32(offset)
        segments = segments_of(group.rows, group.num_keys)
        out = compiled(name)(x["q"], x["k"], x["v"], x["sinks"], segments, x["do"], x["dlse"], given)
        return jax.tree.map(np.asarray, out)

    return of


def check(got, wanted, dtype, keys):
    for key in keys:
        x, r = np.asarray(got[key], np.float64), wanted[key]
        assert x.shape == r.shape
        error = abs(x - r).max() if key == "lse" else np.linalg.norm(x - r) / max(np.linalg.norm(r), 1e-30)
        assert error <= TOLERANCE[dtype][key], (key, error)


def row_of(x, row):
    return {
        key: None if value is None else value if key == "sinks" else value[row : row + 1]
        for key, value in x.items()
    }


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


# --- packings at random ------------------------------------------------------------------------------

RANDOM = Group(
    num_keys=40, heads=(2, 1), width=8, sinks=True, spec=AttentionSpec(window=13, softcap=2.0),
    blocks=tiles(8, 16, 8, dq=(16, 8), dkv=(8, 8)), rows=((40,),) * 2,
)  # fmt: skip
lengths = st.lists(st.integers(1, 40), min_size=0, max_size=40)


def cut(lengths, num_keys):
    """As many of the documents as fit, the last one shortened."""
    ends = np.minimum(np.cumsum(lengths), num_keys) if lengths else np.zeros(0, int)
    return tuple(int(n) for n in np.diff(ends, prepend=0) if n)


@pytest.fixture(scope="module")
def random_kernel(quick):
    return quick(kernels(RANDOM), static_argnums=7)


@settings(max_examples=25)
@given(rows=st.tuples(lengths, lengths), seed=st.integers(0, 2**31))
def test_random_packings(rows, seed, random_kernel, oracle, allowed, segments_of):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    keys, width = RANDOM.num_keys, RANDOM.width
    x = {"q": draw(2, keys, 2, width), "k": draw(2, keys, 1, width), "v": draw(2, keys, 1, width),
         "do": draw(2, keys, 2, width), "dlse": draw(2, 2, keys), "sinks": draw(2)}  # fmt: skip
    segments = segments_of([cut(r, keys) for r in rows], keys)
    got = random_kernel(x["q"], x["k"], x["v"], x["sinks"], segments, x["do"], x["dlse"], None)
    wanted = wanted_of(RANDOM, x, segments, 0, oracle, allowed)
    check(got, wanted, "float32", ("o", "lse", "dq", "dk", "dv", "dsinks"))


# --- what is never read, never computed --------------------------------------------------------------


def test_blocks_of_other_documents_are_never_read(compiled, segments_of):
    """NaN in the first document does not reach the second, forward or backward, when they share no block."""
    group, x = GROUPS["mha"], inputs("mha")
    segments = segments_of(((32, 32),) * len(group.rows), 64)
    poisoned = {key: value.copy() for key, value in x.items() if value is not None}
    for key in ("q", "k", "v", "do"):
        poisoned[key][:, :32] = np.nan
    got = compiled("mha")(
        poisoned["q"], poisoned["k"], poisoned["v"], None, segments, poisoned["do"], x["dlse"], None
    )
    for key in ("o", "dq", "dk", "dv"):
        assert np.isnan(got[key][:, :32]).any(), key
        assert np.isfinite(got[key][:, 32:]).all(), key


def test_two_runs_agree_bit_for_bit(random_kernel, segments_of):
    rng = np.random.default_rng(5)
    q, do = (rng.normal(size=(2, 40, 2, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(2, 40, 1, 8)).astype(np.float32) for _ in range(2))
    arguments = (
        q,
        k,
        v,
        np.ones(2, np.float32),
        segments_of([(7, 20), (40,)], 40),
        do,
        np.zeros((2, 2, 40), "f"),
        None,
    )
    first, second = random_kernel(*arguments), random_kernel(*arguments)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@pytest.fixture(scope="module")
def count(quick):
    """The counting kernels; what a window hides is in the plan, so that one program serves with and without."""
    blocks = tiles(128, 128, 128)
    return quick(functools.partial(tpu.visited_blocks, spec=AttentionSpec(), blocks=blocks, interpret=True))


@pytest.mark.parametrize("window", [None, 512])
def test_kernels_visit_a_fourth_of_the_blocks_of_web_documents(window, count, segments_of):
    """Log-normal lengths, median 400, packed to 8192, blocks of 128: counted by the three kernels themselves."""
    rng = np.random.default_rng(0)
    length, block = 8192, 128
    documents = np.maximum(1, np.exp(rng.normal(np.log(400), 1.0, size=200)).astype(int))
    segments = segments_of([cut(list(documents), length)], length)
    blocks = tiles(block, block, block)
    plan = make_plan(segments, AttentionSpec(window=window), seq_len=length)
    work = tuple(
        worklist.work_list(plan, side=side, block_q=block_q, block_k=block_k)
        for side, block_q, block_k in blocks.tiles
    )
    x = jnp.zeros((1, length, 1, 8), jnp.float32)
    # The kernels read of the plan what the queries may see, and nothing that the window changes in its kind.
    visited = count(x, x, x, dataclasses.replace(plan, window=None), work)
    dense = (length // block) * (length // block + 1) // 2
    expected = int(visited_blocks(plan, block_q=block, block_k=block)[0])
    assert {name: int(n[0]) for name, n in visited.items()} == dict.fromkeys(visited, expected)
    assert set(visited) == {"forward", "backward_q", "backward_kv"}
    assert dense >= 4 * expected


# --- the interpreter that models the machine ---------------------------------------------------------

MACHINE = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=9, softcap=2.0)])
def test_no_race_and_no_uninitialized_memory(spec, quick, capfd, oracle, allowed, segments_of):
    """Two cores share the heads; memory holds NaN until written; a race would be printed."""
    group = Group(
        num_keys=32, heads=(4, 2), width=8, sinks=spec.window is not None, spec=spec, rows=((32,), (9, 14))
    )
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x = {"q": draw(2, 32, 4, 8), "k": draw(2, 32, 2, 8), "v": draw(2, 32, 2, 8), "do": draw(2, 32, 4, 8),
         "dlse": draw(2, 4, 32), "sinks": draw(4) if group.sinks else None}  # fmt: skip
    segments = segments_of(group.rows, 32)
    got = quick(kernels(group, MACHINE), static_argnums=7)(
        x["q"], x["k"], x["v"], x["sinks"], segments, x["do"], x["dlse"], None
    )
    keys = ("o", "lse", "dq", "dk", "dv") + ("dsinks",) * group.sinks
    check(got, wanted_of(group, x, segments, 0, oracle, allowed), "float32", keys)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_race_would_be_seen(capfd):
    """Both cores write the one output block."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    block = pl.BlockSpec((8, 128), lambda i: (0, 0))
    call = pl.pallas_call(
        kernel, grid=(2,), in_specs=[block], out_specs=block, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)), interpret=MACHINE,
    )  # fmt: skip
    raised = ""
    try:
        call(jnp.ones((8, 128))).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises what earlier ones print
        raised = str(error)
    assert "RACE DETECTED" in raised + capfd.readouterr().out
