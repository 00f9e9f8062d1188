"""A document and where it comes from: provenance is a field, not a file name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with its parents and its recipe.

    `parents` are the ids of the documents it was made from (none for a source document), `made_by` is the
    fingerprint of the recipe that made it, and `meta` is plain JSON: generator, kind, parts, prompt hash,
    model, sampling, tokens and the key of the cached call.
    """

    id: str
    text: str
    parents: tuple[str, ...] = ()
    made_by: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The document as one line of canonical JSON, newline included: equal documents, equal bytes."""
        record = {
            "id": self.id,
            "text": self.text,
            "parents": list(self.parents),
            "made_by": self.made_by,
            "meta": dict(self.meta),
        }
        return (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that should have become a document and did not; it ends in the errors file of its shard.

    `dropped` marks what was taken out on purpose (contaminated, duplicated): listed, but not a fault.
    """

    document: str
    item: str
    reason: str
    detail: str = ""
    dropped: bool = False

    def to_line(self) -> bytes:
        """The failure as one line of JSON, newline included."""
        record = {"document": self.document, "item": self.item, "reason": self.reason, "detail": self.detail}
        return (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def document_from_line(line: bytes, where: str) -> Document:
    """The inverse of `Document.to_line`; `where` names the line in the error.

    Raises:
      ConfigError: the line is not the JSON of a document.
    """
    try:
        record = json.loads(line)
        return Document(
            id=record["id"],
            text=record["text"],
            parents=tuple(record["parents"]),
            made_by=record["made_by"],
            meta=record["meta"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where} must hold one document (id, text, parents, made_by, meta) as JSON, "
            f"got {line[:60]!r}; remove the file to make it again"
        ) from error


def derive_id(parents: tuple[str, ...], made_by: str, key: str) -> str:
    """The id of a made document: a hash of its parents, its recipe and its place in the plan (20 hex digits)."""
    body = json.dumps([list(parents), made_by, key], separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()[:20]


def windows_of(text: str, limit: int | None) -> list[str]:
    """The text in pieces of at most `limit` characters; None leaves it whole.

    Cut at paragraphs, else at lines, sentences, spaces.
    """
    if limit is None or len(text) <= limit:
        return [text]
    windows = []
    rest = text
    while len(rest) > limit:
        cut = -1
        for mark in ("\n\n", "\n", ". ", " "):
            if cut < 0:
                cut = rest.rfind(mark, limit // 3, limit)
        cut = limit if cut < 0 else cut + 1
        windows.append(rest[:cut])
        rest = rest[cut:]
    if rest.strip():
        windows.append(rest)
    return [window.strip() for window in windows if window.strip()]
