"""The run folder: where its files lie, atomic writes, content hashes, clear errors for bad storage.

A file of ours is either absent, the old version or the new version: it is written beside its place, flushed
to the disk and renamed. A process that dies at any moment leaves at most a temporary file, which the next
owner of the folder removes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pretrain.config import ConfigError

TEMPORARY_SUFFIX = ".writing"
_CHUNK_BYTES = 1 << 20
_STORAGE_ERRORS = {
    errno.EROFS: "the file system is read-only; choose another run.workdir",
    errno.EACCES: "this user may not write there; choose another run.workdir",
    errno.EPERM: "this user may not write there; choose another run.workdir",
    errno.ENOSPC: "the disk is full; free space or choose another run.workdir, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; free space or choose another run.workdir, then run the same command again",
    errno.EFBIG: "the file would pass the file size limit; raise `ulimit -f` or choose another run.workdir",
    errno.ENOTDIR: "a part of the path is a file; choose another run.workdir",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter run.workdir",
}


def storage_error(error: BaseException, path: str | Path) -> ConfigError | None:
    """The one-line ConfigError for an error of the storage under `path`, None for any other kind of error.

    Libraries wrap what the kernel said: the chain of causes is searched, and the text of each link.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for number, remedy in _STORAGE_ERRORS.items():
            if getattr(link, "errno", None) == number or os.strerror(number) in str(link):
                return ConfigError(
                    f"the run folder must be writable, got {os.strerror(number)!r} at {path}: {remedy}"
                )
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def storage_errors(path: str | Path, kinds: tuple[type[BaseException], ...] = (OSError,)) -> Iterator[None]:
    """Turn errors of these kinds that mean bad storage under `path` into a ConfigError; others pass."""
    try:
        yield
    except kinds as error:
        refused = None if isinstance(error, ConfigError) else storage_error(error, path)
        if refused is None:
            raise
        raise refused from error


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Raises:
      ConfigError: the storage refuses (full, read-only, not permitted); nothing half-written stays.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # gone after the rename; unreachable when the folder is
                temporary.unlink()
        _sync_folder(path.parent)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_atomic` for one JSON value, indented, keys in the order given. NaN is refused (not JSON)."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file and force it to the disk: it is there after a crash that comes at any later moment.

    Raises:
      ConfigError: the storage refuses.
    """
    path = Path(path)
    with storage_errors(path):
        is_new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            data = f"{line}\n".encode()
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if is_new:
            _sync_folder(path.parent)


def finished_lines(path: str | Path) -> list[str]:
    """The lines of a file that only grows; what a kill left of a last one is cut off. An absent file has none."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomic(path, whole)
    return whole.decode().splitlines()


def file_sha256(path: str | Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of one run below `root`."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def config_json(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ledger_jsonl(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def summary_json(self) -> Path:
        return self.root / "summary.json"

    @property
    def loss_png(self) -> Path:
        return self.root / "loss.png"

    @property
    def samples_txt(self) -> Path:
        return self.root / "samples.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def create(self) -> None:
        """Make the folder, prove that it can be written, and remove temporary files of a killed owner.

        Raises:
          ConfigError: it cannot be made or written; a folder made on the way is removed again.
        """
        missing = [p for p in (self.root, *self.root.parents) if not p.exists()]
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(
                f"the run folder must be a folder, got the file {self.root}; choose another run.workdir"
            )
        try:
            with storage_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                for leftover in self.root.glob(f"*{TEMPORARY_SUFFIX}"):
                    leftover.unlink(missing_ok=True)
                write_atomic(self.root / ".probe", b"\0" * 4096)  # a full disk still takes an empty file
                (self.root / ".probe").unlink()
        except (OSError, ConfigError):
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise

    def lock(self) -> TextIO:
        """Hold the run for this process: keep the returned file open. The kernel frees it however we end.

        Raises:
          ConfigError: another live process holds it, or the storage refuses.
        """
        path = self.root / ".lock"
        with storage_errors(path):
            file = open(path, "a+")  # closed by its owner
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"a run folder has one writer, got {self.root}, which process {owner} is writing; wait for it or choose another run.workdir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file
