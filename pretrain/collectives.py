"""Collectives of a compiled program: kind, mesh axes, bytes, and how often a step runs them, read from HLO text.

XLA's own cost analysis counts the body of a loop once and says nothing of axes. Here every collective carries the
product of the trip counts of the loops around it and the axes over which the members of its groups differ.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\([^)]*.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_SCALAR = re.compile(r"=\s*[su]32\[\]\S*\s+constant\((\d+)\)")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+(?:,\d+)*)\]<=\[(\d+(?:,\d+)*)\](?:T\((\d+(?:,\d+)*)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
# Between slices XLA:TPU sends to the host, whose runtime does the collective: "{1,2}x{0:15}" are devices 0 to 15 of two
# slices, and equal places of all slices form a group.
_BETWEEN_SLICES = re.compile(
    r'\bsend\(.*_xla_megascale_target="\{([\d,]+)\}x.*_xla_megascale_transfer_type="(\w+)"'
)
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction; bytes are those that one device sends over its links in one execution."""

    name: str
    kind: str
    axes: tuple[str, ...]  # over which the members of a group differ; () moves nothing between devices
    group_size: int
    bytes_sent: float
    executions: int  # a step
    loop_depth: int  # 0 outside of all loops
    loop_trips: tuple[int, ...]  # of the loops around it, outermost first

    @property
    def bytes_per_step(self) -> float:
        """What one device sends in a whole step."""
        return self.bytes_sent * self.executions


@dataclasses.dataclass(frozen=True)
class _Computation:
    is_entry: bool
    lines: list[tuple[str, str]]  # (name of the instruction, text after the equals sign)


