"""Dispatch says what it took and why not the others; bad input is refused before anything is traced."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain import compat
from pretrain.config import ConfigError
from pretrain.kernels.attention import api, hopper, tpu
from pretrain.kernels.attention.api import Problem, attention, choose, prepare_plan
from pretrain.kernels.attention.configs import (
    HOPPER_TABLE,
    TPU_TABLE,
    VMEM_LIMIT_BYTES,
    HopperBlocks,
    TpuBlocks,
    hopper_blocks,
    tpu_blocks,
)
from pretrain.kernels.attention.plan import AttentionSpec, block_bounds, make_plan

CAUSAL = AttentionSpec()
ON_TPU = Problem(
    platform="tpu", device_kind="TPU v5e", dtype="bfloat16", batch=2, num_queries=2048, num_keys=2048, heads=8,
    kv_heads=2, width=128, spec=CAUSAL, packed=True,
)  # fmt: skip
ON_H100 = dataclasses.replace(ON_TPU, platform="cuda", device_kind="NVIDIA H100 80GB HBM3")
ON_CPU = dataclasses.replace(ON_TPU, platform="cpu", device_kind="cpu", dtype="float32")
SMALL = TpuBlocks(block_q=8, block_k=8, block_q_dq=8, block_k_dq=8, block_q_dkv=8, block_k_dkv=8, slice_k=8)


@pytest.mark.parametrize(
    ("problem", "taken"),
    [
        (ON_TPU, "pallas_tpu"),
        (dataclasses.replace(ON_TPU, width=80), "xla"),
        (dataclasses.replace(ON_TPU, device_kind="TPU v4"), "xla"),
        (dataclasses.replace(ON_TPU, spec=AttentionSpec(causal=False)), "xla"),
        (ON_H100, "pallas_hopper"),
        (dataclasses.replace(ON_H100, packed=False), "pallas_hopper"),
        (dataclasses.replace(ON_H100, packed=False, width=96), "cudnn"),
        (dataclasses.replace(ON_H100, packed=False, dtype="float32"), "xla"),
        (dataclasses.replace(ON_H100, device_kind="NVIDIA A100-SXM4-80GB"), "xla"),
        (dataclasses.replace(ON_H100, device_kind="NVIDIA A100-SXM4-80GB", packed=False), "cudnn"),
        (
            dataclasses.replace(ON_H100, device_kind="Tesla V100-SXM2-16GB", packed=False, dtype="float16"),
            "xla",
        ),
        (
            dataclasses.replace(ON_H100, platform="gpu", device_kind="AMD Instinct MI300X", packed=False),
            "xla",
        ),
        (dataclasses.replace(ON_H100, packed=False, dtype="float16"), "cudnn"),
        (ON_CPU, "xla"),
    ],
)
def test_auto_takes(problem, taken):
    choice = choose(problem)
    assert choice.impl == taken
    # Whatever stands before the one taken was asked and has its reasons.
    assert list(choice.declined) == list(api.AUTO_ORDER[: api.AUTO_ORDER.index(taken)])
    assert all(reasons for reasons in choice.declined.values())


KINDS = {
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA H800": (9, 0),
    "NVIDIA H20": (9, 0),
    "NVIDIA GH200 480GB": (9, 0),
    "NVIDIA A800-SXM4-80GB": (8, 0),
    "NVIDIA RTX A6000": (8, 6),
    "NVIDIA A10G": (8, 6),
    "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA B200": (10, 0),
    "NVIDIA B300 SXM6 AC": (10, 3),
    "Tesla T4": (7, 5),
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_chips_are_known_by_their_names_where_they_tell_nothing(kind):
    problem = dataclasses.replace(ON_H100, device_kind=kind)
    capability = KINDS[kind]
    assert problem.capability == capability
    assert dataclasses.replace(problem, platform="cpu").capability is None
    assert (choose(problem).impl == "pallas_hopper") == (capability == (9, 0))
    plain = choose(dataclasses.replace(problem, packed=False))
    by_cudnn = capability is not None and (8, 0) <= capability != (9, 0)
    assert (plain.impl == "cudnn") == by_cudnn


@pytest.mark.parametrize(
    ("capability", "taken"), [((9, 0), "pallas_hopper"), ((12, 1), "cudnn"), ((7, 5), "xla")]
)
def test_what_a_device_tells_counts_more_than_its_name(capability, taken):
    problem = dataclasses.replace(ON_H100, device_kind="NVIDIA H999", packed=False)
    assert choose(problem).impl == "xla"
    told = dataclasses.replace(problem, compute_capability=capability)
    assert choose(told).impl == taken
    wide = dataclasses.replace(told, width=256, dtype="float16")
    assert choose(wide).impl == ("xla" if capability < (8, 0) else "cudnn")
    if taken != "pallas_hopper":
        text = "needs a Hopper GPU (compute capability 9.0: H100, H200, H800, H20, GH200), got cuda NVIDIA H999 of "
        assert text + "compute capability {}.{}".format(*capability) in choose(told).declined["pallas_hopper"]


@pytest.mark.parametrize(
    ("told", "meant"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)]
)
def test_a_compute_capability_is_read_off_the_device(told, meant, monkeypatch):
    device = types.SimpleNamespace(device_kind="chip", platform="gpu", compute_capability=told)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert (
        api.problem_of(array(1, 8, 1, 64), array(1, 8, 1, 64), CAUSAL, packed=False).compute_capability
        == meant
    )


def test_the_choice_names_every_reason():
    text = str(choose(dataclasses.replace(ON_CPU, width=80)))
    assert text.startswith(
        "attention by xla (not pallas_tpu: needs a TPU, got cpu, needs head width 64, 128 or 256, got 80"
    )
    assert "not cudnn: needs a CUDA GPU of compute capability 8.0" in text


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_hopper", "cudnn"])
def test_an_explicit_choice_never_falls_back(impl):
    with pytest.raises(
        NotImplementedError, match=f"impl='{impl}' cannot do this: needs .*; take impl='xla'"
    ) as caught:
        choose(ON_CPU, impl)
    assert isinstance(caught.value, ConfigError)


Q_HERE, K_HERE = (np.random.default_rng(n).normal(size=(2, 24, n, 8)).astype(np.float32) for n in (2, 1))
SEGMENTS_HERE = np.array([[1] * 10 + [2] * 14, [1] * 24])


@pytest.fixture(scope="module")
def interpreted(quick):
    """The TPU kernels with small tiles on a plan."""
    return quick(lambda q, k, plan: attention(q, k, k, plan=plan, impl="tpu_interpret", config=SMALL))


def test_the_same_call_gives_the_same_with_every_implementation_of_this_machine(interpreted, quick):
    plan = make_plan(SEGMENTS_HERE, CAUSAL, seq_len=24)

    @functools.partial(quick, static_argnums=2)
    def by(q, k, impl):
        return attention(q, k, k, segment_ids=SEGMENTS_HERE, impl=impl)

    wanted = by(Q_HERE, K_HERE, "reference")
    for o in (by(Q_HERE, K_HERE, "xla"), interpreted(Q_HERE, K_HERE, plan)):
        np.testing.assert_allclose(o, wanted, rtol=2e-6, atol=2e-6)


def test_a_prepared_plan_changes_no_bit(interpreted):
    plan = make_plan(SEGMENTS_HERE, CAUSAL, seq_len=24)
    prepared = prepare_plan(plan, Q_HERE, K_HERE, spec=CAUSAL, impl="tpu_interpret", config=SMALL)
    assert len(prepared.work) == 3
    out = [interpreted(Q_HERE, K_HERE, p) for p in (plan, prepared)]
    np.testing.assert_array_equal(*out)


def test_a_plan_prepared_for_hopper_holds_the_ranges_of_its_three_kernels():
    device = jax.sharding.AbstractDevice(device_kind=ON_H100.device_kind, num_cores=1, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    plan = make_plan(np.repeat([1, 2], [100, 156])[None], CAUSAL, seq_len=256)
    blocks, q = hopper_blocks(128, packed=True), array(1, 256, 2, 128, dtype="bfloat16")
    with jax.sharding.use_abstract_mesh(mesh):
        (shapes,) = jax.eval_shape(
            lambda p: prepare_plan(p, q, q, spec=CAUSAL, impl="pallas_hopper"), plan
        ).work
    ranges = jax.jit(hopper.tile_ranges, static_argnames="blocks")(plan, blocks=blocks)
    assert jax.tree.structure(shapes) == jax.tree.structure(ranges)
    of = {
        "forward": ("q", blocks.block_q, blocks.block_k),
        "dq": ("q", blocks.block_q_dq, blocks.block_k_dq),
        "dkv": ("k", blocks.block_q_dkv, blocks.block_k_dkv),
    }
    for name, (side, block_q, block_k) in of.items():
        wanted = block_bounds(plan, side=side, block_q=block_q, block_k=block_k)
        assert getattr(shapes, name).shape == getattr(ranges, name).shape
        for i, field in enumerate(("lo", "full_lo", "full_hi", "hi")):
            np.testing.assert_array_equal(getattr(ranges, name)[:, i], getattr(wanted, field))


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, K = array(2, 16, 4, 8), array(2, 16, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ((array(16, 4, 8), K, K), {}, r"q, k, v must be \[B, T, N, H\].*got \(16, 4, 8\).*split the heads"),
        ((Q, K, array(2, 16, 2, 4)), {}, "k and v must have one shape, got .*; pad the narrower"),
        ((Q, array(1, 16, 2, 8), array(1, 16, 2, 8)), {}, "the same batch, got 2 and 1; broadcast"),
        ((Q, array(2, 16, 2, 4), array(2, 16, 2, 4)), {}, "one head width, got 8 and 4; project to one width"),
        ((Q, array(2, 16, 3, 8), array(2, 16, 3, 8)), {}, "multiple of key-value heads, got 4 and 3; use a divisor of 4"),
        ((array(2, 16, 4, 8, dtype="int32"), K, K), {}, "q must be bfloat16, float16 or float32, got int32; cast it"),
        ((Q, array(2, 16, 2, 8, dtype="bfloat16"), K), {}, "one dtype, got float32, bfloat16, float32; cast them to one"),
        ((array(2, 16, 4, 0), array(2, 16, 2, 0), array(2, 16, 2, 0)), {}, "head width must be >= 1, got 0"),
        ((Q, K, K), {"impl": "flash"}, "impl must be auto or one of .*, got 'flash'"),
        ((Q, K, K), {"sinks_N": array(2)}, r"one logit a query head, \[4\], got \(2,\); reshape"),
        ((Q, array(2, 24, 2, 8), array(2, 24, 2, 8)), {}, "q_offset must be given .* got 16 and 24"),
        ((Q, K, K), {"q_offset": 3}, r"q_offset must lie in \[0, 0\], got 3; every query needs its own key"),
        ((Q, K, K), {"segment_ids": np.array([[1, 2, 1] + [1] * 13] * 2)}, r"sorted along a row, got 1 at \[0, 2\] after 2"),
        ((Q, K, K), {"plan": make_plan(None, CAUSAL, seq_len=8)}, r"must cover the keys \[2, 16\], got \(1, 8\)"),
        ((Q, K, K), {"plan": make_plan(None, CAUSAL, seq_len=16), "spec": AttentionSpec(window=2)}, "plan and spec must agree"),
        ((Q, K, K), {"plan": make_plan(None, CAUSAL, seq_len=16), "segment_ids": np.ones((2, 16), int)}, "not both"),
        ((Q, K, K), {"impl": "tpu_interpret", "config": "wide"}, "takes TpuBlocks, got str"),
        ((Q, K, K), {"config": SMALL}, "config is for an implementation with tiles, got impl='auto'; name one"),
        ((Q, K, K), {"impl": "xla", "interpret": True}, "interpret is for impl='tpu_interpret', got 'xla'"),
        ((Q, K, K), {"segment_ids": np.ones((1, 16), int)}, r"one id for each key, \(2, 16\), got \(1, 16\)"),
        ((Q, K, K), {"segment_ids": [[1] * 16] * 2}, "segment ids must be an array, got list; convert it by"),
        ((Q, K, K), {"segment_ids": np.ones((2, 16))}, "segment ids must be integers, got float64; cast them"),
        (([[[[1.0]]]], K, K), {}, "q must be an array, got list; convert it by"),
        ((Q, K, K), {"sinks_N": [0.0] * 4}, "sinks must be an array, got list; convert it by"),
        ((Q, K, K), {"sinks_N": array(4, dtype="int32")}, "sinks must be floating point, got int32; cast them"),
        ((Q, K, K), {"plan": np.ones((2, 16), int)}, "plan must be a PackPlan, got ndarray; make one with"),
        ((Q, K, K), {"spec": {"window": 3}}, "spec must be an AttentionSpec, got dict"),
        ((array(0, 16, 4, 8), *[array(0, 16, 2, 8)] * 2), {}, r"q must have at least one row, .*got \(0, 16, 4\); leave"),
        ((array(2, 0, 4, 8), K, K), {"q_offset": 0}, r"q must have at least one row, query .*got \(2, 0, 4\); leave"),
        ((array(2, 0, 4, 8), *[array(2, 0, 2, 8)] * 2), {}, r"k must have at least one row, key .*got \(2, 0, 2\)"),
        ((array(2, 16, 0, 8), K, K), {}, r"q must have at least one row, query and head, got \(2, 16, 0\)"),
        ((Q, K, K), {"q_offset": np.int64(3)}, r"q_offset must lie in \[0, 0\], got 3; every query needs"),
        ((Q, K, K), {"q_offset": jnp.int32(-1)}, r"q_offset must lie in \[0, 0\], got -1; every query needs"),
        ((Q, K, K), {"q_offset": np.array([0, 16])}, r"q_offset must lie in \[0, 15\], got \[0, 16\]; every"),
        ((Q, K, K), {"q_offset": jnp.arange(3)}, r"or one a batch row, \[2\], got shape \(3,\); give one"),
        ((Q, K, K), {"q_offset": np.zeros((2, 1), int)}, r"or one a batch row, \[2\], got shape \(2, 1\)"),
        ((Q, K, K), {"q_offset": 0.0}, "q_offset must be an integer or an array of integers, got 0.0; cast it"),
        ((Q, K, K), {"q_offset": False}, "q_offset must be an integer or an array of integers, got False"),
        ((Q, K, K), {"q_offset": "0"}, "q_offset must be an integer or an array of integers, got '0'"),
        ((Q, K, K), {"q_offset": [0, 0]}, r"q_offset must be an integer or an array of integers, got \[0, 0\]"),
        ((Q, K, K), {"q_offset": jnp.zeros(2)}, "or an array of integers, got an array of float32; cast it"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_tracing(arguments, fields, message):
    """Only shapes are given: an implementation that was reached would fail on them with another error."""
    with pytest.raises(ConfigError, match=message):
        attention(*arguments, **fields)


def test_an_offset_of_numpy_is_that_of_python():
    """It is known before tracing: the program is the same, and as good."""
    q, k = array(1, 16, 2, 8), array(1, 24, 2, 8)

    def program(offset):
        assert api.problem_of(q, k, CAUSAL, packed=False, q_offset=offset).offset == "static"
        return str(
            jax.make_jaxpr(lambda q, k: attention(q, k, k, q_offset=offset, impl="tpu_interpret"))(q, k)
        )

    assert program(np.int64(8)) == program(np.array(8)) == program(8) != program(0)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        attention(array(2, 16, 4, 8, dtype="int8"), array(2, 16, 3, 4), array(2, 16, 3, 4))
    assert len(caught.value.faults) >= 4


@pytest.mark.parametrize(
    ("impl", "change", "message"),
    [
        ("pallas_tpu", {"width": 80}, "needs head width 64, 128 or 256, got 80"),
        ("pallas_tpu", {"dtype": "float16"}, "needs float32 or bfloat16, got float16"),
        ("cudnn", {"platform": "cuda", "width": 256}, "head width a multiple of 8 up to 128, got 256"),
        (
            "cudnn",
            {"platform": "cuda"},
            "has no packed rows: .* takes no segment ids, only a mask of queries by keys.*; rows of one document "
            "without segment ids it serves; take impl='xla', or auto",
        ),
    ],
)
def test_what_an_implementation_cannot_do_is_a_value_error_too(impl, change, message):
    with pytest.raises(ValueError, match=message):
        choose(dataclasses.replace(ON_TPU, **change), impl)


@pytest.mark.parametrize("value", [0, 7, 96, 128.0])
def test_blocks_are_powers_of_two(value):
    with pytest.raises(ConfigError, match=f"block_q must be a power of two from 8 on, got {value}"):
        dataclasses.replace(SMALL, block_q=value)


HOPPER = HopperBlocks(
    block_q=64, block_k=64, stages=2, block_q_dq=64, block_k_dq=64, block_q_dkv=64, block_k_dkv=64, stages_bwd=2
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_q": 48}, "block_q must be a multiple of 64 up to 256, got 48; use 64"),
        ({"block_k": 288}, "block_k must be a multiple of 32 up to 256, got 288; use 64"),
        ({"block_k_dkv": 64.0}, "block_k_dkv must be an integer, got 64.0"),
        ({"stages": 1}, "stages must be at least 2, got 1"),
    ],
)
def test_hopper_tiles_fit_the_matrix_unit_and_the_copies(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(HOPPER, **fields)


WIDE = TpuBlocks(
    block_q=1024, block_k=1024, block_q_dq=512, block_k_dq=512, block_q_dkv=512, block_k_dkv=512, slice_k=512
)  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "problem", "config", "message"),
    [
        ("pallas_tpu", ON_TPU, dataclasses.replace(WIDE, block_q_dq=64), "block_q_dq must be at least 128, got 64"),
        (
            "pallas_tpu", dataclasses.replace(ON_TPU, heads=8, kv_heads=1), WIDE,
            r"its forward tiles of 1024 queries of 8 heads by 1024 keys take up to 3\d.\d MiB .* in bfloat16, more than "
            "the 16 of this chip; use shorter blocks",
        ),
        ("pallas_tpu", dataclasses.replace(ON_TPU, dtype="float32"), WIDE, r"its dk/dv tiles .* in float32"),
        (
            "pallas_hopper", ON_H100, dataclasses.replace(HOPPER, stages=6),
            "its forward tiles take 233688 bytes of shared memory, more than the 232448 of a thread block",
        ),
        ("pallas_hopper", ON_H100, dataclasses.replace(HOPPER, block_q_dq=256), "its dq tiles take .* shared memory"),
    ],
)  # fmt: skip
def test_tiles_that_no_chip_could_hold_are_refused(impl, problem, config, message):
    with pytest.raises(ConfigError, match=message):
        choose(problem, impl, config)
    assert choose(dataclasses.replace(problem, kv_heads=8, dtype="bfloat16"), impl).impl == impl


def test_the_rows_of_the_tables_fit_their_chips():
    """In bfloat16, for which they are made; float32 and groups of heads take shorter ones where memory asks it."""
    for (chip, width), rows in TPU_TABLE.items():
        for packed in rows:
            for group in (1, 2, 4, 8):
                blocks, limit = tpu_blocks(chip, width, group, packed), VMEM_LIMIT_BYTES[chip]
                assert tpu.fitting(blocks, group, width, 2, limit) == blocks
                assert max(tpu.vmem_bytes(blocks, group, width, 2).values()) <= limit
                shorter = tpu.fitting(blocks, group, width, 4, limit)
                assert max(tpu.vmem_bytes(shorter, group, width, 4).values()) <= limit
    for (_, width), rows in HOPPER_TABLE.items():
        for blocks in rows.values():
            assert max(hopper.shared_memory_bytes(blocks, width).values()) <= api.HOPPER_SHARED_BYTES


def test_hopper_rows_are_those_of_the_chip(monkeypatch):
    """A chip without rows of its own takes those of the H100."""
    own = dataclasses.replace(HOPPER, block_k=128)
    monkeypatch.setitem(HOPPER_TABLE, ("H200", 128), {False: own, True: own})
    kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20")
    taken = [api._hopper_config(dataclasses.replace(ON_H100, device_kind=kind), None) for kind in kinds]
    of_h100 = HOPPER_TABLE["H100", 128][True]
    assert taken == [of_h100, own, of_h100, of_h100]


def test_float32_takes_shorter_tiles_and_what_fits_in_no_tile_is_declined():
    problem = dataclasses.replace(ON_TPU, kv_heads=1, width=256)
    wide = api._tpu_config(problem, "pallas_tpu", None)
    narrow = api._tpu_config(dataclasses.replace(problem, dtype="float32"), "pallas_tpu", None)
    assert (wide.block_k_dkv, narrow.block_k_dkv) == (512, 128)
    assert narrow.block_k == wide.block_k
    choice = choose(dataclasses.replace(ON_TPU, heads=64, kv_heads=1))
    assert choice.impl == "xla"
    assert (
        "dk/dv tiles of 128 queries of 64 heads by 128 keys take up to" in choice.declined["pallas_tpu"][-1]
    )


def test_on_a_mesh_of_heads_and_rows_it_equals_one_device(quick):
    """Kernels are opaque to the partitioner: batch over data, heads over tensor, keys gathered over context."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "tensor", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    rng = np.random.default_rng(0)
    q, do = (rng.normal(size=(2, 32, 4, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(2, 32, 2, 8)).astype(np.float32) for _ in range(2))
    segments = np.repeat([[1] * 13 + [2] * 19, [1] * 5 + [2] * 20 + [0] * 7], 1, axis=0).astype(np.int32)
    part = jax.P("data", "context", "tensor", None)

    def local(q, k, v, segments):
        plan = make_plan(segments, CAUSAL, seq_len=32)
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        offset = jax.lax.axis_index("context") * 16
        return attention(q, k, v, plan=plan, q_offset=offset, impl="tpu_interpret", config=SMALL)

    @quick
    def sharded(q, k, v, do):
        f = jax.shard_map(
            lambda q, k, v: local(q, k, v, segments_of_shard(segments)),
            mesh=mesh,
            in_specs=(part,) * 3,
            out_specs=part,
            check_vma=False,  # interpreted kernels mix what varies over an axis with what does not
        )
        o, transpose = jax.vjp(f, q, k, v)
        return o, *transpose(do)

    def segments_of_shard(segments):
        row = jax.lax.axis_index("data")
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(segments), row, 1, axis=0)

    @quick
    def whole(q, k, v):
        o, transpose = jax.vjp(lambda *x: attention(*x, segment_ids=segments, impl="reference"), q, k, v)
        return o, *transpose(do)

    with jax.set_mesh(mesh):
        got = sharded(*(jax.device_put(x, jax.sharding.NamedSharding(mesh, part)) for x in (q, k, v, do)))
    for x, r in zip(got, whole(q, k, v), strict=True):
        np.testing.assert_allclose(x, r, rtol=2e-5, atol=2e-5)


