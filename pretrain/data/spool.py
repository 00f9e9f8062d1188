"""The documents of a source in one scratch file, so that any of them is one read.

Sources are read once, in order, whatever they are; everything after that (choosing, tokenizer training, encoding
in several processes) reads the spool. A corpus that changes meanwhile, or a stream, cannot disturb it.
"""

import array
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from pretrain.config import stable_seed
from pretrain.data.source import TextDocument


@dataclasses.dataclass(frozen=True, eq=False)
class Spool:
    """Documents in the order in which they were added.

    `id_bytes`, `first_bytes` and `mark_bytes` are lengths inside a document's bytes (id, first text of a pair, borders
    of learned spans, text), -1 where there is no pair and where all is learned. `learned_bytes` are those of the text
    that are learned. `order_key` is a hash of seed and id: sorting by it is a random
    order that does not depend on the other documents.
    """

    path: Path
    starts: np.ndarray  # [documents + 1] bytes
    id_bytes: np.ndarray
    first_bytes: np.ndarray
    mark_bytes: np.ndarray
    learned_bytes: np.ndarray
    order_key: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.id_bytes)

    def part(self, start: int, stop: int) -> "Spool":
        """The documents from number `start` to before `stop`."""
        arrays = {
            name: getattr(self, name)[start:stop]
            for name in ("id_bytes", "first_bytes", "mark_bytes", "learned_bytes", "order_key")
        }
        return dataclasses.replace(self, starts=self.starts[start : stop + 1], **arrays)

    def in_random_order(self) -> np.ndarray:
        """Indices of all documents by `order_key`."""
        return np.argsort(self.order_key, kind="stable")

    def documents(self, indices: Iterable[int] | None = None) -> Iterator[TextDocument]:
        """The documents, all or those of `indices` in that order."""
        with open(self.path, "rb") as file:
            for i in range(len(self)) if indices is None else indices:
                file.seek(int(self.starts[i]))
                data = file.read(int(self.starts[i + 1] - self.starts[i]))
                first_start = int(self.id_bytes[i])
                mark_start = first_start + max(0, int(self.first_bytes[i]))
                text_start = mark_start + max(0, int(self.mark_bytes[i]))
                first = learned = None
                if self.first_bytes[i] >= 0:
                    first = data[first_start:mark_start].decode()
                if self.mark_bytes[i] >= 0:
                    borders = np.frombuffer(data[mark_start:text_start], "<i8").reshape(-1, 2)
                    learned = tuple((start, stop) for start, stop in borders.tolist())
                yield TextDocument(
                    data[:first_start].decode(), data[text_start:].decode(), first=first, learned=learned
                )


class SpoolWriter:
    """Writes a `Spool`; memory grows by 48 bytes a document. Leaving its context closes the file."""

    def __init__(self, path: Path, seed: int):
        self._path, self._seed = path, seed
        self._file = open(path, "wb")  # closed by `close` or on leaving the context
        self._digest = hashlib.sha256()
        self._starts, self._id_bytes = array.array("q", [0]), array.array("q")
        self._first_bytes, self._mark_bytes = array.array("q"), array.array("q")
        self._learned_bytes, self._order_key = array.array("q"), array.array("q")

    def add(self, document: TextDocument) -> int:
        """Append a document; returns its bytes."""
        identity, text = document.id.encode(), document.text.encode()
        first = b"" if document.first is None else document.first.encode()
        first_bytes = -1 if document.first is None else len(first)
        marks = b"" if document.learned is None else np.array(document.learned, "<i8").tobytes()
        marked = "" if document.learned is None else f" {len(marks)}"
        data = identity + first + marks + text
        self._file.write(data)
        self._digest.update(f"{len(identity)} {first_bytes} {len(text)}{marked}\n".encode())
        self._digest.update(data)
        self._starts.append(self._starts[-1] + len(data))
        self._id_bytes.append(len(identity))
        self._first_bytes.append(first_bytes)
        self._mark_bytes.append(-1 if document.learned is None else len(marks))
        self._learned_bytes.append(sum(len(part.encode()) for part, learned in document.parts() if learned))
        self._order_key.append(stable_seed("order", self._seed, document.id))
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def close(self) -> Spool:
        """Finish the file."""
        self._file.close()
        return Spool(
            path=self._path,
            starts=np.array(self._starts, np.int64),
            id_bytes=np.array(self._id_bytes, np.int64),
            first_bytes=np.array(self._first_bytes, np.int64),
            mark_bytes=np.array(self._mark_bytes, np.int64),
            learned_bytes=np.array(self._learned_bytes, np.int64),
            order_key=np.array(self._order_key, np.int64),
            sha256=self._digest.hexdigest(),
        )
