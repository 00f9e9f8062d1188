"""The one file that knows jax versions: what moved between 0.10 and 0.12, behind one spelling each."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # jax names these two in no public module
from jax._src.lib import cuda_versions
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh

VERSION = jax.__version_info__

# Before 0.10.2 the warpgroup semantics of Mosaic GPU lower not even a plain matrix product, and out_type is unknown.
MOSAIC_GPU_SINCE = (0, 10, 2)


def mosaic_gpu_reasons() -> list[str]:
    """Why this jax cannot build Hopper kernels; empty when it can.

    The version is not asked once jax >= 0.10.2 is required; jax's own kernels refuse the same CUDA versions.
    """
    reasons = []
    if VERSION < MOSAIC_GPU_SINCE:
        reasons.append(
            f"needs jax >= {'.'.join(map(str, MOSAIC_GPU_SINCE))} for Mosaic GPU, got {jax.__version__}"
        )
    cuda = cuda_version()
    if cuda is not None and (12, 8, 0) <= cuda < (12, 9, 1):
        reasons.append(
            "needs a CUDA outside of 12.8.0 to 12.9.0, whose ptxas miscompiles causal loops, got "
            + ".".join(map(str, cuda))
        )
    return reasons


def cuda_version() -> tuple[int, int, int] | None:
    """Of the CUDA that jax runs with, or None without one."""
    if cuda_versions is None:
        return None
    number = cuda_versions.cuda_runtime_get_version()
    return number // 1000, number // 10 % 100, number % 10


def wait_at_barrier(name: str, timeout_s: int) -> None:
    """Return when every process of the run has called this with `name`, which no earlier call has had.

    It waits at the coordinator, not on the devices: no collective's own time limit ends it, and signals are handled
    meanwhile if another thread than the main one waits. Public in none of 0.10 to 0.12.

    Raises:
      jax.errors.JaxRuntimeError: `timeout_s` seconds are over, or a process is lost.
    """
    assert global_state.client is not None, "only after jax.distributed.initialize"
    global_state.client.wait_at_barrier(name, timeout_s * 1000)


def mgpu_kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch_types: Mapping[str, Any],
    grid: Mapping[str, int],
    num_threads: int,
    thread_name: str,
    name: str,
    warpgroup_semantics: bool,
) -> Callable[..., Any]:
    """A Mosaic GPU kernel; `grid` maps axis names to sizes, the first varies fastest.

    The default of the lowering semantics changed in 0.11, so it is always said. Not needed once that has settled.
    """
    semantics = plgpu.LoweringSemantics.Warpgroup if warpgroup_semantics else plgpu.LoweringSemantics.Lane
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=dict(scratch_types),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=num_threads,
        thread_name=thread_name,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=semantics),
    )


def mgpu_load(ref: Any, layout: Any) -> Any:
    """All of a reference as an array in `layout`. The index went in 0.11 and was refused in 0.12; not needed from there on."""
    whole = ((),) if VERSION < (0, 11) else ()
    return plgpu.load(ref, *whole, layout=layout)


def tpu_mesh(topology: str) -> Mesh:
    """One device of a TPU topology such as "v5e:2x2" that is not here, to compile for; needs libtpu."""
    return _one_device(topologies.get_topology_desc(topology_name=topology, platform="tpu"))


def gpu_mesh(target_config: str) -> Mesh:
    """One GPU that is not here, to compile for; needs jax's CUDA plugin and ptxas.

    `target_config` is XLA's description of the chip, a text protocol buffer.
    """
    return _one_device(
        topologies.get_topology_desc(
            topology_name="target", platform="cuda", topology="1x1x1", target_config=target_config
        )
    )


def _one_device(topology: topologies.TopologyDescription) -> Mesh:
    return Mesh(np.array(topology.devices[:1]), ("device",))
