"""Problems with checkable answers: generated on the spot, or read from files."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pretrain.config import ConfigError, stable_seed
from pretrain.data.source import read_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and what answers it."""

    id: str
    prompt: str
    answer: str


class ProblemsConfig(Protocol):
    """Where problems come from: the class is the choice."""

    def train(self) -> tuple[Problem, ...]: ...

    def heldout(self) -> tuple[Problem, ...]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Sums and differences of two numbers in [0, `max_operand`]; held-out pairs of operands are never trained on."""

    max_operand: int = 99
    operators: tuple[Literal["+", "-"], ...] = ("+",)
    num_train: int = 4000
    num_heldout: int = 200
    seed: int = 0

    def __post_init__(self):
        faults = []
        if not set(self.operators) <= {"+", "-"} or not self.operators:
            faults.append(f"operators must be some of + and -, got {self.operators}")
        possible = (self.max_operand + 1) ** 2 * len(self.operators)
        if min(self.num_train, self.num_heldout) < 1 or self.num_train + self.num_heldout > possible:
            faults.append(
                f"num_train and num_heldout must be positive and together at most {possible} (all problems up to "
                f"max_operand={self.max_operand}), got {self.num_train} and {self.num_heldout}"
            )
        if faults:
            raise ConfigError(*faults)

    def _problems(self, first: int, count: int) -> tuple[Problem, ...]:
        size = self.max_operand + 1
        total = size**2 * len(self.operators)
        order = np.random.default_rng(stable_seed("arithmetic", self.seed)).permutation(total)
        found = []
        for number in order[first : first + count].tolist():
            operator = self.operators[number // size**2]
            a, b = divmod(number % size**2, size)
            answer = a + b if operator == "+" else a - b
            found.append(Problem(id=f"{a}{operator}{b}", prompt=f"{a}{operator}{b}=", answer=str(answer)))
        return tuple(found)

    def heldout(self) -> tuple[Problem, ...]:
        """The first of the seeded order."""
        return self._problems(0, self.num_heldout)

    def train(self) -> tuple[Problem, ...]:
        """Those after the held-out ones."""
        return self._problems(self.num_heldout, self.num_train)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFileConfig:
    """JSONL files (plain, .gz or .zst) with a question and its answer, as those of GSM8K: the answer stands after `####`.

    `template` makes the prompt from {question}, its other braces stand as they are. Questions of more than
    `max_question_characters` are left out, so that no prompt is longer than the run allows.
    """

    train_path: str
    heldout_path: str
    question_key: str = "question"
    answer_key: str = "answer"
    template: str = "Question: {question}\nAnswer:"
    max_question_characters: int | None = None
    num_train: int | None = None
    num_heldout: int | None = 200

    def __post_init__(self):
        faults = []
        if "{question}" not in self.template:
            faults.append(f"template must hold {{question}}, got {self.template!r}")
        for name in ("max_question_characters", "num_train", "num_heldout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1 or none, got {value}")
        if faults:
            raise ConfigError(*faults)

    def train(self) -> tuple[Problem, ...]:
        """The problems of `train_path`."""
        return self._read(self.train_path, self.num_train)

    def heldout(self) -> tuple[Problem, ...]:
        """The problems of `heldout_path`."""
        return self._read(self.heldout_path, self.num_heldout)

    def _read(self, path: str, limit: int | None) -> tuple[Problem, ...]:
        found = []
        for number, line in enumerate(read_lines(Path(path)), 1):
            if limit is not None and len(found) == limit:
                break
            try:
                record = json.loads(line)
                question, answer = str(record[self.question_key]), str(record[self.answer_key])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} must be an object with {self.question_key!r} and {self.answer_key!r}, got "
                    f"{line[:60]!r} ({type(error).__name__})"
                ) from error
            if self.max_question_characters is not None and len(question) > self.max_question_characters:
                continue
            answer = answer.rpartition("####")[2].strip()
            found.append(
                Problem(
                    id=f"{Path(path).name}:{number}",
                    prompt=self.template.replace("{question}", question),
                    answer=answer,
                )
            )
        if not found:
            limit_words = (
                ""
                if self.max_question_characters is None
                else f" of at most {self.max_question_characters} characters"
            )
            raise ConfigError(f"{path} must hold at least one problem{limit_words}, got none")
        return tuple(found)