def find_collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives that one execution of the program runs, in program order.

    `mesh_shape` are the axes in the order of the mesh, major first, with their sizes: partition i of the program is
    device i of the flattened mesh. A loop whose trip count the text does not tell counts once.
    """
    computations = _computations(hlo)
    (entry,) = (name for name, computation in computations.items() if computation.is_entry)
    found: dict[str, Collective] = {}
    _walk(computations, entry, (), found, mesh_shape)
    return list(found.values())


def count(collectives: Iterable[Collective], loop_trips: int | None = None) -> dict[str, int]:
    """Instructions by kind, absent kinds left out; with `loop_trips` only those whose innermost loop has that many."""
    counts = dict.fromkeys(KINDS, 0)
    for item in collectives:
        if item.axes and (loop_trips is None or item.loop_trips[-1:] == (loop_trips,)):
            counts[item.kind] += 1
    return {kind: number for kind, number in counts.items() if number}


def _computations(hlo: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in hlo.splitlines():
        if not line.startswith((" ", "}")) and (header := _COMPUTATION.match(line)):
            current = found[header[2]] = _Computation(is_entry=header[1] is not None, lines=[])
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.lines.append((instruction[1], instruction[2]))
    return found


def _walk(
    computations: Mapping[str, _Computation],
    name: str,
    trips: tuple[int, ...],
    found: dict[str, Collective],
    mesh_shape: Mapping[str, int],
) -> None:
    for instruction, text in computations[name].lines:
        kind = _kind(text)
        if kind is not None:
            # XLA:TPU writes the phases of one asynchronous collective as several instructions of one chain.
            chain = _CHAIN.search(text)
            key = f"chain {chain[1]} {chain[2]}" if chain else f"{name} {instruction} {len(found)}"
            found.setdefault(key, _collective(instruction, kind, text, name, trips, mesh_shape))
            continue  # the computation it applies is the sum of two numbers
        called = {key: _names(value) for key, value in _CALLED.findall(text.partition("metadata=")[0])}
        if "body" in called:
            inner = (*trips, _trip_count(computations, text, called["condition"][0]))
            _walk(computations, called["body"][0], inner, found, mesh_shape)
            continue
        for callee in (callee for callees in called.values() for callee in callees):
            if callee in computations:
                _walk(computations, callee, trips, found, mesh_shape)


def _names(value: str) -> list[str]:
    return [name.strip().lstrip("%") for name in value.strip("{}").split(",")]


def _kind(text: str) -> str | None:
    """The kind of a collective instruction; of an asynchronous pair the start counts."""
    if between := _BETWEEN_SLICES.search(text):
        return between[2].lower().replace("_", "-")
    operation = re.search(r"(?:^|\s)([a-z][\w\-]*)\(", text)
    if operation is None:
        return None
    name = operation[1].removesuffix("-start")
    return name if name in KINDS else None


def _trip_count(computations: Mapping[str, _Computation], text: str, condition: str) -> int:
    """Trips of a `while`: what the compiler notes, or the only number its condition compares with."""
    if noted := _TRIP_COUNT.search(text):
        return int(noted[1])
    numbers: set[int] = set()
    queue = [condition]
    while queue:
        for name, body in computations[queue.pop()].lines:
            if number := _SCALAR.search(f"{name} = {body}"):
                numbers.add(int(number[1]))
            queue += [n for _, value in _CALLED.findall(body) for n in _names(value) if n in computations]
    numbers -= {0}
    return numbers.pop() if len(numbers) == 1 else 1


def _collective(
    name: str, kind: str, text: str, computation: str, trips: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> Collective:
    groups = _groups(text, kind, math.prod(mesh_shape.values()))
    axes = _axes(groups, mesh_shape)
    size = groups.shape[1] if kind != "collective-permute" else 2
    result_bytes = _result_bytes(text, kind, asynchronous="-start(" in text)
    # XLA:TPU writes a reduce-scatter as an all-reduce and a slice in one fusion, and runs it as the former.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, result_bytes = "reduce-scatter", result_bytes / size
    return Collective(
        name=name,
        kind=kind,
        axes=axes,
        group_size=size,
        bytes_sent=_bytes_sent(kind, result_bytes, size),
        executions=math.prod(trips),
        loop_depth=len(trips),
        loop_trips=trips,
    )


def _bytes_sent(kind: str, result_bytes: float, group_size: int) -> float:
    """What one device sends in the ring algorithms, from the size of the result."""
    others = group_size - 1
    match kind:
        case "all-gather" | "all-to-all":
            return result_bytes * others / group_size
        case "reduce-scatter":
            return result_bytes * others
        case "all-reduce":
            return 2 * result_bytes * others / group_size
        case "collective-permute":
            return result_bytes
    raise AssertionError(kind)


def _result_bytes(text: str, kind: str, *, asynchronous: bool) -> float:
    """Bytes of the result on one device; the type of a start is (operands, results, flags)."""
    declared = text[: re.search(r"(?:^|\s)[a-z][\w\-]*\(", text).start()]  # type: ignore[union-attr]
    sizes = [
        _BYTES.get(dtype, 1) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in _ARRAY.findall(declared)
    ]
    if _BETWEEN_SLICES.search(text):  # (what is sent, a context, a token)
        return float(sizes[0])
    if not asynchronous or kind == "all-reduce":  # an all-reduce's start has the type of its result
        return float(sum(sizes))
    large = [size for size in sizes if size > 4]  # a permute's start carries two flags
    return float(sum(large[len(large) // 2 :]))


def _groups(text: str, kind: str, num_devices: int) -> np.ndarray:
    """Members of each group, [groups, members]; pairs (source, target) for a permute."""
    if between := _BETWEEN_SLICES.search(text):
        num_slices = between[1].count(",") + 1
        return np.arange(num_devices).reshape(num_slices, -1).T
    if iota := _IOTA_GROUPS.search(text):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(source or [])).reshape(source or [])
        return (ids if order is None else ids.transpose(order)).reshape(shape or [])
    if mesh := _MESH_GROUPS.search(text):
        return _mesh_groups(*mesh.groups())
    listed = _LISTED_GROUPS.search(text)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    if not groups:  # no groups: all devices together
        return np.arange(num_devices).reshape(1, -1)
    return np.array([[int(n) for n in group.split(",")] for group in groups])


def _mesh_groups(axes: str, device_ids: str | None, chosen: str) -> np.ndarray:
    """Groups written as axes of a mesh of the compiler's: 'a'=2,'b'=4 and {'b'}, or {'b':(1)2} for a part of one."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order := re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", device_ids or ""):
        shape, permutation = ([int(n) for n in part.split(",")] for part in order.groups())
        ids = ids.reshape(shape).transpose(permutation).reshape(-1)
    parts = {
        name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    dims, members = [], []
    for name, whole in sizes.items():
        before, size = parts.get(name, ("1", "1"))
        before, size = int(before or 1), int(size or whole)
        members.append(len(dims) + 1)
        dims += [before, size, whole // (before * size)]
    rest = [i for i in range(len(dims)) if i not in members]
    group_size = math.prod(dims[i] for i in members)
    return ids.reshape(dims).transpose(rest + members).reshape(-1, group_size)


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))
    return tuple(
        axis for axis, where in zip(mesh_shape, coordinates, strict=True) if (where != where[:, :1]).any()
    )
