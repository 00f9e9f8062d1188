"""Which device lies where: TPU slices are crossed by replica alone, GPU hosts by whatever is asked for."""

import dataclasses
import types

import numpy as np
import pytest

from pretrain.aot import slow_axes
from pretrain.config import ConfigError
from pretrain.sharding import AXES, MeshConfig, device_grid


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not here."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"


def gpu_hosts(num_hosts: int, processes_each: int = 1) -> list[Device]:
    """Hosts of eight GPUs, in an order that says nothing."""
    devices = [
        Device(
            id=8 * host + i, slice_index=host, process_index=host * processes_each + i * processes_each // 8
        )
        for host in range(num_hosts)
        for i in range(8)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def hosts_along(grid: np.ndarray, axis: str) -> int:
    """On how many hosts the devices lie that differ in `axis` alone, at most."""
    lines = np.moveaxis(grid, AXES.index(axis), -1)
    lines = lines.reshape(-1, lines.shape[-1])
    return max(len({device.slice_index for device in line}) for line in lines)


@pytest.mark.parametrize(
    ("num_hosts", "config", "hosts"),
    [
        (4, MeshConfig(), {"fsdp": 4}),
        (4, MeshConfig(tensor=8), {"fsdp": 4, "tensor": 1}),
        (4, MeshConfig(fsdp=2, tensor=16), {"fsdp": 2, "tensor": 2}),
        (4, MeshConfig(tensor=8, expert=2), {"fsdp": 2, "expert": 2, "tensor": 1}),
        (4, MeshConfig(tensor=2, expert=4), {"fsdp": 4, "expert": 1, "tensor": 1}),
        (4, MeshConfig(replica=2, tensor=4), {"replica": 2, "fsdp": 2, "tensor": 1}),
        (4, MeshConfig(replica=8, tensor=2), {"replica": 4, "fsdp": 1, "tensor": 1}),
        (1, MeshConfig(replica=2, tensor=4), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("processes_each", [1, 8])
def test_gpu_hosts_are_crossed_by_what_is_asked_for_and_tensor_stays_inside_where_it_fits(
    num_hosts, config, hosts, processes_each
):
    devices = gpu_hosts(num_hosts, processes_each)
    sizes = config.resolve(len(devices))
    grid = device_grid(sizes, devices)
    assert grid.shape == sizes
    assert set(grid.flat) == set(devices)
    assert {axis: hosts_along(grid, axis) for axis in AXES} == {**dict.fromkeys(AXES, 1), **hosts}
    mesh = types.SimpleNamespace(devices=grid, axis_names=AXES)
    assert slow_axes(mesh) == {axis for axis, number in hosts.items() if number > 1}


def test_a_replica_that_would_cut_a_gpu_host_is_refused():
    with pytest.raises(ConfigError, match="must divide the number of GPU hosts .* got 2 on 3 hosts"):
        device_grid(MeshConfig(replica=2).resolve(24), gpu_hosts(3))


def test_tpu_slices_are_crossed_by_replica_alone():
    devices = [dataclasses.replace(device, platform="tpu") for device in gpu_hosts(2)]
    with pytest.raises(
        ConfigError, match="mesh.replica must be a multiple of the number of slices, 2, got 1"
    ):
        device_grid(MeshConfig().resolve(16), devices)
