"""Decontamination: no text may hold a question of the evaluation unless its source document holds the words too."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, to_json
from synth.document import Document, Failure
from synth.near_duplicates import shingles_of, words_of
from synth.question import Question, Questions
from synth.shards import read_documents
from synth.stage import Shard


def question_shingles(questions: Iterable[Question], width: int) -> dict[str, str]:
    """Word n-grams of "question option" for every option, and each whole question, with the id of the question.

    A question shorter than `width` words counts as a whole.
    """
    found: dict[str, str] = {}
    for question in questions:
        whole = " ".join(words_of(question.text))
        if whole:
            found.setdefault(whole, question.id)
        for option in question.options:
            text = f"{question.text} {option}"
            if len(words_of(text)) >= width:
                for shingle in shingles_of(text, width):
                    found.setdefault(shingle, question.id)
    return found


class Contamination:
    """Looks for question n-grams in texts; quoting the parent is no leak."""

    def __init__(self, questions: Iterable[Question], *, width: int = 13):
        self._width = width
        self._grams = question_shingles(questions, width)
        self._lengths = sorted({gram.count(" ") + 1 for gram in self._grams})

    def first_hit(self, text: str, parents: Iterable[str]) -> tuple[str, str] | None:
        """(question id, words) of the first n-gram of a question that is in `text` and in none of `parents`."""
        words = words_of(text)
        parent_words = [" ".join(words_of(parent)) for parent in parents]
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                gram = " ".join(words[start : start + length])
                question = self._grams.get(gram)
                if question is not None and not any(_holds(parent, gram) for parent in parent_words):
                    return question, gram
        return None


def _holds(text: str, gram: str) -> bool:
    return f" {gram} " in f" {text} "


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Stage: drops and lists the texts that hold words of the evaluation. `questions` are only ever compared."""

    questions: tuple[Questions, ...]
    width: int = 13
    name: str = "decontaminate"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ("sources",)

    def __post_init__(self):
        if self.width < 4:
            raise ConfigError(
                f"width must be at least 4 words, got {self.width}; shorter n-grams hit everything"
            )

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """The clean documents; the others are listed with the question and the words that they hold."""
        search = Contamination((q for source in self.questions for q in source.load()), width=self.width)
        parents = {d.id: d.text for path in shard.needed["sources"] for d in read_documents(path)}
        for document in documents:
            hit = search.first_hit(document.text, [parents[p] for p in document.parents if p in parents])
            if hit is None:
                yield document
            else:
                yield Failure(
                    document=document.id, item=hit[0], reason="contaminated", detail=hit[1], dropped=True
                )
