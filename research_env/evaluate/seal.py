"""Seal what a run left behind: only declared files, only plain ones, copied to a folder the run never saw, hashed.

It runs after the run's last process is gone. Nothing is followed: every open is relative to a descriptor, with O_NOFOLLOW.
"""

import contextlib
import fnmatch
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from research_env.records import digest

MAX_FILES = 1000
_MAX_DEPTH = 4


class NoArtifact(Exception):
    """The run left nothing that the task's declaration accepts; says why."""


def seal_artifact(output: Path, sealed: Path, patterns: Sequence[str], max_bytes: int) -> str:
    """Copy the files under `output` that match a pattern into the new folder `sealed`; returns their digest.

    Raises:
      NoArtifact: nothing matches, something is not a plain file or cannot be read, or it is too much.
    """
    with _readable():
        root = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with _readable():
            names = sorted(_list(root, "", 0))
        wanted = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not wanted:
            raise NoArtifact(
                f"the run must leave {', '.join(patterns)} in its output folder; it left {names[:10] or 'nothing'}"
            )
        sealed.mkdir(mode=0o755)
        parts: list[str | bytes] = []
        left = max_bytes
        for name in wanted:
            with _readable():
                data = _read(root, name, left)
            left -= len(data)
            if name.endswith(".safetensors"):
                check_safetensors(data, name)
            target = sealed / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o644)
            parts += [name, data]
        for folder, _, _ in os.walk(sealed):
            os.chmod(folder, 0o755)
        return digest(*parts)
    finally:
        os.close(root)


def digest_artifact(sealed: Path) -> str:
    """The digest of a sealed folder, to compare with what was recorded."""
    parts: list[str | bytes] = []
    for path in sorted(
        (p for p in sealed.rglob("*") if p.is_file()), key=lambda p: p.relative_to(sealed).as_posix()
    ):
        parts += [path.relative_to(sealed).as_posix(), path.read_bytes()]
    return digest(*parts)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """The job may have taken rights away from its files: that stops all but root, and is no fault of the host."""
    try:
        yield
    except PermissionError as error:
        raise NoArtifact("a file or folder in the output folder cannot be read") from error


def _list(folder: int, prefix: str, depth: int) -> list[str]:
    found: list[str] = []
    for name in os.listdir(folder):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        path = prefix + name
        if len(found) > MAX_FILES:
            raise NoArtifact(f"the output folder holds more than {MAX_FILES} files")
        if not path.isprintable() or "\\" in path:
            raise NoArtifact("a file name in the output folder is not printable")
        if stat.S_ISDIR(status.st_mode):
            if depth >= _MAX_DEPTH:
                raise NoArtifact(f"the output folder is nested deeper than {_MAX_DEPTH}")
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                found += _list(child, path + "/", depth + 1)
            finally:
                os.close(child)
        elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            found.append(path)
        else:
            raise NoArtifact(
                f"{path!r} in the output folder is a link or a device; only plain files are accepted"
            )
    return found


def _read(root: int, path: str, max_bytes: int) -> bytes:
    fd = os.dup(root)
    try:
        *folders, name = path.split("/")
        for part in folders:
            child = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = child
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        try:
            size = os.fstat(file).st_size
            if size > max_bytes:
                raise NoArtifact(
                    f"{path!r} is too large: the artifact may have {max_bytes} more bytes, it has {size}"
                )
            with os.fdopen(os.dup(file), "rb") as stream:
                return stream.read(size)
        finally:
            os.close(file)
    finally:
        os.close(fd)


def check_safetensors(data: bytes, name: str) -> None:
    """A header of bounded size whose offsets tile the rest exactly: numbers and nothing else.

    Raises:
      NoArtifact: anything different.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, 1 << 20):
        raise NoArtifact(f"{name}: the safetensors header has a wrong length")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        spans = sorted(
            (tuple(entry["data_offsets"]), entry["dtype"], tuple(entry["shape"])) for entry in header.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoArtifact(f"{name}: the safetensors header cannot be read") from error
    sizes = {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
    }
    end = 0
    for (first, last), dtype, shape in spans:
        count = sizes.get(dtype, 0)
        for dim in shape:
            if not isinstance(dim, int) or dim < 0:
                raise NoArtifact(f"{name}: a shape is not made of sizes")
            count *= dim
        if first != end or last - first != count or dtype not in sizes:
            raise NoArtifact(f"{name}: tensors must tile the file without gaps or overlaps")
        end = last
    if end != len(data) - 8 - length:
        raise NoArtifact(f"{name}: bytes are left after the last tensor")
