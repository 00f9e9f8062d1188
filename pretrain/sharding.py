"""Five mesh axes, always present, and two tables that say which axes a logical dim is split over.

Weights rest in the layout of PARAM_RULES and are used in the layout of ACTIVATION_RULES; the way from one to
the other is `use_weight`, the only place where a weight is gathered (ZeRO-3, arXiv 1910.02054). Axes are of
explicit type: shardings are part of an array's type, so a contraction that would be ambiguous is an error at
trace time and not a surprise in the profile. Without a mesh in scope every function here is the identity,
so the model runs unchanged on one device.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pretrain.config import ConfigError

# replica is the only axis that crosses between TPU slices, and the one for slow links; see `device_grid` for GPU hosts.
AXES = ("replica", "fsdp", "context", "tensor", "expert")
DATA_AXES = ("replica", "fsdp", "expert")

Dims = tuple[str | None, ...]

_GPU_PLATFORMS = ("gpu", "cuda", "rocm")

# How a weight rests. A dim that is not listed is not split.
PARAM_RULES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp", "expert"),
    "expert_embed": ("fsdp",),  # weights of experts: the expert axis is taken by "experts"
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}

# How activations lie, and how a weight is laid out while it is used.
ACTIVATION_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "time": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}

# These dims stay whole where the axis does not divide them; all others raise.
_WHOLE_IF_UNEVEN = frozenset({"kv_heads"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis takes; at most one axis may be -1, which takes what is left."""

    replica: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes):
            raise ConfigError(
                f"mesh axes must be positive (or one of them -1 for the rest), got {self._text()}"
            )
        if sum(size == -1 for size in sizes) > 1:
            raise ConfigError(f"at most one mesh axis may be -1, got {self._text()}; state the others")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    def _text(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Sizes with -1 filled in.

        Raises:
          ConfigError: the axes do not multiply to `num_devices`.
        """
        given = int(np.prod([size for size in self.sizes if size != -1]))
        filled = tuple(num_devices // given if size == -1 else size for size in self.sizes)
        if int(np.prod(filled)) != num_devices:
            raise ConfigError(
                f"mesh axes must multiply to the number of devices, {num_devices}; got {self._text()}; "
                "change mesh.fsdp or set it to -1"
            )
        return filled


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all devices of the run by default), axes of explicit type.

    Raises:
      ConfigError: the axes do not multiply to the device count, or replica does not suit the slices or hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(config.resolve(len(devices)), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def device_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `sizes`, which device talks to which.

    Between TPU slices goes only `replica`. GPU hosts, which jax calls slices as well, are joined by a network that is
    slower than their own links but carries any axis: there `replica` is split by hosts when it is asked for, `fsdp` and
    the rest run on over hosts, and `tensor`, which talks most, is laid out last, inside a host where it fits.

    Raises:
      ConfigError: replica is not a multiple of the TPU slices, or would cut a GPU host.
    """
    if devices[0].platform in _GPU_PLATFORMS:
        return _gpu_grid(sizes, devices)
    num_slices = len({_slice_of(device) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % num_slices:
        raise ConfigError(
            f"mesh.replica must be a multiple of the number of slices, {num_slices}, got {sizes[0]}; "
            f"set mesh.replica={num_slices}"
        )
    within = (sizes[0] // num_slices, *sizes[1:])
    across = (num_slices, 1, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _slice_of(device: Any) -> int:
    """Devices with the same number are joined by fast links: a TPU slice, the GPUs of a host or of an NVLink domain."""
    return getattr(device, "slice_index", None) or 0


def _gpu_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    replica, fsdp, context, tensor, expert = sizes
    num_hosts = len({_slice_of(device) for device in devices})
    if replica % num_hosts and num_hosts % replica:
        raise ConfigError(
            f"mesh.replica must divide the number of GPU hosts or be a multiple of it, so that none is cut; got {replica} "
            f"on {num_hosts} hosts; mesh.replica=1 lets fsdp run over all of them"
        )
    in_order = sorted(devices, key=lambda device: (_slice_of(device), device.process_index, device.id))
    flat = np.empty(len(in_order), object)
    flat[:] = in_order
    return flat.reshape(replica, fsdp, context, expert, tensor).swapaxes(3, 4)


def axis_size(mesh: Any, axes: Sequence[str]) -> int:
    """Product of the sizes of `axes`."""
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))


def axis_names(entry: Any) -> tuple[str, ...]:
    """One entry of a PartitionSpec as a tuple of axis names, major first."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def partition_spec(
    dims: Dims, shape: Sequence[int], rules: Mapping[str, tuple[str, ...]], mesh: Any
) -> PartitionSpec:
    """Where an array with logical `dims` lies on `mesh`; axes of size one are left out.

    Raises:
      ConfigError: an axis does not divide the dim it splits.
    """
    assert len(dims) == len(shape), (dims, shape)
    entries: list[tuple[str, ...] | str | None] = []
    for dim, size in zip(dims, shape, strict=True):
        axes = tuple(axis for axis in rules.get(dim or "", ()) if mesh.shape[axis] > 1)
        parts = axis_size(mesh, axes)
        if size % parts:
            if dim not in _WHOLE_IF_UNEVEN:
                raise ConfigError(
                    f"{dim} must divide evenly over the mesh axes {', '.join(axes)} ({parts} parts), "
                    f"got {size}; change the mesh or the size"
                )
            axes = ()
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def current_mesh() -> Any | None:
    """The mesh in scope when it has more than one device, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def activation_spec(dims: Dims, shape: Sequence[int]) -> PartitionSpec | None:
    """Layout of an activation on the mesh in scope, or None without one."""
    mesh = current_mesh()
    return None if mesh is None else partition_spec(dims, shape, ACTIVATION_RULES, mesh)


def place(x: jax.Array, dims: Dims) -> jax.Array:
    """Bring an activation into the layout of the table."""
    spec = activation_spec(dims, x.shape)
    return x if spec is None else jax.sharding.reshard(x, spec)


def use_weight(weight: jax.Array, dims: Dims, dtype: Any) -> jax.Array:
    """Cast a weight for computing and gather it from its resting layout; the transpose reduce-scatters.

    The cast comes first, so that bfloat16 travels and not float32.
    """
    return place(weight.astype(dtype), dims)


def use_local_weight(weight: jax.Array, resting: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """`use_weight` inside `shard_map`: gather what `resting` splits and `used` does not.

    Here the transpose is a reduce-scatter by construction.
    """
    for dim, (at_rest, in_use) in enumerate(zip(resting, used, strict=True)):
        assert set(axis_names(in_use)) <= set(axis_names(at_rest)), (resting, used)
        axes = tuple(axis for axis in axis_names(at_rest) if axis not in axis_names(in_use))
        if axes:
            weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def shardings_of(dims_tree: Any, shapes_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of parameters from trees of dims and of shaped values (same structure)."""

    def sharding(dims: Dims, value: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(dims, value.shape, PARAM_RULES, mesh))

    return jax.tree.map(sharding, dims_tree, shapes_tree, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of scalars: whole on every device, as global arrays."""
    return NamedSharding(mesh, PartitionSpec())


def in_turn(result: Any) -> Any:
    """`result`, computed before the next program starts where it lies on several CPU devices.

    XLA:CPU runs the parts of a program on one pool of threads. Two programs with collectives in flight can each
    hold threads that the other's parts wait for; the process then aborts after 40 seconds. Accelerators run
    programs in the order of their dispatch, and nothing is waited for there.
    """
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            devices = leaf.sharding.device_set
            if len(devices) > 1 and next(iter(devices)).platform == "cpu":
                return jax.block_until_ready(result)
            return result
    return result


class OnMesh:
    """A jitted function that is always traced and called with `mesh` in scope."""

    def __init__(self, function: Any, mesh: Mesh | None):
        self._function, self._mesh = function, mesh

    def _scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def __call__(self, *arguments: Any) -> Any:
        with self._scope():
            return in_turn(self._function(*arguments))

    def trace(self, *arguments: Any) -> Any:
        """As `jax.jit(f).trace`."""
        with self._scope():
            return self._function.trace(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit(f).lower`."""
        with self._scope():
            return self._function.lower(*arguments)


# --- to the host -------------------------------------------------------------------------------------


def host_blocks(array: jax.Array, block_bytes: int) -> Iterator[np.ndarray]:
    """The elements of `array` in C order, in blocks of at most `block_bytes` bytes where an element is no larger.

    Every process of the run goes through the same blocks at the same time and gets all of them, also of arrays that
    no host holds whole. While a block is made it lies on every device, whatever the mesh: a stacked leaf of a large
    model has tens of GiB, and gathering one at once takes more memory than training.
    """
    sharding = array.sharding
    if array.is_fully_addressable and (
        array.nbytes <= block_bytes or not isinstance(sharding, NamedSharding)
    ):
        yield np.asarray(array)
        return
    assert isinstance(sharding, NamedSharding), sharding  # what our programs leave behind
    block = block_shape(array.shape, sharding.shard_shape(array.shape), block_bytes // array.dtype.itemsize)
    take = block_reader(sharding, array.shape, block)
    for start in itertools.product(*map(range, [0] * array.ndim, array.shape, block)):
        yield np.asarray(take(array, np.asarray(start, np.int32)))


def block_shape(shape: Sequence[int], local: Sequence[int], num_elements: int) -> tuple[int, ...]:
    """The largest block whose elements follow each other in C order and whose cut falls on no border of a shard."""
    block = [1] * len(shape)
    for dim in reversed(range(len(shape))):
        rest = int(np.prod(shape[dim + 1 :], dtype=np.int64))
        if shape[dim] * rest <= num_elements:
            block[dim] = shape[dim]
            continue
        sizes = range(1, local[dim] + 1)
        block[dim] = max((n for n in sizes if local[dim] % n == 0 and n * rest <= num_elements), default=1)
        break
    return tuple(block)


def block_reader(sharding: NamedSharding, shape: Sequence[int], block: Sequence[int]) -> OnMesh:
    """The jitted `(array, start int32[dims]) -> array[start : start + block]`, whole on every device.

    Each dim of `block` is the whole dim, or divides a shard's.
    """
    mesh, local = sharding.mesh, sharding.shard_shape(tuple(shape))
    assert isinstance(mesh, Mesh)
    axes = [axis_names(entry) for entry in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))]

    def read(part: jax.Array, start: jax.Array) -> jax.Array:
        here, first, size, owners = True, [], [], ()
        for dim, whole in enumerate(shape):
            if block[dim] == whole:
                first.append(0)
                size.append(local[dim])
                continue
            first.append(start[dim] % local[dim])
            size.append(block[dim])
            if axes[dim]:
                here &= jax.lax.axis_index(axes[dim]) == start[dim] // local[dim]
                owners += axes[dim]
        piece = jax.lax.dynamic_slice(part, first, size)
        if owners:  # who has nothing adds zero; as integers, because -0.0 + 0.0 is 0.0
            words = _as_words(piece)
            words = jax.lax.psum(jnp.where(here, words, jnp.zeros_like(words)), owners)
            piece = _from_words(words, piece.dtype)
        for dim, whole in enumerate(shape):
            if block[dim] == whole and local[dim] != whole:
                piece = jax.lax.all_gather(piece, axes[dim], axis=dim, tiled=True)
        return piece

    # A gathered block is the same everywhere, which the check of what varies over which axis cannot know.
    whole_everywhere = jax.shard_map(
        read,
        mesh=mesh,
        in_specs=(sharding.spec, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return OnMesh(jax.jit(whole_everywhere), mesh)


def _as_words(x: jax.Array) -> jax.Array:
    """The bits of `x` as integers of 32 bits or more, which all backends add up."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return bits.astype(jnp.uint32) if x.dtype.itemsize < 4 else bits


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_as_words`."""
    if dtype == jnp.bool_:
        return words.astype(dtype)
    bits = words.astype(jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}"))
    return jax.lax.bitcast_convert_type(bits, dtype)
