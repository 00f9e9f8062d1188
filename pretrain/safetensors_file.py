"""The safetensors format: eight bytes with the length of a JSON header, the header, the raw tensors.

Read through a memory map by rows, so that a tensor can go to its devices in parts, and written one tensor at a
time. The format is small enough to need no package, and the package reads no rows of a bfloat16 tensor into numpy.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pretrain.config import ConfigError

DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_NAME_OF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MAX_HEADER_BYTES = 100_000_000  # the limit that other readers keep too
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """A tensor in a memory map; its bytes are read when asked for."""

    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows of the first dim, in float32."""
        return self.data[start:stop].astype(np.float32)


def open_tensors(path: Path, *, leave_out: Collection[str] = ()) -> dict[str, MappedTensor]:
    """All tensors of one file but `leave_out` (buffers of integers that some models keep), nothing of them read.

    Raises:
      ConfigError: the file is not there, is no safetensors file, is cut short, or holds tensors that are no floats.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            header, start = _read_header(file, size, path)
        buffer = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise ConfigError(f"a tensor file must be readable, got {path}: {error.strerror or error}") from error
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and name not in leave_out:
            tensors[name] = MappedTensor(_view(name, entry, buffer, start, path))
    return tensors


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ConfigError(f"{path} must be a safetensors file, got {size} bytes without its header")
    if 8 + length > size:
        raise ConfigError(f"{path} is cut short: its header alone has {length} bytes, the file {size}")
    try:
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"it is no object but {type(header).__name__}")
        ends = [_end(name, entry) for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except ValueError as error:
        raise ConfigError(
            f"{path} must be a safetensors file, got a header that is damaged: {error}; fetch it again"
        ) from error
    if needed > size:
        raise ConfigError(
            f"{path} is cut short: its tensors end at byte {needed}, the file has {size}; fetch it again"
        )
    return header, 8 + length


def _end(name: str, entry: Any) -> int:
    """Where the bytes of a tensor end; ValueError when its entry is not one."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} has no object but {entry!r}")
    lists = [entry.get("shape"), entry.get("data_offsets")]
    numbers = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in lists)
    if not isinstance(entry.get("dtype"), str) or not numbers or len(entry["data_offsets"]) != 2:
        raise ValueError(f"{name} needs dtype, shape and two data_offsets, and has {entry}")
    return entry["data_offsets"][1]


def _view(name: str, entry: Mapping[str, Any], buffer: np.ndarray, start: int, path: Path) -> np.ndarray:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ConfigError(
            f"tensors must be of type {', '.join(DTYPES)}, got {entry['dtype']} for {name} in {path}"
        )
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(entry["shape"]) * np.dtype(dtype).itemsize:
        raise ConfigError(
            f"{path} is damaged: {name} has {end - begin} bytes for shape {entry['shape']} of {entry['dtype']}"
        )
    return buffer[start + begin : start + end].view(dtype).reshape(entry["shape"])


def write_tensors(
    file: BinaryIO, tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str
) -> None:
    """Write tensors as `dtype` (float32, bfloat16 or float16), one after the other; each is made when its turn comes.

    Raises:
      ConfigError: a number is too large for `dtype`.
    """
    tensors = list(tensors)
    kind = np.dtype(DTYPES[_NAME_OF[dtype]])
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # other readers refuse a file that does not say so
    offset = 0
    for name, shape, _ in tensors:
        end = offset + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape, make in tensors:
        value = make()
        assert value.shape == shape, (name, value.shape, shape)
        with np.errstate(over="ignore"):  # it is refused below, with its name
            stored = np.ascontiguousarray(value.astype(kind))
        over = np.isfinite(value) & ~np.isfinite(stored)
        if over.any():
            raise ConfigError(
                f"the numbers of a tensor must fit {dtype}, at most {float(ml_dtypes.finfo(kind).max):.6g}, got "
                f"{float(np.abs(value[over]).max()):.6g} in {name}; write bfloat16 or float32"
            )
        file.write(stored.tobytes())


def split_into_files(
    tensors: Iterable[tuple[str, tuple[int, ...], Any]], dtype: str, max_bytes: int
) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """The tensors in order, in groups of at most `max_bytes` (a larger tensor is a group of its own)."""
    width = np.dtype(DTYPES[_NAME_OF[dtype]]).itemsize
    group, group_bytes = [], 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * width
        if group and group_bytes + size > max_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(tensor)
        group_bytes += size
    if group:
        yield group
