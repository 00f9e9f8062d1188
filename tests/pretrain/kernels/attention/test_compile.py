"""Kernels lower for chips that are not here; with their compilers installed they compile for them too.

Lowering checks shapes, layouts and what the kernel language allows. The slow tests hand the result to the real
compilers, which also know memory sizes, tiling and registers.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export

from pretrain import compat
from pretrain.kernels.attention import api, hopper, tpu
from pretrain.kernels.attention.api import KERNEL_WIDTHS, attention
from pretrain.kernels.attention.configs import (
    HOPPER_SHARED_BYTES,
    HOPPER_TABLE,
    TPU_TABLE,
    VMEM_LIMIT_BYTES,
    hopper_blocks,
    tpu_blocks,
)
from pretrain.kernels.attention.plan import AttentionSpec, make_plan

EVERYTHING = AttentionSpec(window=1000, softcap=30.0)


def gradients(attend):
    """(q, k, v, segment ids, sinks, do) -> gradients, so that all three kernels are in the program."""

    def run(q, k, v, segments, sinks, do):
        def f(q, k, v, sinks):
            return attend(q, k, v, segments, sinks)

        _, transpose = jax.vjp(f, q, k, v, sinks)
        return transpose(do)

    return run


def arguments(width, length, layout=None, rows=1, heads=(4, 2), dtype=jnp.bfloat16):
    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=layout)

    q, k = (shape(dtype, rows, length, n, width) for n in heads)
    return q, k, k, shape(jnp.int32, rows, length), shape(jnp.float32, heads[0]), q


def on_tpu(q, k, v, segments, sinks, spec, packed=True):
    plan = make_plan(segments if packed else None, spec, seq_len=k.shape[1])
    return attention(q, k, v, plan=plan, spec=spec, sinks_N=sinks, impl="pallas_tpu")


def on_hopper(q, k, v, segments, sinks, spec, warpgroup_semantics, packed=True, blocks=None):
    plan = make_plan(segments if packed else None, spec, seq_len=k.shape[1])
    blocks = blocks or hopper_blocks(q.shape[3], packed)
    ranges = hopper.tile_ranges(plan, blocks)
    return hopper.hopper_attention(
        q, k, v, plan.k_lo_BT, ranges, sinks, spec, q_offset=0, warpgroup_semantics=warpgroup_semantics
    )[0]


def tpu_target():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    kinds = (jax.sharding.AxisType.Explicit,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), kinds, abstract_device=device)
    )


def test_tpu_kernels_lower_without_a_tpu():
    run = gradients(functools.partial(on_tpu, spec=EVERYTHING))
    with tpu_target():
        text = export.export(jax.jit(run), platforms=["tpu"])(*arguments(128, 1024)).mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3
    # No array of queries by keys: memory stays linear in the row.
    assert "1024x1024" not in text


@pytest.mark.parametrize("width", KERNEL_WIDTHS)
@pytest.mark.parametrize("warpgroup_semantics", [False, True])
@pytest.mark.skipif(bool(compat.mosaic_gpu_reasons()), reason="; ".join(compat.mosaic_gpu_reasons()))
def test_hopper_kernels_lower_without_a_gpu(width, warpgroup_semantics):
    spec = EVERYTHING if width == 128 else AttentionSpec()
    run = gradients(functools.partial(on_hopper, spec=spec, warpgroup_semantics=warpgroup_semantics))
    text = jax.jit(run).trace(*arguments(width, 512)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "512x512" not in text


@pytest.mark.parametrize(
    ("kernel", "width", "fields"),
    [
        ("forward", 64, {"stages": 12}),
        ("dq", 128, {"block_q_dq": 256}),
        ("dk/dv", 128, {"block_k_dkv": 256}),
        ("dk/dv", 256, {"block_q_dkv": 96}),
    ],
)
@pytest.mark.skipif(bool(compat.mosaic_gpu_reasons()), reason="; ".join(compat.mosaic_gpu_reasons()))
def test_shared_memory_is_counted_as_mosaic_counts_it(kernel, width, fields):
    """One kernel of the three is too large; the lowering says by how much."""
    blocks = dataclasses.replace(hopper_blocks(width, packed=True), **fields)
    taken = hopper.shared_memory_bytes(blocks, width)
    assert [name for name, size in taken.items() if size > HOPPER_SHARED_BYTES] == [kernel]
    run = gradients(
        functools.partial(on_hopper, spec=AttentionSpec(), warpgroup_semantics=False, blocks=blocks)
    )
    length = math.lcm(*blocks.multiple_of)
    with pytest.raises(ValueError, match=rf"shared memory: smem_bytes={taken[kernel]} "):
        jax.jit(run).trace(*arguments(width, length)).lower(lowering_platforms=("cuda",))


# --- the real compilers ------------------------------------------------------------------------------


# The smallest topology of each chip of the table.
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compiled_for_tpu(chip, width, spec, packed, monkeypatch, heads=(4, 2), dtype=jnp.bfloat16):
    """The program of forward and backward, and the tiles that it took."""
    pytest.importorskip("libtpu", reason="the [tpu] extra is not installed")
    # Otherwise libtpu looks for the metadata of a virtual machine, and lets one process at a time in.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = compat.tpu_mesh(TOPOLOGY[chip])
    layout = jax.sharding.NamedSharding(mesh, jax.P())
    run = gradients(functools.partial(on_tpu, spec=spec, packed=packed))
    given = arguments(width, 8192, layout, heads=heads, dtype=dtype)
    with jax.set_mesh(mesh):
        problem = api.problem_of(given[0], given[1], spec, packed=packed, sinks=True)
        return jax.jit(run).lower(*given).compile().as_text(), api._tpu_config(problem, "pallas_tpu", None)


def check_kernels(text, bounds):
    """Three kernels, no array of queries by keys, and no more vector memory than the bounds say."""
    assert "8192,8192" not in text
    names = {"forward": "attention_forward", "dq": "attention_backward_q", "dk/dv": "attention_backward_kv"}
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) == 3
    for kernel, bound in bounds.items():
        (call,) = (line for line in calls if re.search(rf'op_name="[^"]*{names[kernel]}\b', line))
        taken = re.search(
            r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"', call
        )
        assert 0 < int(taken[1]) <= bound, kernel


def test_the_rows_to_compile_are_three_chips_by_three_head_widths():
    """Which the slow test goes through, forward and backward, each plain and with everything."""
    assert set(TPU_TABLE) == set(itertools.product(TOPOLOGY, KERNEL_WIDTHS))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("chip", "width"), TPU_TABLE)
def test_tpu_kernels_compile(chip, width, packed, monkeypatch):
    """Every row of the table, forward and backward: three chips, three head widths, 8192 tokens."""
    spec = EVERYTHING if packed else AttentionSpec()
    text, blocks = compiled_for_tpu(chip, width, spec, packed, monkeypatch)
    check_kernels(text, tpu.vmem_bytes(blocks, 2, width, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "width", "heads", "dtype"),
    [("v5e", 256, (8, 1), "float32"), ("v5p", 128, (8, 1), "float32"), ("v6e", 128, (64, 1), "bfloat16")],
)
def test_tpu_kernels_compile_where_the_tiles_of_the_table_are_too_large(
    chip, width, heads, dtype, monkeypatch
):
    dtype = jnp.dtype(dtype)
    group = heads[0] // heads[1]
    assert (
        max(tpu.vmem_bytes(tpu_blocks(chip, width, group, False), group, width, dtype.itemsize).values())
        > (VMEM_LIMIT_BYTES[chip])
    )
    text, blocks = compiled_for_tpu(chip, width, EVERYTHING, False, monkeypatch, heads, dtype)
    check_kernels(text, tpu.vmem_bytes(blocks, group, width, dtype.itemsize))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGY)
@pytest.mark.parametrize("num_keys", [8192, 4100])
def test_tpu_decoding_compiles(chip, num_keys, monkeypatch):
    """A token for each of 16 texts against their caches, in tiles as long as the table says and the last one cut."""
    pytest.importorskip("libtpu", reason="the [tpu] extra is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = compat.tpu_mesh(TOPOLOGY[chip])
    layout = jax.sharding.NamedSharding(mesh, jax.P())
    q, k = (
        jax.ShapeDtypeStruct((16, length, heads, 128), jnp.bfloat16, sharding=layout)
        for length, heads in ((1, 8), (num_keys, 2))
    )
    starts = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=layout)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda q, k, v, at: attention(q, k, v, q_offset=at, impl="pallas_tpu"))
            .lower(q, k, k, starts)
            .compile()
        )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1


TARGET = (
    Path(os.environ.get("AUTODIDACT_DATA", Path(__file__).parents[5] / "shared" / "data"))
    / "aot/h100_sxm.txtpb"
)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("chip", "width"), HOPPER_TABLE)
def test_hopper_kernels_compile(chip, width, packed, monkeypatch):
    """Every row of the table, for an H100."""
    pytest.importorskip("jax_cuda12_plugin", reason="the [cuda] extra is not installed")
    if not TARGET.is_file():
        pytest.skip(f"no description of the chip at {TARGET}")
    ptxas = importlib.util.find_spec("nvidia.cuda_nvcc")
    if ptxas is not None:
        folder = Path(next(iter(ptxas.submodule_search_locations))) / "bin"
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    mesh = compat.gpu_mesh(TARGET.read_text())
    layout = jax.sharding.NamedSharding(mesh, jax.P())
    blocks = hopper_blocks(width, packed, chip)
    run = gradients(
        functools.partial(on_hopper, spec=EVERYTHING, warpgroup_semantics=False, packed=packed, blocks=blocks)
    )
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run).trace(*arguments(width, 8192, layout)).lower(lowering_platforms=("cuda",)).compile()
        )
    assert compiled.as_text().count("mosaic_gpu") >= 3
