"""Documents cut into passages: at paragraphs where that fits, else at lines, sentences, words, and never inside less."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pretrain.config import ConfigError

SEPARATORS = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A piece of a document; `head` names the document (title, author, year) and is searched and shown with it."""

    document: str
    head: str
    text: str

    @property
    def shown(self) -> str:
        """What is searched and what the model reads."""
        return f"{self.head}\n{self.text}" if self.head else self.text


def cut(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters that add up to the text; neighbors are joined while they fit.

    Raises:
      ConfigError: `limit` is not positive.
    """
    if limit < 1:
        raise ConfigError(f"passages must hold at least 1 character, got limit={limit}")
    return _joined(_split(text, limit, SEPARATORS), limit)


def _split(text: str, limit: int, separators: Sequence[str]) -> list[str]:
    if len(text) <= limit:
        return [text] if text else []
    if not separators:
        return [text[start : start + limit] for start in range(0, len(text), limit)]
    parts = text.split(separators[0])
    # The separator stays with what it ends, so that the pieces add up to the text.
    ended = [*(part + separators[0] for part in parts[:-1]), parts[-1]]
    return [piece for part in ended for piece in _split(part, limit, separators[1:])]


def _joined(pieces: Sequence[str], limit: int) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and len(joined[-1]) + len(piece) <= limit:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def passages_of(documents: Iterable[tuple[str, str]], heads: Mapping[str, str], limit: int) -> list[Passage]:
    """The passages of (id, text) documents, in order; blank ones are left out. The head is not counted."""
    return [
        Passage(document=identity, head=heads.get(identity, ""), text=piece.strip())
        for identity, text in documents
        for piece in cut(text, limit)
        if piece.strip()
    ]