def test_only_rows_with_starts_of_their_own_are_decoded():
    """A shard of a training row has one offset and few queries too, and needs a gradient."""
    q, k = (jax.ShapeDtypeStruct((2, length, 2, 64), jnp.float32) for length in (8, 1024))
    for q_offset, decoding in ((512, False), (jnp.int32(512), False), (jnp.asarray([3, 512]), True)):
        problem = api.problem_of(q, k, AttentionSpec(), packed=False, q_offset=q_offset)
        assert problem.decoding is decoding


def test_plain_rows_are_no_packed_rows():
    """Without segment ids a plan says what causality says, which implementations without packing know too."""
    assert not make_plan(None, CAUSAL, seq_len=16).packed
    assert make_plan(np.ones((1, 16), np.int32), CAUSAL, seq_len=16).packed


def test_a_tile_of_a_cache_is_as_long_as_the_cache_lets_it_be():
    """One query a row made tiles of 128 keys once: eight times the steps."""
    decoding = dataclasses.replace(ON_TPU, num_queries=1, num_keys=4096, offset="rows", packed=False)
    assert decoding.decoding
    blocks = api._tpu_config(decoding, "pallas_tpu", None)
    assert api._decode_tiles(blocks, 4096)[0] == blocks.block_k == 1024
    assert api._decode_tiles(blocks, 1536) == (768, 256)
    # 33 times 128: a divisor would be 128 or 384.
    assert api._decode_tiles(blocks, 4224) == (1024, 256)
    assert api._decode_tiles(blocks, 4100) == (1024, 256)
    assert choose(dataclasses.replace(decoding, num_keys=4100), "pallas_tpu").impl == "pallas_tpu"
    many = dataclasses.replace(decoding, batch=20_000)
    with pytest.raises(ConfigError, match="work list of 20000 rows takes 640000 bytes .*decode fewer rows"):
        choose(many, "pallas_tpu")


def test_a_choice_is_logged_once(caplog):
    api.announce.cache_clear()
    q = array(1, 8, 2, 8)
    with caplog.at_level("INFO", logger=api.logger.name):
        for _ in range(3):
            jax.eval_shape(attention, q, q, q)
    assert [record.message.split(" (")[0] for record in caplog.records] == ["attention by xla"]


@pytest.mark.parametrize(
    ("cuda", "refused"), [((12, 8, 0), True), ((12, 9, 0), True), ((12, 9, 1), False), ((13, 0, 0), False)]
)
def test_a_ptxas_that_miscompiles_is_refused(monkeypatch, cuda, refused):
    monkeypatch.setattr(compat, "cuda_version", lambda: cuda)
    assert any("ptxas miscompiles" in reason for reason in compat.mosaic_gpu_reasons()) == refused
