"""From a document to its entities and summary: the reply is checked, names are normalized and marked as grounded."""

import re
import unicodedata
from typing import Any

from synth.generator import Rejection
from synth.llm.api import parse_json

SCHEMA = {
    "type": "object",
    "properties": {
        "summary": {"type": "string"},
        "entities": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["summary", "entities"],
    "additionalProperties": False,
}
_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
_OUTER = " \t\n.,;:!?\"'`()[]{}<>*_\u2018\u2019\u201c\u201d"


def read_entities(text: str) -> dict[str, Any] | Rejection:
    """The `{"summary", "entities"}` of a reply. Entities that are no texts, or none at all, are malformed."""
    try:
        reply = parse_json(text)
    except ValueError as error:
        return Rejection(reason="malformed", detail=str(error))
    if not isinstance(reply, dict) or not isinstance(reply.get("summary"), str):
        return Rejection(reason="malformed", detail='no "summary" text')
    entities = reply.get("entities")
    if not isinstance(entities, list) or not entities or not all(isinstance(e, str) for e in entities):
        return Rejection(reason="malformed", detail='"entities" must be a list of texts, not empty')
    return {"summary": reply["summary"].strip(), "entities": entities}


def normalize_entity(name: str) -> str:
    """NFKC, single spaces, outer punctuation and a leading article dropped. Idempotent."""
    name = " ".join(unicodedata.normalize("NFKC", name).split())
    while True:
        shorter = _ARTICLE.sub("", name.strip(_OUTER)).strip(_OUTER)
        if shorter == name:
            return name
        name = shorter


def merge_entities(lists: list[list[str]], limit: int | None) -> list[str]:
    """The normalized names of all lists, each once whatever its case, in order of first appearance, cut at `limit`."""
    merged: dict[str, str] = {}
    for names in lists:
        for name in names:
            name = normalize_entity(name)
            if name:
                merged.setdefault(name.casefold(), name)
    return list(merged.values())[:limit]


def is_grounded(entity: str, text: str) -> bool:
    """Whether the entity occurs in the text, whatever its case and spacing."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return entity.casefold() in folded
