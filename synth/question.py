"""A question, how it is put, how its answer is read, and accuracy with an interval and an answer rate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from pretrain.config import ConfigError

LETTERS = "ABCDEFGHIJKLMNOP"
_ANSWER = re.compile(r"answer\s*(?:is)?\s*:?\s*\**\(?([A-P](?:\s*(?:,|and|or)\s*[A-P])*)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One multiple-choice question about the document with id `document`. `tags` split the report ("hard")."""

    id: str
    document: str
    text: str
    options: tuple[str, ...]
    gold: int
    tags: tuple[str, ...] = field(default=())

    def __post_init__(self):
        if not 2 <= len(self.options) <= len(LETTERS):
            raise ConfigError(
                f"question {self.id} must have 2 to {len(LETTERS)} options, got {len(self.options)}"
            )
        if not 0 <= self.gold < len(self.options):
            raise ConfigError(
                f"question {self.id}: gold must lie in [0, {len(self.options)}), got {self.gold}"
            )


def ask_text(question: Question) -> str:
    """The question with its lettered options, one a line."""
    options = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
    return "\n".join([question.text.strip(), *options])


def parse_answer(reply: str, num_options: int, rule: Literal["strict", "last"] = "strict") -> int | None:
    """The option that a reply chooses after "Answer:", or None.

    `strict` takes the last "Answer:" and demands exactly one letter; `last` takes the last of several letters,
    as the authors' code does.
    """
    matches = _ANSWER.findall(reply)
    if not matches:
        return None
    letters = re.findall(r"[A-P]\b", matches[-1].upper())
    if not letters or (rule == "strict" and len(letters) > 1):
        return None
    index = LETTERS.index(letters[-1])
    return index if index < num_options else None


@dataclass(frozen=True, kw_only=True)
class Graded:
    """One question with what was chosen: an option, or None where no answer could be read."""

    question: Question
    choice: int | None

    @property
    def is_right(self) -> bool:
        """Unanswered is wrong."""
        return self.choice == self.question.gold


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """`accuracy` counts unanswered as wrong; `of_answered` is the accuracy over answered questions alone.

    `low` and `high` bound `accuracy` with 95 %, from a bootstrap over documents.
    """

    num_questions: int
    accuracy: float
    low: float
    high: float
    answer_rate: float
    of_answered: float

    def __str__(self) -> str:
        percent = f"{100 * self.accuracy:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{percent} of {self.num_questions}, answered {100 * self.answer_rate:.0f} %"


def accuracy(graded: Sequence[Graded], *, seed: int = 0, num_resamples: int = 1000) -> Accuracy:
    """Accuracy over all questions, its interval by resampling documents with their questions.

    Raises:
      ValueError: no questions.
    """
    if not graded:
        raise ValueError("accuracy needs at least one question, got none")
    documents = sorted({g.question.document for g in graded})
    row = {document: i for i, document in enumerate(documents)}
    right, total = np.zeros(len(documents)), np.zeros(len(documents))
    for g in graded:
        right[row[g.question.document]] += g.is_right
        total[row[g.question.document]] += 1
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(documents), size=(num_resamples, len(documents)))
    resampled = right[picks].sum(axis=1) / total[picks].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    answered = sum(g.choice is not None for g in graded)
    return Accuracy(
        num_questions=len(graded),
        accuracy=float(right.sum() / total.sum()),
        low=float(low),
        high=float(high),
        answer_rate=answered / len(graded),
        of_answered=float(right.sum() / answered) if answered else 0.0,
    )


def accuracy_by_tag(graded: Sequence[Graded], *, seed: int = 0) -> Mapping[str, Accuracy]:
    """`all`, then each tag with its own accuracy."""
    tags = sorted({tag for g in graded for tag in g.question.tags})
    table = {"all": accuracy(graded, seed=seed)}
    for tag in tags:
        table[tag] = accuracy([g for g in graded if tag in g.question.tags], seed=seed)
    return table


class Questions(Protocol):
    """A config that names a set of questions."""

    def load(self) -> list[Question]:
        """All of them, in a fixed order."""
        ...
