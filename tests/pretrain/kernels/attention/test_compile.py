"""Kernels lower for chips that are not here; with their compilers installed they compile for them too.

Lowering checks shapes, layouts and what the kernel language allows. The slow tests hand the result to the real
compilers, which also know memory sizes, tiling and registers.
"""

import functools
import importlib.util
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export

from pretrain import compat
from pretrain.kernels.attention import hopper
from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.configs import HOPPER_TABLE, TPU_TABLE, hopper_blocks
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


def arguments(width, length, layout=None, rows=1, heads=(4, 2)):
    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=layout)

    q, k = (shape(jnp.bfloat16, rows, length, n, width) for n in heads)
    return q, k, k, shape(jnp.int32, rows, length), shape(jnp.float32, heads[0]), q


def on_tpu(q, k, v, segments, sinks, spec, packed=True):
    plan = make_plan(segments if packed else None, spec, seq_len=k.shape[1])
    return attention(q, k, v, plan=plan, spec=spec, sinks_N=sinks, impl="pallas_tpu")


def on_hopper(q, k, v, segments, sinks, spec, warpgroup_semantics, packed=True):
    plan = make_plan(segments if packed else None, spec, seq_len=k.shape[1])
    blocks = hopper_blocks(q.shape[3], packed)
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


@pytest.mark.parametrize("width", sorted(HOPPER_TABLE))
@pytest.mark.parametrize("warpgroup_semantics", [False, True])
@pytest.mark.skipif(bool(compat.mosaic_gpu_reasons()), reason="; ".join(compat.mosaic_gpu_reasons()))
def test_hopper_kernels_lower_without_a_gpu(width, warpgroup_semantics):
    spec = EVERYTHING if width == 128 else AttentionSpec()
    run = gradients(functools.partial(on_hopper, spec=spec, warpgroup_semantics=warpgroup_semantics))
    text = jax.jit(run).trace(*arguments(width, 512)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "512x512" not in text


# --- the real compilers ------------------------------------------------------------------------------


# The smallest topology of each chip of the table.
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("chip", "width"), TPU_TABLE)
def test_tpu_kernels_compile(chip, width, packed, monkeypatch):
    """Every row of the table, forward and backward."""
    pytest.importorskip("libtpu", reason="the [tpu] extra is not installed")
    # Otherwise libtpu looks for the metadata of a virtual machine, and lets one process at a time in.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = compat.tpu_mesh(TOPOLOGY[chip])
    layout = jax.sharding.NamedSharding(mesh, jax.P())
    run = gradients(functools.partial(on_tpu, spec=EVERYTHING if packed else AttentionSpec(), packed=packed))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*arguments(width, 8192, layout)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "8192,8192" not in text


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGY)
def test_tpu_decoding_compiles(chip, monkeypatch):
    """A token for each of 16 texts against caches of 8192 keys, in tiles as long as the table says."""
    pytest.importorskip("libtpu", reason="the [tpu] extra is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = compat.tpu_mesh(TOPOLOGY[chip])
    layout = jax.sharding.NamedSharding(mesh, jax.P())
    q, k = (
        jax.ShapeDtypeStruct((16, length, heads, 128), jnp.bfloat16, sharding=layout)
        for length, heads in ((1, 8), (8192, 2))
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
@pytest.mark.parametrize("width", sorted(HOPPER_TABLE))
def test_hopper_kernels_compile(width, packed, monkeypatch):
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
    run = gradients(functools.partial(on_hopper, spec=EVERYTHING, warpgroup_semantics=False, packed=packed))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run).trace(*arguments(width, 8192, layout)).lower(lowering_platforms=("cuda",)).compile()
        )
    assert compiled.as_text().count("mosaic_gpu") >= 3
